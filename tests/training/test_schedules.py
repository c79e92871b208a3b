"""Schedules against transformers' own of the same names, step by step."""

import pytest
import torch
import transformers

from smoldpo.config.load import build_config
from smoldpo.training.optim import decay_steps, learning_rate, warmup_steps
from smoldpo.utils.errors import ConfigError

PEAK = 1e-3
DECAYS = [("cosine", 0.0), ("cosine", 0.2), ("linear", 0.0), ("1-sqrt", 0.1)]


def rates(total, **settings):
    config = build_config({"learning_rate": PEAK} | settings)
    return [learning_rate(config, step, total) for step in range(total)], config


def theirs(name, total, warmup, **kwargs):
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=PEAK)
    schedule = transformers.get_scheduler(
        name, optimizer, num_warmup_steps=warmup, num_training_steps=total,
        scheduler_specific_kwargs=kwargs,
    )  # fmt: skip
    found = []
    for _ in range(total):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 3, 20])
def test_plain_schedules(name, warmup):
    found, _ = rates(20, lr_scheduler_type=name, warmup_steps=warmup)
    other = "constant_with_warmup" if name == "constant" else name
    assert found == pytest.approx(theirs(other, 20, warmup), abs=1e-15)


@pytest.mark.parametrize("warmup", [0, 3, 20])
@pytest.mark.parametrize("low", [None, 0.1, 0.7])
def test_cosine_with_a_lowest_rate(warmup, low):
    name = "cosine_with_min_lr"
    found, _ = rates(20, lr_scheduler_type=name, warmup_steps=warmup, min_lr_rate=low)
    expected = theirs(name, 20, warmup, min_lr_rate=low or 0.1)
    assert found == pytest.approx(expected, abs=1e-15)
    if warmup < 20:
        assert PEAK * (low or 0.1) < min(found[warmup:]) < PEAK * (low or 0.1) + 0.1 * PEAK


@pytest.mark.parametrize("warmup", [0, 3, 18])
@pytest.mark.parametrize("decay", [1, 5, 17])
@pytest.mark.parametrize("kind, low", DECAYS)
def test_warmup_stable_decay(warmup, decay, kind, low):
    name = "warmup_stable_decay"
    found, config = rates(
        20, lr_scheduler_type=name, warmup_steps=warmup, lr_decay_steps=decay,
        lr_decay_type=kind, min_lr_rate=low or None,
    )  # fmt: skip
    at_most = min(decay, 20 - warmup)
    assert decay_steps(config, 20) == at_most
    expected = theirs(name, 20, warmup, num_decay_steps=at_most, decay_type=kind, min_lr_ratio=low)
    assert found == pytest.approx(expected, abs=1e-15)


def test_shares_of_the_steps():
    config = build_config({"lr_scheduler_type": "warmup_stable_decay", "lr_decay_ratio": 0.25})
    assert warmup_steps(config, 30) == 3 and decay_steps(config, 30) == 8
    found = [learning_rate(config, step, 30) / config.learning_rate for step in range(30)]
    assert found[3:23] == [1.0] * 20 and found[23] < 1.0001 and found[-1] < 0.05


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"min_lr_rate": 0.2}, "min_lr_rate is read by cosine_with_min_lr and warmup_stable_decay"),
        ({"lr_decay_ratio": 0.3}, "lr_decay_ratio is read by warmup_stable_decay, not by cosine"),
        (
            {"lr_decay_steps": 3, "lr_scheduler_type": "cosine_with_min_lr"},
            "lr_decay_steps is read",
        ),
        ({"lr_scheduler_type": "wsd"}, "lr_scheduler_type is 'wsd'"),
        ({"lr_scheduler_type": "cosine_with_min_lr", "min_lr_rate": 1.0}, "min_lr_rate is 1.0"),
    ],
)
def test_settings_that_a_schedule_does_not_read(settings, says):
    with pytest.raises(ConfigError, match=says):
        build_config(settings)
