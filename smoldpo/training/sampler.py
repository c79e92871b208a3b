"""Which pairs make up each optimizer step: a pure function of seed and step."""

from __future__ import annotations

import functools
import math
import random
from dataclasses import dataclass

from smoldpo.config.schema import TrainConfig


@dataclass(frozen=True)
class Schedule:
    """Which pairs make up each optimizer step: a pure function of seed and step."""

    pairs: int
    pairs_per_step: int
    seed: int
    total_steps: int

    @classmethod
    def of(cls, config: TrainConfig, pairs: int) -> Schedule:
        """The schedule of a run over this many pairs."""
        size = config.per_device_train_batch_size * config.gradient_accumulation_steps
        per_epoch = math.ceil(pairs / size)
        total = config.max_steps or max(1, math.ceil(config.num_train_epochs * per_epoch))
        return cls(pairs, size, config.seed, total)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.pairs / self.pairs_per_step)

    def indices(self, step: int) -> tuple[int, ...]:
        """Indices of the pairs of step `step` (from 0); an epoch's last step may have fewer."""
        epoch, within = divmod(step, self.steps_per_epoch)
        start = within * self.pairs_per_step
        return epoch_order(self.pairs, self.seed, epoch)[start : start + self.pairs_per_step]


@functools.lru_cache(maxsize=2)
def epoch_order(pairs: int, seed: int, epoch: int) -> tuple[int, ...]:
    """The order of the pairs in one epoch: the same on every machine and in every process."""
    order = list(range(pairs))
    random.Random(f"smoldpo {seed} {epoch}").shuffle(order)
    return tuple(order)
