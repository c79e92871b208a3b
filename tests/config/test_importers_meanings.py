"""What single keys become: each meaning kept, or its loss said."""

import pytest

from recipe_texts import AXOLOTL, FULL, TRL, fates, reasons
from smoldpo.config.importers.mapping import complaint
from smoldpo.config.schema import TrainConfig


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
        (AXOLOTL + "val_set_size: 0.1\neval_steps: 5\n", {"eval_fraction": 0.1, "eval_steps": 5}),
        (AXOLOTL + "val_set_size: 0.1\neval_steps: 5\neval_strategy: epoch\n",
         {"eval_fraction": 0.1}),
        (AXOLOTL + "val_set_size: 0\neval_steps: 5\n", {}),
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
         {"lr_scheduler_type": "warmup_stable_decay", "lr_decay_steps": 9,
          "lr_decay_type": "linear"}),
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
        (AXOLOTL + "lr_scheduler: linear\ncosine_min_lr_ratio: 0.1\n", "cosine_min_lr_ratio",
         "cosine"),
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
        (AXOLOTL + "dpo_beta: 0.1\nrl_beta: 0.2\n", "rl_beta",
         "dpo_beta has already set beta to 0.1"),
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
    for module in ("mapping", "load"):
        monkeypatch.setattr(f"smoldpo.config.importers.{module}.TrainConfig", later)
    monkeypatch.setattr("smoldpo.config.load.TrainConfig", later)
    assert write(text).settings["reference_free"] is True


EVALUATES = TRL + "eval_strategy: steps\neval_steps: 5\n"


@pytest.mark.parametrize(
    "text, expected",
    [
        (EVALUATES + "load_best_model_at_end: true\nearly_stopping_patience: 3\n",
         {"load_best_model_at_end": True, "early_stopping_patience": 3}),
        (EVALUATES + "load_best_model_at_end: true\nmetric_for_best_model: loss\n"
         "greater_is_better: false\n",
         {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}),
        (EVALUATES + "load_best_model_at_end: true\n"
         "metric_for_best_model: eval_rewards/accuracies\ngreater_is_better: true\n",
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
