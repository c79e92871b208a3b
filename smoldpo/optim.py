"""AdamW's parameter groups, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from smoldpo.config import TrainConfig


def make_optimizer(
    parameters: Iterable[tuple[str, torch.nn.Parameter]], config: TrainConfig
) -> torch.optim.AdamW:
    """Fused AdamW (Loshchilov and Hutter 2019) over what trains; decay on matrices only."""
    named = list(parameters)
    groups = [
        {
            "params": [p for _, p in named if p.ndim >= 2],
            "weight_decay": config.weight_decay,
        },
        {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )


def warmup_steps(config: TrainConfig, total: int) -> int:
    """Steps that warm up: as asked, else the asked share of all steps, rounded up.

    A share never takes every step: a run of one step would have a learning rate of 0.
    """
    if config.warmup_steps is not None:
        return config.warmup_steps
    return min(math.ceil(config.warmup_ratio * total), total - 1)


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """The rate of optimizer step `step` (from 0) of `total`.

    Equal to transformers' schedules of the same names: linear warm-up from 0, then constant, linear
    to 0, or half a cosine to 0.
    """
    warmup = warmup_steps(config, total)
    if step < warmup:
        return config.learning_rate * step / max(1, warmup)
    done = (step - warmup) / max(1, total - warmup)
    shape = {
        "constant": 1.0,
        "linear": max(0.0, 1.0 - done),
        "cosine": 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0))),
    }
    return config.learning_rate * shape[config.lr_scheduler_type]
