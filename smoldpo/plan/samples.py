"""The pairs of the dry run: some of the run's own, short ones and long ones, at its real lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from smoldpo.engine.packing import pair_length
from smoldpo.types import TokenizedPair


@dataclass(frozen=True)
class Samples:
    """Pairs of the shorter half and of the longer half, evenly spaced by length."""

    short: list[TokenizedPair]
    long: list[TokenizedPair]


def step_samples(pairs: Sequence[TokenizedPair], count: int) -> Samples:
    """What one step each goes through: so many pairs."""
    order = sorted(pairs, key=pair_length)
    middle = len(order) // 2
    return Samples(evenly(order[:middle] or order, count), evenly(order[middle:], count))


def evenly(pairs: Sequence[TokenizedPair], count: int) -> list[TokenizedPair]:
    """So many of them, or all, evenly spaced."""
    count = min(count, len(pairs))
    return [pairs[int((at + 0.5) * len(pairs) / count)] for at in range(count)]
