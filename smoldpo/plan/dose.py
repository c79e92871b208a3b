"""How much the dry run goes through: enough to be steady, and little enough to be done within a minute."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from smoldpo.models.lean import ROWS, TRUNK_ROWS
from smoldpo.plan.forecast import Depth
from smoldpo.types import TokenizedPair

SECONDS = 35.0
"""For all depths together; loading, saving and drawing answers come to it."""
PAIRS = range(8, 1, -1)
"""To a step of the dry run. One alone would leave most of a block of rows empty (models/lean.py)."""


@dataclass(frozen=True)
class Dose:
    """Of one depth."""

    pairs: int
    """Of each of two batches."""
    tokens: int
    """Of each stream through the frozen layers."""
    twice: bool
    """Whether each pass and step is done once more before it counts; else the first step of all alone is.

    Where arithmetic takes all the time, a first call takes hardly more than the next one.
    """

    def operations(
        self, inside: int, head: int, depths: Sequence[Depth], size: tuple[float, float]
    ) -> float:
        """What dry runs at these depths compute.

        Args:
            inside: parameters in all decoder layers.
            head: parameters in the LM head.
            size: tokens of a pair, and those of its completions, on average.
        """
        passes, steps = (4, 4) if self.twice else (2, 3)
        rows, logits = _filled(self.pairs * size[0], ROWS), self.pairs * size[1] * head
        both = _filled(2 * self.pairs * size[0], TRUNK_ROWS) * inside + 2 * logits
        total = 2.0 * (
            both + (2 + self.twice) * self.tokens * inside
        )  # warming up, and whole streams
        for depth in depths:
            above = inside * depth.top / depth.layers
            total += 2 * both + passes * 2 * (rows * above + logits)
            total += steps * (6 * rows * above + (6 if depth.head_trains else 4) * logits)
        return total


def _filled(rows: float, block: int) -> int:
    return block * math.ceil(rows / block)


def choose_dose(
    pairs: Sequence[TokenizedPair],
    per_step: int,
    stream: int,
    inside: int,
    head: int,
    depths: Sequence[Depth],
    rate: float,
) -> Dose:
    """The largest dose that takes about SECONDS at most; of a very slow machine, the smallest there is.

    Args:
        pairs: all training pairs.
        per_step: of an optimizer step of the run.
        stream: tokens that the run sends through the frozen layers at once.
        inside, head: parameters in all decoder layers, and in the LM head.
        rate: operations a second that a run reaches here.
    """
    scored = sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs) / len(pairs)
    size = scored + sum(len(pair.prompt_ids) for pair in pairs) / len(pairs), scored
    few = min(stream, TRUNK_ROWS)
    counts = [count for count in PAIRS if count <= per_step] or [per_step]
    doses = [Dose(counts[0], stream, True), *(Dose(count, few, False) for count in counts)]
    for dose in doses:
        if dose.operations(inside, head, depths, size) <= SECONDS * rate:
            return dose
    return doses[-1]
