"""What each optimizer and schedule is and which settings it reads, and what is wrong between them.

No torch here, so that a wrong command line is answered at once. training/optim.py builds the
optimizers and computes the rates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from smoldpo.config.schema import TrainConfig

StateBytes = Callable[[tuple[int, ...], int, "TrainConfig"], int]
"""(a parameter's shape, bytes of one number, settings) -> bytes of its optimizer state."""


@dataclass(frozen=True)
class OptimizerFacts:
    """What must be known of an optimizer without building it."""

    reads: tuple[str, ...]
    """Settings that only some optimizers read."""
    state_bytes: StateBytes
    temporaries: int = 0
    """Tensors of the largest parameter's size that an update makes and drops."""


def _two_moments(shape: tuple[int, ...], size: int, _: TrainConfig) -> int:
    return 2 * math.prod(shape) * size + 4  # and the step, a float32


def _rows_and_columns(shape: tuple[int, ...], size: int, _: TrainConfig) -> int:
    numbers = math.prod(shape)
    if len(shape) >= 2:
        numbers = math.prod(shape[:-1]) + math.prod(shape[:-2]) * shape[-1]
    return (numbers + 1) * size + 8  # and the parameter's root mean square, and the step


def _momentum(shape: tuple[int, ...], size: int, settings: TrainConfig) -> int:
    return math.prod(shape) * size if settings.sgd_momentum else 0


BLOCK, SMALL = 256, 4096
"""bitsandbytes: numbers to one scale; parameters with fewer numbers keep float32 moments."""


def _two_bytes(shape: tuple[int, ...], _: int, __: TrainConfig) -> int:
    count = math.prod(shape)
    if count < SMALL:
        return 8 * count + 8
    scales, code_books = 2 * 4 * math.ceil(count / BLOCK), 2 * 4 * BLOCK
    return 2 * count + scales + code_books + 8


ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")
OPTIMIZERS: dict[str, OptimizerFacts] = {
    "adamw_torch_fused": OptimizerFacts(ADAM, _two_moments),
    "adafactor": OptimizerFacts((), _rows_and_columns, temporaries=3),
    "sgd": OptimizerFacts(("sgd_momentum",), _momentum, temporaries=1),
    "adamw_8bit": OptimizerFacts(ADAM, _two_bytes, temporaries=4),
}
"""By transformers' names."""

SCHEDULES: dict[str, tuple[str, ...]] = {
    "constant": (),
    "linear": (),
    "cosine": (),
    "cosine_with_min_lr": ("min_lr_rate",),
    "warmup_stable_decay": ("min_lr_rate", "lr_decay_ratio", "lr_decay_steps", "lr_decay_type"),
}
"""By transformers' names: which of the settings below `lr_scheduler_type` each reads."""


def lowest_rate(config: TrainConfig) -> float:
    """Share of the peak rate at which a schedule ends that has such an end."""
    if config.min_lr_rate is not None:
        return config.min_lr_rate
    return 0.1 if config.lr_scheduler_type == "cosine_with_min_lr" else 0.0


def parse_rates(items: Sequence[str]) -> dict[str, float]:
    """`learning_rates` as pattern -> peak rate, in their order.

    Raises:
        ValueError: an item is not pattern=rate with a positive rate, or a pattern comes twice.
    """
    rates: dict[str, float] = {}
    for item in items:
        pattern, _, text = item.rpartition("=")
        pattern = pattern.strip()
        try:
            rate = float(text)
        except ValueError:
            rate = math.nan
        if not pattern or not (rate > 0 and math.isfinite(rate)):
            raise ValueError(f"{item!r} is not pattern=rate, such as *.mlp.*=1e-5 or norms=1e-4")
        if pattern in rates:
            raise ValueError(f"{pattern!r} stands there twice")
        rates[pattern] = rate
    return rates
