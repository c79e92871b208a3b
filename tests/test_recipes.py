"""Recipes of others: each key accounted for, each meaning kept or its loss said."""

import dataclasses
import json
import re

import pytest
import yaml

from conftest import ROOT
from smoldpo import config as configuration
from smoldpo.arguments import config_from_arguments
from smoldpo.config import TrainConfig
from smoldpo.errors import ConfigError, UsageError
from smoldpo.recipes import DIALECTS, import_recipe
from smoldpo.recipes.account import STATUSES, complaint
from smoldpo.recipes.rules import find

RECIPES = sorted((ROOT / "tests" / "recipes").glob("*.yaml"))
FOLDER = ROOT / "tests" / "recipes"
OF = {
    "handbook-mixer": "alignment-handbook",
    "handbook-mixture": "alignment-handbook",
    "handbook-apo": "alignment-handbook",
    "handbook-orpo": "alignment-handbook",
    "handbook-simpo": "alignment-handbook",
    "trl-cpo": "trl",
    "axolotl-simpo": "axolotl",
    "llama-factory-orpo": "llama-factory",
    "trl": "trl",
    "axolotl": "axolotl",
    "llama-factory": "llama-factory",
}


@pytest.fixture
def write(tmp_path):
    """Write a recipe and import it."""

    def run(text: str, dialect: str | None = None, name: str = "recipe.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return import_recipe(path, dialect)

    return run


def fates(imported) -> dict[str, str]:
    return {entry.key: entry.status for entry in imported.entries}


def reasons(imported) -> dict[str, str]:
    return {entry.key: entry.reason for entry in imported.entries}


TRL = "model_name_or_path: a/model\ndataset_name: a/pairs\nbeta: 0.1\n"
FULL = "stage: dpo\nmodel_name_or_path: a/m\nfinetuning_type: full\n"
AXOLOTL = "base_model: a/m\nrl: dpo\ndatasets:\n  - path: a/pairs\nlearning_rate: 1e-6\n"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_key_of_a_recipe_is_accounted_for(path):
    imported = import_recipe(path)
    assert imported.dialect == OF[path.stem]
    seen = fates(imported)
    for key, value in yaml.safe_load(path.read_text()).items():
        inner = {name for name in seen if name.startswith(f"{key}.")}
        assert key in seen or inner, key
        if key not in seen and isinstance(value, dict):
            assert {name.removeprefix(f"{key}.").split(".")[0] for name in inner} == set(value)
    for entry in imported.entries:
        assert entry.status in STATUSES
        assert entry.becomes or entry.reason, f"{entry.key}: neither used nor explained"
    assert "no key that is known" not in str(reasons(imported)), "these recipes are common ones"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_written_config_is_read_back_to_the_same_values(path, cli, tmp_path):
    result = cli("config", "import", path, "--out", "mine.yaml")
    assert result.code == 0, result.err
    assert path.name in (tmp_path / "mine.yaml").read_text().splitlines()[0]
    shown = cli("config", "show", "mine.yaml")
    assert shown.code == 0, shown.err
    assert TrainConfig(**yaml.safe_load(shown.out)) == import_recipe(path).config


def test_the_handbooks_older_form():
    imported = import_recipe(FOLDER / "handbook-mixer.yaml")
    assert imported.settings == {
        "model": "someone/small-sft",
        "freeze_layers": 0,
        "data": ["someone/feedback_binarized"],
        "data_split": "train_prefs",
        "max_length": 768,
        "beta": 0.3,
        "learning_rate": 2e-6,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "num_train_epochs": 2.0,
        "seed": 7,
        "per_device_eval_batch_size": 4,
        "eval_steps": 50,
        "dtype": "bfloat16",
        "output_dir": "data/small-dpo",
        "logging_steps": 5,
    }
    seen = fates(imported)
    assert {"push_to_hub", "hub_model_id", "report_to", "gradient_checkpointing"} <= {
        key for key, status in seen.items() if status == "dropped"
    }
    assert "max_length" in reasons(imported)["max_prompt_length"]
    assert any("max_prompt_length" in line for line in imported.differences)
    assert any("2 x 4 = 8 pairs" in line and "GPUs" in line for line in imported.notes)


def test_a_test_split_that_the_recipe_joins_to_its_training_data_is_not_trained_on():
    imported = import_recipe(FOLDER / "handbook-mixture.yaml")
    assert imported.settings["data"] == ["someone/feedback_binarized"], "once, and not test_prefs"
    assert imported.settings["data_split"] == "train_prefs"
    assert "data_subset" not in imported.settings, "default is no subset's name to smoldpo"
    assert "eval_fraction" not in imported.settings, "the published test split judges"
    assert "test_prefs" in reasons(imported)["dataset_mixture.datasets"]
    assert sum(line.count("at random") for line in imported.differences) == 1
    assert imported.settings["save_steps"] == 20


def test_splits_of_their_own_go_through_files():
    imported = import_recipe(FOLDER / "handbook-apo.yaml")
    files = [
        "talk-Preference-mixture_no_think.jsonl",
        "talk-Preference-mixture_think.jsonl",
    ]
    assert imported.settings["data"] == files
    assert imported.settings["data_weights"] == [0.5, 0.25]
    assert imported.commands == tuple(
        f"smoldpo data convert someone/talk {file} --subset Preference --split {split}"
        for file, split in zip(files, ["mixture_no_think", "mixture_think"], strict=True)
    )
    assert "data_split" not in imported.settings
    assert imported.settings["max_grad_norm"] == 0.2
    seen = fates(imported)
    assert seen["save_steps"] == seen["model_revision"] == "unsupported"
    assert all(command in imported.as_yaml() for command in imported.commands), (
        "whole, to be copied"
    )
    assert any("evaluates on nothing" in note for note in imported.notes)


def test_data_convert_takes_what_the_commands_say(cli, write_rows):
    from conftest import rows

    write_rows(rows(8))
    result = cli("data", "convert", "pairs.jsonl", "out.jsonl", "--split", "train")
    assert result.code == 0, result.err


def test_a_test_split_beside_files_is_a_file_too(write):
    imported = write(
        "model_name_or_path: a/m\nbeta: 0.1\ndataset_mixture:\n  datasets:\n"
        "  - {id: a/one, split: train_prefs}\n  - {id: a/one, split: test_prefs}\n"
        "  - {id: a/two, config: big, split: train}\n"
    )
    assert imported.settings["data"] == ["one-train_prefs.jsonl", "two-big.jsonl"]
    assert imported.settings["eval_data"] == "one-test_prefs.jsonl"
    assert len(imported.commands) == 3


def test_what_trl_does_without_being_told_is_written_out():
    imported = import_recipe(FOLDER / "trl.yaml")
    settings = imported.settings
    assert settings["lr_scheduler_type"] == "linear"
    assert settings["per_device_train_batch_size"] == 8
    assert settings["gradient_accumulation_steps"] == 1
    assert settings["num_train_epochs"] == 3
    assert settings["freeze_layers"] == 0, "smoldpo's own default trains the upper layers alone"
    assert settings["learning_rate"] == 5e-7, "text to YAML, a number to us"
    assert settings["warmup_ratio"] == 0.05, "below 1, warmup_steps is a share"
    assert "warmup_steps" not in settings
    assert settings["data_subset"] == "helpful" and "data_split" not in settings
    assert imported.config.max_grad_norm is None, "0 means no clipping"
    assert imported.config.max_steps is None, "-1 means none"
    seen = fates(imported)
    assert seen["precompute_ref_log_probs"] == seen["optim"] == "kept"
    assert seen["lora_r"] == "dropped", "use_peft is off"
    assert seen["deepspeed"] == "dropped"


def test_defaults_are_trls_own():
    trl = pytest.importorskip("trl")
    from smoldpo.recipes.trl import DEFAULTS

    real = trl.DPOConfig(output_dir="none", bf16=False)
    theirs = {name: getattr(real, name) for name in DEFAULTS if hasattr(real, name)}
    theirs["lr_scheduler_type"] = real.lr_scheduler_type.value
    theirs["warmup_ratio"] = float(real.warmup_steps)
    assert theirs == DEFAULTS
    for name in ("beta", "max_length", "weight_decay", "adam_beta2", "max_grad_norm", "seed"):
        assert TrainConfig.model_fields[name].default == getattr(real, name), name


def test_every_option_of_trls_command_is_known(write):
    trl = pytest.importorskip("trl")
    kinds = (trl.DPOConfig, trl.ScriptArguments, trl.ModelConfig)
    names = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    imported = write(TRL + "".join(f"{name}:\n" for name in sorted(names) if f"{name}:" not in TRL))
    unknown = [key for key, why in reasons(imported).items() if "no key that is known" in why]
    assert not unknown


def test_a_recipe_without_data_does_not_silently_train_on_the_built_in_pairs(write):
    imported = write("beta: 0.1\nmax_prompt_length: 5\n", "trl")
    assert sum("give --model" in note or "give --data" in note for note in imported.notes) == 2
    assert not any("built-in" in note for note in write(TRL).notes)
    assert write(TRL, "alignment-handbook").settings["data"] == ["a/pairs"], (
        "it takes TRL's key too"
    )


def test_axolotl_with_lora():
    imported = import_recipe(FOLDER / "axolotl.yaml")
    settings, seen = imported.settings, fates(imported)
    assert settings["beta"] == 0.25, "inside `trl:`"
    assert settings["max_length"] == 4096
    assert settings["per_device_train_batch_size"] == 2
    assert settings["num_train_epochs"] == 4
    assert settings["eval_fraction"] == 0.05
    assert settings["columns"] == ["messages=conversation"]
    assert settings["dtype"] == "auto"
    assert settings["warmup_steps"] == 10 and "warmup_ratio" not in settings
    assert settings["use_peft"] is True and seen["adapter"] == "renamed"
    assert (settings["lora_r"], settings["lora_alpha"]) == (32, 16)
    assert "lora_target_modules" not in settings and seen["lora_target_linear"] == "kept"
    assert "lora_dropout" not in settings and seen["lora_dropout"] == "dropped"
    assert any(line.startswith("lora_dropout") for line in imported.differences)
    assert "freeze_layers" not in settings, "with adapters none freezes by default"
    assert seen["load_in_8bit"] == "unsupported"
    assert seen["special_tokens"] == seen["evals_per_epoch"] == "unsupported"
    assert seen["lora_model_dir"] == "dropped", "empty"


def test_llama_factory(write, tmp_path):
    imported = import_recipe(FOLDER / "llama-factory.yaml")
    settings = imported.settings
    assert settings["beta"] == 0.15 and settings["loss_type"] == ["sigmoid"]
    assert settings["max_length"] == 1536 and settings["freeze_layers"] == 0
    assert settings["data"] == ["pairs_en", "pairs_de"]
    assert settings["data_weights"] == [0.75, 0.25]
    assert settings["eval_fraction"] == 0.1
    assert any("pairs_en, pairs_de" in note for note in imported.notes), "names, not files"


def test_llama_factory_trains_adapters_without_being_told(write):
    for said in ("", "finetuning_type:\n"):
        imported = write(f"stage: dpo\nmodel_name_or_path: a/m\ndataset: a/b\nlora_rank: 4\n{said}")
        assert "freeze_layers" not in imported.settings
        assert imported.config.use_peft and imported.config.lora_r == 4
        assert imported.config.lora_alpha == 8, "twice the rank"
        assert fates(imported)["lora_rank"] == "renamed"


ADAPTERS = {
    "trl": TRL + "use_peft: true\n",
    "axolotl": AXOLOTL + "adapter: lora\n",
    "llama-factory": FULL.replace("full", "lora") + "dataset: a/b\n",
}


@pytest.mark.parametrize(
    "dialect, text, settings",
    [
        ("trl", "", {"lora_target_modules": ["q_proj", "v_proj"], "lora_r": 16, "lora_alpha": 32}),
        ("trl", "lora_target_modules: all-linear\n", {"lora_target_modules": []}),
        ("trl", "lora_target_modules: [q_proj, up_proj]\n",
         {"lora_target_modules": ["q_proj", "up_proj"]}),
        ("trl", "lora_r: 8\nlora_alpha: 64\nuse_rslora: true\n",
         {"lora_r": 8, "lora_alpha": 64, "use_rslora": True}),
        ("trl", "use_dora: true\nlora_dropout: 0.05\n", {"use_dora": True, "lora_dropout": 0}),
        ("axolotl", "lora_r: 8\npeft_use_dora: true\nlora_layers_to_transform: [1, 3]\n",
         {"lora_r": 8, "use_dora": True, "train_layers": ["1", "3"]}),
        ("axolotl", "peft_use_rslora: true\nlora_target_modules:\n- q_proj\n",
         {"use_rslora": True, "lora_target_modules": ["q_proj"]}),
        ("llama-factory", "", {"lora_r": 8, "lora_alpha": 16, "lora_target_modules": []}),
        ("llama-factory", "lora_rank: 32\nlora_target: all\nuse_dora: true\n",
         {"lora_r": 32, "lora_alpha": 64, "lora_target_modules": [], "use_dora": True}),
        ("llama-factory", "lora_alpha: 10\nlora_target: q_proj,v_proj\n",
         {"lora_r": 8, "lora_alpha": 10, "lora_target_modules": ["q_proj", "v_proj"]}),
    ],
)  # fmt: skip
def test_adapters_of_each_dialect(write, dialect, text, settings):
    imported = write(ADAPTERS[dialect] + text)
    assert imported.dialect == dialect
    for name, value in {"use_peft": True, "freeze_layers": None, **settings}.items():
        assert getattr(imported.config, name) == value, name


@pytest.mark.parametrize(
    "text, fate, says",
    [
        ("lora_modules_to_save: [lm_head]\n", "unsupported", "adapters alone train"),
        ("lora_model_dir: ./mine\n", "unsupported", "set model to that adapter's folder"),
        ("loraplus_lr_ratio: 16\n", "unsupported", "set learning_rates"),
        ("lora_mlp_kernel: true\n", "dropped", "own exact kernels"),
        ("lora_modules_to_save:\n", "dropped", "empty"),
    ],
)
def test_what_adapters_cannot_do(write, text, fate, says):
    imported = write(ADAPTERS["axolotl"] + text)
    key = text.partition(":")[0]
    assert fates(imported)[key] == fate and says in reasons(imported)[key]


def test_quantised_adapters_are_adapters_and_others_are_not(write):
    imported = write(AXOLOTL + "adapter: qlora\nlora_r: 4\n")
    assert imported.config.use_peft and imported.config.lora_r == 4
    assert any("not quantised" in line for line in imported.differences)
    imported = write(FULL.replace("full", "oft") + "dataset: a/b\noft_rank: 4\n")
    assert not imported.config.use_peft and fates(imported)["finetuning_type"] == "unsupported"
    assert any("OFT adapters" in note and "ten times" in note for note in imported.notes)


@pytest.mark.parametrize(
    "text, settings",
    [
        ("", {"train_layers": ["last:2"], "train": []}),
        ("freeze_trainable_layers: 4\n", {"train_layers": ["last:4"]}),
        ("freeze_trainable_layers: -3\n", {"train_layers": ["first:3"]}),
        ("freeze_trainable_modules: all\n", {"train": []}),
        ("freeze_trainable_modules: mlp,self_attn\n", {"train": ["*.mlp.*", "*.self_attn.*"]}),
        ("freeze_trainable_layers: no\n", {"train_layers": []}),
    ],
)
def test_llama_factory_trains_some_layers(write, text, settings):
    imported = write(FULL.replace("full", "freeze") + "dataset: a/b\n" + text)
    for name, value in {"use_peft": False, "freeze_layers": None, **settings}.items():
        assert getattr(imported.config, name) == value, name
    if text == "freeze_trainable_layers: no\n":
        assert fates(imported)["finetuning_type"] == "unsupported"


def test_llama_factorys_dataset_info_is_read_where_it_lies(write, tmp_path):
    (tmp_path / "data").mkdir()
    info = {
        "mine": {"file_name": "mine.json", "ranking": True},
        "theirs": {"hf_hub_url": "a/pairs", "subset": "en"},
    }
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    imported = write(FULL + "dataset: mine\neval_dataset: theirs\n")
    assert imported.settings["data"] == [str(tmp_path / "data" / "mine.json")]
    assert imported.settings["eval_data"] == "a/pairs"
    mixed = write(FULL + "dataset: mine,theirs\n")
    assert mixed.settings["data"][1] == "pairs-en.jsonl"
    assert mixed.commands == ("smoldpo data convert a/pairs pairs-en.jsonl --subset en",)


def test_columns_from_axolotl_are_read(cli, write_rows):
    columns = import_recipe(FOLDER / "axolotl.yaml").settings["columns"]
    turns = [{"role": "user", "content": "Is this read?"}]
    answer = {"role": "assistant", "content": "Yes, under its other name."}
    no = {"role": "assistant", "content": "No."}
    write_rows([{"conversation": turns, "chosen": answer, "rejected": no}], "talk.jsonl")
    result = cli("data", "convert", "talk.jsonl", "out.jsonl", "--columns", ",".join(columns))
    assert result.code == 0 and "1 pairs" in result.err, result.err


@pytest.mark.parametrize(
    "text, settings",
    [
        (TRL + "fp16: true\n", {}),
        (TRL + "dtype: bfloat16\n", {"dtype": "bfloat16"}),
        (TRL + "torch_dtype: float32\nbf16: true\n", {"dtype": "bfloat16"}),
        (TRL + "lr_scheduler_type: constant_with_warmup\nwarmup_ratio: 0.2\n",
         {"lr_scheduler_type": "constant", "warmup_ratio": 0.2}),
        (TRL + "lr_scheduler_type: constant\nwarmup_ratio: 0.2\n",
         {"lr_scheduler_type": "constant", "warmup_ratio": 0.0}),
        (TRL + "warmup_steps: 0\nwarmup_ratio: 0.3\n", {"warmup_ratio": 0.3}),
        (TRL + "eval_strategy: epoch\neval_steps: 5\n", {}),
        (TRL + "eval_strategy: no\neval_steps: 5\n", {}),
        (TRL + "save_strategy: no\nsave_steps: 5\n", {}),
        (TRL + "save_steps: 5\n", {"save_steps": 5}),
        (TRL + "loss_type: [sigmoid]\n", {"loss_type": ["sigmoid"]}),
        (TRL + "max_length:\n", {}),
        (TRL + "label_smoothing: 0.1\n", {"label_smoothing": 0.1}),
        (TRL + "ref_model_name_or_path: a/ref\n", {"reference": "a/ref"}),
        (TRL + "use_peft: true\nlora_r: 8\n", {}),
        (AXOLOTL, {"max_length": 512, "warmup_ratio": 0.03, "freeze_layers": 0}),
        (AXOLOTL + "batch_size: 32\nmicro_batch_size: 4\n", {"gradient_accumulation_steps": 8}),
        (AXOLOTL + "rl_beta: 0.3\n", {"beta": 0.3}),
        (AXOLOTL + "val_set_size: 200\n", {}),
        (FULL + "dataset: a/b\nmax_samples: 90\n", {"max_train_samples": 90}),
        (FULL + "dataset: a/b\n", {"max_length": 2048, "lr_scheduler_type": "linear"}),
        (FULL + "dataset: a/b\npure_bf16: true\n", {"dtype": "bfloat16"}),
        (FULL.replace("full", "freeze") + "dataset: a/b\n", {}),
        (TRL + "optim: adafactor\nadam_beta1: 0.8\n", {"optim": "adafactor"}),
        (TRL + "optim: sgd\noptim_args: momentum=0.9\n", {"optim": "sgd", "sgd_momentum": 0.9}),
        (TRL + "optim: paged_adamw_8bit\nadam_beta1: 0.8\n",
         {"optim": "adamw_8bit", "adam_beta1": 0.8}),
        (TRL + "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr_rate: 0.2}\n",
         {"lr_scheduler_type": "cosine_with_min_lr", "min_lr_rate": 0.2}),
        (TRL + "lr_scheduler_type: cosine_with_min_lr\nlearning_rate: 1e-5\n"
         "lr_scheduler_kwargs: '{\"min_lr\": 5e-6, \"num_cycles\": 0.5}'\n",
         {"lr_scheduler_type": "cosine_with_min_lr", "min_lr_rate": 0.5}),
        (TRL + "lr_scheduler_type: warmup_stable_decay\nlr_scheduler_kwargs: {num_decay_steps: 9, "
         "decay_type: linear, min_lr_ratio: 0.0, warmup_type: linear}\n",
         {"lr_scheduler_type": "warmup_stable_decay", "lr_decay_steps": 9, "lr_decay_type": "linear"}),
        (TRL + "lr_scheduler_kwargs: {}\n", {}),
        (TRL + "sync_ref_model: true\nref_model_sync_steps: 64\nref_model_mixup_alpha: 0.9\n",
         {"sync_ref_model": True, "ref_model_sync_steps": 64, "ref_model_mixup_alpha": 0.9}),
        (TRL + "sync_ref_model: false\nref_model_sync_steps: 64\n", {}),
        (AXOLOTL + "lr_scheduler: cosine\ncosine_min_lr_ratio: 0.1\n",
         {"lr_scheduler_type": "cosine_with_min_lr", "min_lr_rate": 0.1}),
        (AXOLOTL + "lr_groups:\n  - {name: a, modules: [q_proj, mlp], lr: 2e-5}\n",
         {"learning_rates": ["*q_proj*=2e-05", "*mlp*=2e-05"]}),
        (AXOLOTL + "embedding_lr_scale: 0.5\n", {"learning_rates": ["embeddings=5e-07"]}),
        (AXOLOTL + "embedding_lr: 3e-7\noptimizer: adafactor\n",
         {"learning_rates": ["embeddings=3e-07"], "optim": "adafactor"}),
        (FULL + "dataset: a/b\noptim: adamw_8bit\n", {"optim": "adamw_8bit"}),
    ],
)  # fmt: skip
def test_meanings(write, text, settings):
    imported = write(text)
    about = {
        "dtype",
        "lr_scheduler_type",
        "warmup_ratio",
        "warmup_steps",
        "eval_steps",
        "save_steps",
    }
    about |= {"eval_fraction", "freeze_layers", "max_length", "optim", "learning_rates", *settings}
    about |= {
        "min_lr_rate",
        "sync_ref_model",
        "ref_model_sync_steps",
        "sgd_momentum",
        "lr_decay_steps",
    }
    got = {name: value for name, value in imported.settings.items() if name in about}
    told = {
        entry.becomes and next(iter(entry.becomes))
        for entry in imported.entries
        if entry.status == "default"
    }
    assert settings.items() <= got.items()
    assert set(got) - set(settings) <= told, "nothing is written that the recipe does not say"


@pytest.mark.parametrize(
    "text, key, says",
    [
        (TRL + "loss_type: no_such_loss\n", "loss_type", "no_such_loss"),
        (TRL + "loss_type: [sigmoid, no_such_loss]\n", "loss_type", "no_such_loss"),
        (TRL + "lr_scheduler_type: polynomial\n", "lr_scheduler_type", "polynomial"),
        (TRL + "optim: lion_32bit\n", "optim", "AdamW"),
        (TRL + "optim: sgd\noptim_args: nesterov=True\n", "optim_args", "sgd_momentum"),
        (TRL + "optim_args: [1]\n", "optim_args", "adam_beta1"),
        (TRL + "lr_scheduler_type: cosine\nlr_scheduler_kwargs: {num_cycles: 2}\n",
         "lr_scheduler_kwargs", "num_cycles of the schedule cosine"),
        (TRL + "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1e-6}\n",
         "lr_scheduler_kwargs", "learning_rate is not given"),
        (TRL + "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr_rate: 0}\n",
         "lr_scheduler_kwargs", "min_lr_rate cannot be 0"),
        (TRL + "lr_scheduler_kwargs: none at all\n", "lr_scheduler_kwargs", "not a mapping"),
        (AXOLOTL + "lr_scheduler: linear\ncosine_min_lr_ratio: 0.1\n", "cosine_min_lr_ratio", "cosine"),
        (AXOLOTL + "lr_groups: everything\n", "lr_groups", "learning_rates"),
        (AXOLOTL + "embedding_lr: 1e-7\nlr_groups:\n  - {name: a, modules: [mlp], lr: 2e-5}\n",
         "lr_groups", "embedding_lr has already set"),
        (TRL + "fp16: true\n", "fp16", "float16"),
        (TRL + "frobnicate: 1\n", "frobnicate", "no key that is known of TRL"),
        (TRL + "max_length:\n", "max_length", "no limit"),
        (TRL + "learning_rate: {a: 1}\n", "learning_rate", "dict"),
        (TRL + "save_steps: 0.5\n", "save_steps", "share of the run"),
        (TRL + "model_revision: v2\n", "model_revision", "folder"),
        (AXOLOTL.replace("dpo", "ipo"), "rl", "ipo"),
        (AXOLOTL + "datasets:\n  - {path: a/b, shards: 4}\n", "datasets.shards", "not known"),
        (AXOLOTL + "trl: {beta: 0.1, num_generations: 4}\n", "trl.num_generations", "DPO"),
        (AXOLOTL + "dpo_beta: 0.1\nrl_beta: 0.2\n", "rl_beta", "dpo_beta has already set beta to 0.1"),
        (FULL + "dataset: a/b, c/d\nmax_samples: 90\n", "max_samples", "each source"),
    ],
)  # fmt: skip
def test_what_smoldpo_cannot_do_is_named(write, text, key, says):
    imported = write(text)
    if complaint("loss_type", "ipo") is None and key == "rl":
        pytest.skip("ipo is a loss of smoldpo's by now")
    entry = next(entry for entry in imported.entries if entry.key == key)
    assert entry.status == "unsupported" and says in entry.reason
    assert any(line.startswith(f"{key}: ") for line in imported.differences)


def test_llama_factorys_sft_term_is_rpos(write):
    imported = write(FULL + "dataset: a/b\npref_ftx: 0.5\n")
    assert imported.settings["rpo_alpha"] == 0.5 and fates(imported)["pref_ftx"] == "renamed"


def test_what_smoldpo_learns_later_is_kept(write, monkeypatch):
    """The configuration is asked, not a list of its losses and settings."""
    from pydantic import create_model

    text = TRL + "loss_type: apo_zero\nrpo_alpha: 0.5\nreference_free: true\n"
    before = write(text)
    assert before.settings["loss_type"] == ["apo_zero"] and before.settings["rpo_alpha"] == 0.5
    assert fates(before)["reference_free"] == "unsupported"
    later = create_model("TrainConfig", __base__=TrainConfig, reference_free=(bool, False))
    for module in ("account", "rules", "shared", "optimization", "importing"):
        monkeypatch.setattr(f"smoldpo.recipes.{module}.TrainConfig", later)
    monkeypatch.setattr(configuration, "TrainConfig", later)
    assert write(text).settings["reference_free"] is True


@pytest.mark.parametrize(
    "text, says",
    [
        ("stage: sft\nmodel_name_or_path: a/m\n", "supervised fine-tuning, not for DPO"),
        ("stage: kto\nmodel_name_or_path: a/m\n", "stage is kto: a recipe for KTO"),
        ("finetuning_type: lora\ncutoff_len: 5\n", "stage is not set: a recipe for supervised"),
        ("base_model: a/m\nmicro_batch_size: 1\n", "rl is not set"),
        ("base_model: a/m\nrl: grpo\n", "GRPO"),
        ("model_name_or_path: a/m\nbeta: 0.1\nnum_generations: 8\n", "GRPO.*num_generations"),
        ("model_name_or_path: a/m\ndataset_splits: [a]\npacking: true\n", "supervised"),
        ("model_name_or_path: a/m\nbeta: 0.1\noutput_dir: out/m-kto\n", "KTO"),
        ("model_name_or_path: a/m\ndataset_name: imdb\n", "--from trl"),
        ("lr: 3\n", "--from"),
        ("model: builtin\nbeta: 0.2\n", "a smoldpo configuration already"),
        ("", "is empty"),
        ("- 1\n", "holds list"),
        ("a: [1\nb: 2\n", "row 2: not valid YAML"),
        ("a: 2024-13-45\n", "not valid YAML"),
        ("a: " + "[" * 3000 + "\n", "not valid YAML"),
        ("--- 1\n--- 2\n", "not valid YAML"),
        ("a: &a [x]\nb: [*a, *a]\n", "uses YAML aliases"),
        ("a: &a [*a]\n", "uses YAML aliases"),
    ],
)  # fmt: skip
def test_what_is_something_else_is_refused(write, text, says, cli, tmp_path):
    with pytest.raises(UsageError, match=says):
        write(text)
    result = cli("config", "import", "recipe.yaml", "--out", "mine.yaml")
    assert result.code == 2 and "recipe.yaml" in result.err
    assert not (tmp_path / "mine.yaml").exists()


def test_from_settles_what_the_keys_leave_open(write):
    text = "model_name_or_path: a/m\ndataset_name: a/pairs\n"
    assert write(text, "trl").dialect == "trl"
    assert write(text, name="trl-dpo.yaml").dialect == "trl", "its own name says it"
    with pytest.raises(UsageError, match="GRPO"):
        write(text + "num_generations: 4\n", "trl")


@pytest.mark.parametrize(
    "text, says",
    [
        (FULL + "dataset: a/b\npref_beta: -1\n", r"pref_beta \(beta is -1: "),
        (AXOLOTL + "num_epochs: many\n", r"num_epochs \(num_train_epochs is 'many': "),
        (TRL + "seed: -3\n", "seed is -3"),
        (TRL + "max_length: 1\n", "max_length is 1"),
    ],
)
def test_impossible_values_are_named_by_the_recipes_key(write, text, says, tmp_path):
    with pytest.raises(ConfigError, match=says) as caught:
        write(text)
    assert str(tmp_path / "recipe.yaml") in str(caught.value)


EVALUATES = TRL + "eval_strategy: steps\neval_steps: 5\n"


@pytest.mark.parametrize(
    "text, expected",
    [
        (EVALUATES + "load_best_model_at_end: true\nearly_stopping_patience: 3\n",
         {"load_best_model_at_end": True, "early_stopping_patience": 3}),
        (EVALUATES + "load_best_model_at_end: true\nmetric_for_best_model: loss\ngreater_is_better: false\n",
         {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}),
        (EVALUATES + "load_best_model_at_end: true\nmetric_for_best_model: eval_rewards/accuracies\n"
         "greater_is_better: true\n",
         {"load_best_model_at_end": True, "metric_for_best_model": "eval_rewards/accuracies"}),
        (EVALUATES + "metric_for_best_model: rewards/margins\nload_best_model_at_end: false\n", {}),
        (AXOLOTL + "eval_strategy: steps\neval_steps: 5\nearly_stopping_patience: 2\n",
         {"early_stopping_patience": 2}),
        (FULL + "dataset: a/b\neval_strategy: steps\neval_steps: 5\nearly_stopping_steps: 4\n",
         {"early_stopping_patience": 4}),
        (TRL + "save_steps: 5\nsave_total_limit: 3\n", {"keep_checkpoints": 3}),
        (AXOLOTL + "save_total_limit: 1\n", {"keep_checkpoints": 1}),
        (TRL + "save_total_limit: 0\n", {}),
        (TRL + "save_total_limit:\n", {}),
    ],
)  # fmt: skip
def test_the_best_evaluation_and_the_checkpoints(write, text, expected):
    names = ("load_best_model_at_end", "early_stopping_patience", "metric_for_best_model")
    imported = write(text)
    found = {
        name: imported.settings[name]
        for name in (*names, "keep_checkpoints")
        if name in imported.settings
    }
    assert found == expected
    assert not {"unsupported"} & {fates(imported).get(key) for key in (*names, "greater_is_better")}


@pytest.mark.parametrize(
    "text, key, says",
    [
        (TRL + "load_best_model_at_end: true\n", "load_best_model_at_end", "eval_steps"),
        (TRL + "eval_strategy: epoch\nearly_stopping_patience: 3\n", "early_stopping_patience",
         "eval_steps"),
        (EVALUATES + "load_best_model_at_end: true\nmetric_for_best_model: bleu\n",
         "metric_for_best_model", "no such figure"),
        (EVALUATES + "load_best_model_at_end: true\ngreater_is_better: true\n", "greater_is_better",
         "lowest"),
        (EVALUATES + "load_best_model_at_end: true\nearly_stopping_threshold: 0.1\n",
         "early_stopping_threshold", "any amount"),
        (EVALUATES + "cpo_alpha: 1.0\nload_best_model_at_end: true\n"
         "metric_for_best_model: eval_rewards/accuracies\n", "metric_for_best_model", "no rewards"),
    ],
)  # fmt: skip
def test_a_best_evaluation_that_there_is_not(write, text, key, says):
    imported = write(text)
    assert fates(imported)[key] == "unsupported" and says in reasons(imported)[key]


def test_loggers_are_left_to_whoever_trains(write):
    imported = write(TRL + "report_to: [wandb, tensorboard]\n")
    assert fates(imported)["report_to"] == "dropped" and "report_to" not in imported.settings
    assert "--report-to wandb,tensorboard" in reasons(imported)["report_to"]
    for other in ("none", "all", "[swanlab]", "[1]"):
        assert "--report-to" not in reasons(write(TRL + f"report_to: {other}\n"))["report_to"]


def test_weights_in_the_two_senses(write):
    shares = "model_name_or_path: a/m\nbeta: 0.1\ndataset_mixer:\n  a/one: {}\n  b/two: {}\n"
    whole = write(shares.format("1.0", "1.0"))
    assert "data_weights" not in whole.settings, "all of both is no mix by weight"
    assert not any("weight" in line for line in whole.differences)
    parts = write(shares.format("0.5", "0.25"))
    assert parts.settings["data_weights"] == [0.5, 0.25]
    assert any("shares of the mix" in line for line in parts.differences)
    left = write(shares.format("0", "0.25"))
    assert left.settings["data"] == ["b/two"]
    assert any("max_train_samples" in line for line in left.differences)
    mixture = "datasets:\n  - {path: a/one, fraction: 0.5}\n  - {path: b/two, fraction: 0.5}\n"
    exact = write("model_name_or_path: a/m\nbeta: 0.1\n" + mixture)
    assert exact.settings["data_weights"] == [0.5, 0.5]
    assert not any("shares of the mix" in line for line in exact.differences), "TRL's are ours"


def test_values_cannot_leave_the_comment_or_the_line(write):
    imported = write(TRL + 'frobnicate: "a\\nbeta: 9"\nloss_type: "x\\nbeta: 8"\n')
    text = imported.as_yaml()
    assert yaml.safe_load(text)["beta"] == 0.1
    assert "x\\nbeta" in text
    odd = write(TRL, name="a\nbeta: 7 #.yaml")
    assert yaml.safe_load(odd.as_yaml())["beta"] == 0.1
    mixture = 'datasets: [{path: "a\\nbeta: 6 #", split: x}, {path: b/c, split: y}]\n'
    files = write(TRL + mixture)
    assert len(files.commands) == 2 and yaml.safe_load(files.as_yaml())["beta"] == 0.1


def test_values_cannot_move_the_cursor(cli, tmp_path):
    text = TRL + 'frob: "\\e[2J"\n"k\\e[2J": 1\noutput_dir: "\\e[2J"\n'
    (tmp_path / "recipe.yaml").write_text(text)
    result = cli("config", "import", "recipe.yaml", "--out", "mine.yaml")
    assert result.code == 0 and "frob" in result.out
    assert "\x1b" not in result.out + (tmp_path / "mine.yaml").read_text()


def test_the_command_prints_the_account(cli):
    result = cli("config", "import", FOLDER / "axolotl.yaml")
    assert result.code == 0
    assert yaml.safe_load(result.out)["beta"] == 0.25, "the configuration alone, for > mine.yaml"
    assert "What differs from the recipe's run:" in result.err
    assert re.search(r"micro_batch_size .* renamed .* per_device_train_batch_size: 2", result.err)
    result = cli("config", "import", FOLDER / "handbook-apo.yaml", "--out", "mine.yaml")
    assert "smoldpo train mine.yaml" in result.out and "Run first:" in result.out
    assert (
        "talk-Preference-mixture_think.jsonl --subset Preference --split mixture_think\n"
        in result.out
    )


def test_json(cli):
    result = cli("config", "import", FOLDER / "trl.yaml", "--json")
    said = json.loads(result.out)
    assert said["from"] == "trl" and said["config"]["beta"] == 0.2
    assert sum(said["counts"].values()) == len(said["keys"])
    assert {"key", "value", "status", "becomes", "reason", "matters"} == set(said["keys"][0])


def test_files_are_not_lost(cli, tmp_path):
    (tmp_path / "mine.yaml").write_text("mine")
    result = cli("config", "import", FOLDER / "trl.yaml", "--out", "mine.yaml")
    assert result.code == 2 and "--overwrite" in result.err
    assert (tmp_path / "mine.yaml").read_text() == "mine"
    assert (
        cli("config", "import", FOLDER / "trl.yaml", "--out", "mine.yaml", "--overwrite").code == 0
    )
    result = cli("config", "import", FOLDER / "trl.yaml", "--from", "axolotle")
    assert result.code == 2 and "did you mean axolotl" in result.err
    assert cli("config", "import", "none.yaml").code == 2


def test_an_imported_recipe_trains(cli, pairs_file, tiny_folder, tmp_path):
    """Its data and model replaced, as whoever has neither the hub nor a large GPU would do."""
    text = (FOLDER / "handbook-mixer.yaml").read_text()
    (tmp_path / "small.yaml").write_text(text)
    assert cli("config", "import", "small.yaml", "--out", "mine.yaml").code == 0
    result = cli(
        "train", "mine.yaml", "--model", tiny_folder, "--data", pairs_file, "--data-split", "none",
        "--max-steps", 2, "--max-new-tokens", 2, "--output-dir", "run",
    )  # fmt: skip
    assert result.code == 0, result.err
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert max(line.get("step", 0) for line in steps) == 2
    assert config_from_arguments(["run/config.yaml"]).beta == 0.3


SECTIONS = {
    "## TRL": "trl",
    "## The alignment handbook": "alignment-handbook",
    "## axolotl": "axolotl",
    "## LLaMA-Factory": "llama-factory",
}


@pytest.mark.parametrize("title, name", SECTIONS.items())
def test_the_docs_tables_are_true(title, name):
    """Each key in them has a rule, or stands in the module's groups; each setting exists."""
    text = (ROOT / "docs" / "recipes.md").read_text()
    section = text.partition(f"\n{title}\n")[2].partition("\n## ")[0]
    assert f"`--from {name}`" in section
    module = DIALECTS[name].module
    grouped = "".join(
        (ROOT / "smoldpo" / "recipes" / file).read_text()
        for file in (
            "shared.py",
            "optimization.py",
            "trl.py",
            f"{module.__name__.rpartition('.')[2]}.py",
        )
    )
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| `")]
    assert len(rows) >= 3
    for keys, becomes in rows:
        for key in re.findall(r"`([^`]+)`", keys):
            assert find(module.RULES, key) or f'"{key}"' in grouped, key
        for setting in re.findall(r"`([^`]+)`", becomes):
            assert setting in TrainConfig.model_fields, setting


# ORPO, CPO and SimPO


def loss_of(imported) -> dict:
    names = ("loss_type", "loss_weights", "beta", "simpo_gamma", "cpo_alpha", "label_smoothing")
    return {name: imported.settings[name] for name in names if name in imported.settings}


@pytest.mark.parametrize(
    "name, expected, differs",
    [
        ("handbook-orpo", {"loss_type": ["orpo"], "beta": 0.05}, "prompt's tokens"),
        ("handbook-simpo", {"loss_type": ["simpo"], "beta": 2.5, "simpo_gamma": 1.0}, None),
        (
            "trl-cpo",
            {"loss_type": ["cpo"], "beta": 0.15, "cpo_alpha": 0.8, "label_smoothing": 0.1},
            None,
        ),
        (
            "axolotl-simpo",
            {"loss_type": ["simpo", "sft"], "loss_weights": [1.0, 0.05], "beta": 2.2}
            | {"simpo_gamma": 1.1},
            None,
        ),
        ("llama-factory-orpo", {"loss_type": ["orpo"], "beta": 0.2}, "LLaMA-Factory's ORPO weighs"),
    ],
)
def test_losses_without_a_reference(name, expected, differs):
    imported = import_recipe(FOLDER / f"{name}.yaml")
    assert loss_of(imported) == expected
    told = [line for line in imported.differences if "likelihood" in line or "ORPO" in line]
    assert [differs in line for line in told] == [True] if differs else told == []
    assert "reference" not in imported.settings


CPO = "model_name_or_path: a/m\ndataset_name: a/p\ncpo_alpha: {}\n"


@pytest.mark.parametrize(
    "text, dialect, expected",
    [
        (CPO.format("0.0") + "loss_type: simpo\nsimpo_gamma: 0.9\n", None,
         {"loss_type": ["simpo"], "simpo_gamma": 0.9}),
        (CPO.format("0.3") + "loss_type: [simpo]\n", None,
         {"loss_type": ["simpo", "sft"], "loss_weights": [1.0, 0.3]}),
        # TRL's own default adds the likelihood with weight 1.
        (TRL + "loss_type: simpo\n", None,
         {"loss_type": ["simpo", "sft"], "loss_weights": [1.0, 1.0], "beta": 0.1}),
        (CPO.format("0.3"), None, {"loss_type": ["cpo"], "cpo_alpha": 0.3}),
        (CPO.format("0.3") + "simpo_gamma: 2\n", None, {"loss_type": ["cpo"], "cpo_alpha": 0.3}),
        (TRL + "output_dir: out/tiny-orpo\n", "trl", {"loss_type": ["orpo"], "beta": 0.1}),
        (TRL + "output_dir: out/tiny-orpo-then-dpo\n", None, {"beta": 0.1}),
        (TRL + "gamma_beta_ratio:\nsft_weight: 0.2\n", None,
         {"loss_type": ["simpo", "sft"], "loss_weights": [1.0, 0.2], "beta": 0.1}),
        ("model_name_or_path: a/m\ndataset_name: a/p\nsft_weight: 0\n", None,
         {"loss_type": ["simpo"], "beta": 2.0, "simpo_gamma": 0.5}),
        (AXOLOTL.replace("dpo", "orpo") + "orpo_alpha: 0.3\n", None,
         {"loss_type": ["orpo"], "beta": 0.3}),
        (AXOLOTL.replace("dpo", "orpo") + "orpo_alpha: 0.3\nrl_beta: 0.4\n", None,
         {"loss_type": ["orpo"], "beta": 0.4}),
        (AXOLOTL.replace("dpo", "cpo") + "cpo_alpha: 0.5\n", None,
         {"loss_type": ["cpo"], "cpo_alpha": 0.5}),
        (AXOLOTL.replace("dpo", "ipo") + "cpo_alpha:\n", None, {"loss_type": ["ipo"]}),
        (FULL + "dataset: a/b\npref_loss: simpo\nsimpo_gamma: 1.2\npref_beta: 2\n", None,
         {"loss_type": ["simpo"], "simpo_gamma": 1.2, "beta": 2.0}),
        (FULL + "dataset: a/b\npref_loss: simpo\npref_ftx: 0.1\n", None, {"loss_type": ["simpo"]}),
    ],
)  # fmt: skip
def test_how_they_are_said(write, text, dialect, expected):
    assert loss_of(write(text, dialect)) == expected


@pytest.mark.parametrize(
    "text, key, says",
    [
        (CPO.format("1.0") + "loss_type: hinge\n", "loss_type", "CPO with the loss hinge"),
        (CPO.format("1.0") + "alpha: 0.5\n", "alpha", "AlphaPO"),
        (TRL + "gamma_beta_ratio: 0.3\nloss_type: hinge\n", "loss_type", "SimPO with the loss hinge"),
        (FULL + "dataset: a/b\npref_loss: orpo\npref_ftx: 0.5\n", "pref_ftx", "already"),
        (FULL + "dataset: a/b\npref_loss: simpo\nld_alpha: 0.5\n", "ld_alpha", "longer answers"),
    ],
)  # fmt: skip
def test_what_they_ask_for_in_vain(write, text, key, says):
    imported = write(text)
    entry = next(entry for entry in imported.entries if entry.key == key)
    assert entry.status == "unsupported" and says in entry.reason
    assert set(imported.settings["loss_type"]) & {"cpo", "simpo", "orpo"}


@pytest.fixture
def place(tmp_path):
    """Import a recipe that lies in a folder of that name."""

    def run(folder: str, text: str, dialect: str | None = None):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "recipe.yaml").write_text(text)
        return import_recipe(tmp_path / folder / "recipe.yaml", dialect)

    return run


@pytest.mark.parametrize("dialect", [None, "trl", "alignment-handbook"])
@pytest.mark.parametrize(
    "text, expected",
    [
        ("loss_type: ipo\nprecompute_ref_log_probs: true\n", {"loss_type": ["ipo"], "beta": 0.1}),
        ("loss_type: robust\nlabel_smoothing: 0.1\n",
         {"loss_type": ["robust"], "beta": 0.1, "label_smoothing": 0.1}),
        ("loss_type: [sigmoid, hinge]\n", {"loss_type": ["sigmoid", "hinge"], "beta": 0.1}),
        ("rpo_alpha: 0.5\noutput_dir: out/orpo-data\n", {"beta": 0.1}),
        ("ld_alpha: 0.5\n", {"beta": 0.1}),
        ("f_divergence_type: forward_kl\n", {"beta": 0.1}),
        ("sync_ref_model: true\n", {"beta": 0.1}),
        ("use_weighting: true\n", {"beta": 0.1}),
        ("reference_free: true\n", {"beta": 0.1}),
        ("", {"loss_type": ["orpo"], "beta": 0.1}),
        ("precompute_ref_log_probs:\n", {"loss_type": ["orpo"], "beta": 0.1}),
        ("output_dir: out/dpo\n", {"beta": 0.1}),
        ("loss_type: []\n", {"loss_type": ["orpo"], "beta": 0.1}),
    ],
)  # fmt: skip
def test_keys_of_a_reference_win_over_a_folders_name(place, text, expected, dialect):
    assert loss_of(place("orpo", TRL + text, dialect)) == expected


@pytest.mark.parametrize("key", ["precompute_ref_log_probs: true", "sync_ref_model: true"])
def test_names_win_over_keys_that_ktos_trainer_has_too(place, key):
    with pytest.raises(UsageError, match="KTO"):
        place("plain", TRL + f"{key}\noutput_dir: out/m-kto\n")


def test_orpo_has_no_other_loss(place):
    imported = place("orpo", TRL + "loss_type: ipo\n")
    assert fates(imported)["loss_type"] == "unsupported"
    assert "ORPO with the loss ipo" in reasons(imported)["loss_type"]
    assert imported.settings["loss_type"] == ["orpo"]
    assert any("prompt's tokens" in line for line in imported.differences)
    assert fates(place("mine", TRL + "loss_type: orpo\n"))["loss_type"] == "kept"


def test_keys_of_a_reference_that_moves_do_not_fail_a_loss_without_one(write):
    orpo = AXOLOTL.replace("dpo", "orpo") + "sync_ref_model: true\nref_model_mixup_alpha: 0.9\n"
    seen = fates(write(orpo))
    assert seen["sync_ref_model"] == seen["ref_model_mixup_alpha"] == "dropped"


def test_lengths_do_not_fail_simpo_by_cpos_trainer(write):
    imported = write(CPO.format("0.0") + "loss_type: simpo\nld_alpha: 0.5\n")
    assert fates(imported)["ld_alpha"] == "unsupported"
    assert loss_of(imported) == {"loss_type": ["simpo"]}
    assert write(CPO.format("0.5") + "ld_alpha: 0.5\n").config.ld_alpha == 0.5


def test_lengths_and_weights_are_kept(write):
    imported = write(TRL + "ld_alpha: 0.4\nuse_weighting: true\n")
    assert imported.config.ld_alpha == 0.4 and imported.config.use_weighting
    assert {fates(imported)[key] for key in ("ld_alpha", "use_weighting")} == {"kept"}
    off = write(TRL + "ld_alpha: 1.0\nuse_weighting: false\n")
    assert not {"ld_alpha", "use_weighting"} & set(off.settings)
    assert write(AXOLOTL + "dpo_use_weighting: true\n").config.use_weighting
    factory = write(FULL + "dataset: a/b\nld_alpha: 0.4\n")
    assert factory.config.ld_alpha == 0.4
    assert any("policy alone" in line for line in factory.differences)
    assert not write(FULL + "dataset: a/b\nld_alpha: 1.0\n").settings.get("ld_alpha")


def test_every_option_of_orpos_and_cpos_configs_is_known(write):
    pytest.importorskip("trl")
    from trl.experimental.cpo import CPOConfig
    from trl.experimental.orpo import ORPOConfig

    for kind, word in ((CPOConfig, "cpo"), (ORPOConfig, "orpo")):
        names = sorted(field.name for field in dataclasses.fields(kind))
        text = TRL + "".join(f"{name}:\n" for name in names if f"{name}:" not in TRL)
        imported = write(text.replace("output_dir:\n", f"output_dir: a-{word}\n"), "trl")
        assert imported.settings["loss_type"] == [word]
        unknown = [key for key, why in reasons(imported).items() if "no key that is known" in why]
        assert not unknown, kind


def test_defaults_of_cpo_and_orpo_are_ours_or_written():
    pytest.importorskip("trl")
    from trl.experimental.cpo import CPOConfig
    from trl.experimental.orpo import ORPOConfig

    ours = {name: field.default for name, field in TrainConfig.model_fields.items()}
    real = CPOConfig(output_dir="none", bf16=False)
    for name in ("beta", "label_smoothing", "cpo_alpha", "simpo_gamma"):
        assert getattr(real, name) == ours[name], name
    assert ORPOConfig(output_dir="none", bf16=False).beta == ours["beta"]


def test_an_imported_recipe_without_a_reference_trains(cli, pairs_file, tiny_folder, tmp_path):
    (tmp_path / "r.yaml").write_text((FOLDER / "axolotl-simpo.yaml").read_text())
    assert cli("config", "import", "r.yaml", "--out", "mine.yaml").code == 0
    result = cli(
        "train", "mine.yaml", "--model", tiny_folder, "--data", pairs_file, "--max-steps", 1,
        "--max-new-tokens", 2, "--data-split", "none", "--output-dir", "run",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert config_from_arguments(["run/config.yaml"]).loss_weights == [1.0, 0.05]
