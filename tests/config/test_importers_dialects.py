"""Whole recipes of each dialect, what its tool does untold, and the tables of docs/recipes.md."""

import ast
import dataclasses
import re

import pytest

from conftest import ROOT
from recipe_texts import FOLDER, TRL, fates, reasons
from smoldpo.config.importers import DIALECTS, import_recipe
from smoldpo.config.importers.mapping import find
from smoldpo.config.schema import TrainConfig


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
    defaults = DIALECTS["trl"].defaults
    real = trl.DPOConfig(output_dir="none", bf16=False)
    theirs = {name: getattr(real, name) for name in defaults if hasattr(real, name)}
    theirs["lr_scheduler_type"] = real.lr_scheduler_type.value
    theirs["warmup_ratio"] = float(real.warmup_steps)
    assert theirs == defaults
    for name in ("beta", "max_length", "weight_decay", "adam_beta2", "max_grad_norm", "seed"):
        assert TrainConfig.model_fields[name].default == getattr(real, name), name


def test_every_option_of_trls_command_is_known(write):
    trl = pytest.importorskip("trl")
    kinds = (trl.DPOConfig, trl.ScriptArguments, trl.ModelConfig)
    names = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    imported = write(TRL + "".join(f"{name}:\n" for name in sorted(names) if f"{name}:" not in TRL))
    unknown = [key for key, why in reasons(imported).items() if "no key that is known" in why]
    assert not unknown


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


SECTIONS = {
    "## TRL": "trl",
    "## The alignment handbook": "alignment-handbook",
    "## axolotl": "axolotl",
    "## LLaMA-Factory": "llama-factory",
}


def test_what_the_chat_template_reads_is_carried_over(tmp_path):
    def settings(recipe, dialect):
        path = tmp_path / "recipe.yaml"
        path.write_text(recipe)
        return import_recipe(path, dialect).settings

    kwargs = {"chat_template_kwargs": {"enable_thinking": False}}
    common = "model_name_or_path: m\n"
    found = settings(common + "stage: dpo\ndataset: d\nenable_thinking: false\n", "llama-factory")
    assert found.items() >= kwargs.items()
    axolotl = "base_model: m\nrl: dpo\ndatasets: [{path: d.jsonl, type: chatml.intel}]\n"
    found = settings(
        axolotl
        + "chat_template_jinja: mine.jinja\nchat_template_kwargs: {enable_thinking: false}\n",
        "axolotl",
    )
    assert found.items() >= (kwargs | {"chat_template": "mine.jinja"}).items()
    found = settings(common + "dataset_name: d\nchat_template_path: mine.jinja\n", "trl")
    assert found["chat_template"] == "mine.jinja"
    found = settings(common + "dataset_name: d\nchat_template_path: some/model\n", "trl")
    assert "chat_template" not in found


@pytest.mark.parametrize("title, name", SECTIONS.items())
def test_the_docs_tables_are_true(title, name):
    """Each key in them has a rule, or stands in the steps of its dialect; each setting exists."""
    text = (ROOT / "docs" / "recipes.md").read_text()
    section = text.partition(f"\n{title}\n")[2].partition("\n## ")[0]
    assert f"`--from {name}`" in section
    own = {"alignment-handbook": "trl"}.get(name, name.replace("-", "_"))
    folder = ROOT / "smoldpo" / "config" / "importers"
    in_steps = {
        word
        for file in ("hf_trainer", "optimizers", "adapters", "trl", own)
        for node in ast.walk(ast.parse((folder / f"{file}.py").read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for word in node.value.split()
    }
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| `")]
    assert len(rows) >= 3
    for keys, becomes in rows:
        for key in re.findall(r"`([^`]+)`", keys):
            assert find(DIALECTS[name].rules, key) or key in in_steps, key
        for setting in re.findall(r"`([^`]+)`", becomes):
            assert setting in TrainConfig.model_fields, setting
