"""The learning rate as a pure function of the step. No torch here."""

from __future__ import annotations

import math

from smoldpo.config import TrainConfig
from smoldpo.optim_settings import lowest_rate


def warmup_steps(config: TrainConfig, total: int) -> int:
    """Steps that warm up: as asked, else the asked share of all steps, rounded up.

    A share never takes every step: a run of one step would have a learning rate of 0.
    """
    if config.warmup_steps is not None:
        return config.warmup_steps
    return min(math.ceil(config.warmup_ratio * total), total - 1)


def decay_steps(config: TrainConfig, total: int) -> int:
    """Steps in which warmup_stable_decay decays: counted as warm-up's, at most those that it leaves."""
    asked = config.lr_decay_steps
    if asked is None:
        asked = math.ceil(config.lr_decay_ratio * total)
    return min(asked, max(0, total - warmup_steps(config, total)))


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """The rate of optimizer step `step` (from 0) of `total`.

    Equal to transformers' schedules of the same names (transformers/optimization.py): linear warm-up, then
    constant, linear to 0, half a cosine to 0 or to a lowest rate, or constant until a decay at the end. As
    there, the warm-up of warmup_stable_decay begins at its lowest rate, that of the others at 0.
    """
    warmup, low = warmup_steps(config, total), lowest_rate(config)
    kind = config.lr_scheduler_type
    if step < warmup:
        begin = low if kind == "warmup_stable_decay" else 0.0
        return config.learning_rate * _raised(step / max(1, warmup), begin)
    done = (step - warmup) / max(1, total - warmup)
    if kind == "constant":
        share = 1.0
    elif kind == "linear":
        share = max(0.0, 1.0 - done)
    elif kind in ("cosine", "cosine_with_min_lr"):
        share = _raised(_half_cosine(min(done, 1.0)), low)
    else:
        share = _raised(_decaying(config, step, total), low)
    return config.learning_rate * share


def _decaying(config: TrainConfig, step: int, total: int) -> float:
    """What is left of the rate at the end of warmup_stable_decay (Hu et al. 2024, arXiv 2404.06395)."""
    decay = decay_steps(config, total)
    done = min(1.0, (step - (total - decay)) / max(1, decay))
    if done <= 0:
        return 1.0
    if config.lr_decay_type == "linear":
        return 1.0 - done
    return 1.0 - math.sqrt(done) if config.lr_decay_type == "1-sqrt" else _half_cosine(done)


def _half_cosine(done: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * done))


def _raised(share: float, low: float) -> float:
    """A share of the way from `low` to 1."""
    return share * (1.0 - low) + low
