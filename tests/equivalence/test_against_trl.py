"""TRL's DPOTrainer as an oracle. benchmarks/compare_with_trl.py is the same on any number of
pairs.
"""

import sys

import pytest

from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import compare_with_trl as compare
from smoldpo.config.load import build_config


def test_ten_losses_equal_trls_on_a_tiny_model(tiny_folder, pairs_file):
    source = compare.find_model(str(tiny_folder))
    pairs = compare.read_pairs(str(pairs_file), source, 40, 512)
    config = compare.settings(40, 10, 2).model_copy(update={"learning_rate": 1e-3})
    ours = compare.our_losses(source, pairs, config)
    theirs = compare.trl_losses(source, pairs, config)
    assert len(ours) == 10 and len(set(ours)) > 5, "ten different losses, or nothing is compared"
    assert ours == pytest.approx(theirs, rel=1e-4)


LOSSES = {  # the value and gradient of each loss of TRL: losses/test_losses.py
    "sigmoid": {},
    "sigmoid_norm": {"beta": 5.0},
    "ipo": {},
    "aot": {"beta": 3.0},
    "aot_unpaired": {"beta": 3.0},
    "apo_zero": {},
    "sft": {},
    "sigmoid,sft": {"loss_weights": [1.0, 0.3]},
    "apo_zero,sft": {},
    "sigmoid,bco_pair,sft": {"loss_weights": [0.8, 0.2, 1.0]},
    "sigmoid with js": {"f_divergence_type": "js_divergence"},
    "sigmoid with alpha": {
        "f_divergence_type": "alpha_divergence",
        "f_alpha_divergence_coef": 0.3,
    },
    "sigmoid with lengths": {"ld_alpha": 0.3},
    "sigmoid_norm with lengths": {"ld_alpha": 0.0, "beta": 5.0},
    "aot with lengths": {"ld_alpha": 0.5, "beta": 3.0},
    "sigmoid,sft with lengths": {"ld_alpha": 0.5},
    "sigmoid with weights": {"use_weighting": True},
    "sigmoid,bco_pair with weights": {"use_weighting": True, "loss_weights": [0.8, 0.2]},
    "ipo with both": {"use_weighting": True, "ld_alpha": 0.2},
}


def test_what_is_reported_with_lengths_is_what_trl_reports(tiny_folder, pairs_file):
    """logps, rewards, accuracies and margins are of the log-probabilities that the loss
    compares.
    """
    source = compare.find_model(str(tiny_folder))
    pairs = compare.read_pairs(str(pairs_file), source, 24, 512)
    said = {}
    for ld_alpha in (0.0, None):
        config = build_config(
            {"max_steps": 3, "warmup_steps": 0, "per_device_train_batch_size": 8}
            | {"gradient_accumulation_steps": 1, "learning_rate": 1e-3, "dtype": "float32"}
            | {"ld_alpha": ld_alpha}
        )
        ours = compare.our_metrics(source, pairs, config, micro_batch=3)
        theirs = compare.trl_metrics(source, pairs, config)
        for name in ("logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected"):
            found, expected = ([row[name] for row in rows] for rows in (ours, theirs))
            # TRL rounds what it logs, and has float32 sums of its own.
            assert found == pytest.approx(expected, rel=1e-3, abs=2e-5), name
            said[name, ld_alpha] = found
        for our, their in zip(ours[1:], theirs[1:], strict=True):  # at first all rewards tie
            assert our["rewards/accuracies"] == their["rewards/accuracies"]
    assert said["logps/chosen", 0.0] != said["logps/chosen", None]


@pytest.mark.parametrize("names", LOSSES)
def test_three_steps_of_every_loss_equal_trls(names, tiny_folder, write_rows):
    """TRL has each step of eight pairs in one batch; ours is cut into micro-batches of three."""
    # Answers much alike: their order by log-probability changes, which is what aot is about.
    file = write_rows(
        [
            {"prompt": f"Number {n}?", "chosen": f"yes {n} {n * 7 % 10}", "rejected": f"no {n}"}
            for n in range(24)
        ]
    )
    source = compare.find_model(str(tiny_folder))
    pairs = compare.read_pairs(str(file), source, 24, 512)
    config = build_config(
        {"loss_type": names.split(" with ")[0], "max_steps": 3, "warmup_steps": 0}
        | {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
        | {"learning_rate": 3e-4, "dtype": "float32", "num_train_epochs": 1}
        | LOSSES[names]
    )
    ours = compare.our_losses(source, pairs, config, micro_batch=3)
    theirs = compare.trl_losses(source, pairs, config)
    worst = max(abs(our / their - 1) for our, their in zip(ours, theirs, strict=True))
    print(f"{names}: {ours}, largest relative difference {worst:.1e}")
    assert len(set(ours)) == 3
    assert ours == pytest.approx(theirs, rel=1e-5)


TRAINING = {
    "sgd": {"optim": "sgd", "learning_rate": 1.0},
    "sgd with momentum": {"optim": "sgd", "learning_rate": 1.0, "sgd_momentum": 0.9},
    "adafactor": {"optim": "adafactor"},
    "decay": {"weight_decay": 0.5, "learning_rate": 1e-2},
    "cosine_with_min_lr": {"lr_scheduler_type": "cosine_with_min_lr", "min_lr_rate": 0.4},
    "wsd": {"lr_scheduler_type": "warmup_stable_decay", "lr_decay_ratio": 0.5},
    "wsd, linear": {
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_decay_steps": 3,
        "lr_decay_type": "linear",
        "min_lr_rate": 0.2,
    },
    "moving reference": {
        "sync_ref_model": True,
        "ref_model_sync_steps": 2,
        "ref_model_mixup_alpha": 0.6,
    },
    "copied reference": {
        "sync_ref_model": True,
        "ref_model_sync_steps": 3,
        "ref_model_mixup_alpha": 1.0,
    },
}


@pytest.mark.parametrize("name", TRAINING)
def test_six_steps_of_every_optimizer_schedule_and_moving_reference_equal_trls(
    name, tiny_folder, pairs_file
):
    source = compare.find_model(str(tiny_folder))
    pairs = compare.read_pairs(str(pairs_file), source, 24, 512)
    config = build_config(
        {"max_steps": 6, "warmup_steps": 1, "num_train_epochs": 1, "learning_rate": 3e-3}
        | {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "dtype": "float32"}
        | TRAINING[name]
    )
    ours = compare.our_losses(source, pairs, config, micro_batch=3)
    theirs = compare.trl_losses(source, pairs, config)
    assert len({round(loss, 4) for loss in ours}) >= 4, "the steps differ"
    assert ours == pytest.approx(theirs, rel=2e-5)
    assert ours != pytest.approx(usual_losses(tiny_folder, pairs_file), rel=1e-3)


USUAL = []


def usual_losses(folder, file):
    """Of six steps as they are without any of these settings."""
    if not USUAL:
        plain = {"max_steps": 6, "warmup_steps": 1, "num_train_epochs": 1, "learning_rate": 3e-3}
        plain |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
        source = compare.find_model(str(folder))
        pairs = compare.read_pairs(str(file), source, 24, 512)
        config = build_config(plain | {"dtype": "float32"})
        USUAL.extend(compare.our_losses(source, pairs, config))
    return USUAL


@pytest.mark.real
def test_log_probabilities_of_real_pairs(real, shared):
    pairs = compare.read_pairs(str(shared / "hh_helpful_dev.jsonl"), real, 2, 64)
    assert compare.logps_difference(real, pairs) < 1e-4


@pytest.mark.real
def test_losses_of_real_weights_equal_trls(real, shared, monkeypatch):
    """Of the model's lowest six layers, its embeddings and its head: two trainings of all thirty
    would take most of their time for AdamW.
    """
    load = compare.load_model

    def lowest_layers(source, dtype):
        model = load(source, dtype)
        model.model.layers, model.config.num_hidden_layers = model.model.layers[:6], 6
        return model

    monkeypatch.setattr(compare, "load_model", lowest_layers)
    pairs = compare.read_pairs(str(shared / "hh_helpful_dev.jsonl"), real, 2, 48)
    config = compare.settings(2, 2, 1).model_copy(update={"warmup_steps": 0})
    ours = compare.our_losses(real, pairs, config)
    theirs = compare.trl_losses(real, pairs, config)
    assert ours[0] != ours[1]
    assert ours == pytest.approx(theirs, rel=1e-4)
