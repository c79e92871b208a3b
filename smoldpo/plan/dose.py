"""How much the dry run goes through: enough to be steady, and little enough to be done within a minute."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from smoldpo.engine.packing import pair_length
from smoldpo.models.lean import ROWS, TRUNK_ROWS
from smoldpo.plan.depths import Visit
from smoldpo.types import TokenizedPair

SECONDS = 16.0
"""For all depths together; loading, saving and drawing answers come to it."""
PAIRS = range(8, 1, -1)
"""To a step of the dry run. One alone would leave most of a block of rows empty (models/lean.py)."""


@dataclass(frozen=True)
class Dose:
    """Of one depth."""

    pairs: int
    """Of each of two batches."""
    twice: bool
    """Whether each pass and step is done once more before it counts; else the first step of all alone is.

    Where arithmetic takes all the time, a first call takes hardly more than the next one.
    """

    def operations(
        self, inside: int, head: int, visits: Sequence[Visit], size: tuple[float, float, int]
    ) -> float:
        """What the dry runs compute (DryRun).

        Args:
            inside: parameters in all decoder layers.
            head: parameters in the LM head.
            size: tokens of a pair, those of its completions, on average; tokens of the longest pair.
        """
        mean, scored, longest = size
        rows, logits = _filled(self.pairs * mean, ROWS), self.pairs * scored * head
        total = 0.0
        for visit in visits:
            depth, batches = visit.depth, 1 if visit.once else 2
            passes = batches * (1 + self.twice) if visit.passes else 0
            steps = 1 if visit.once else 3 + self.twice
            above = inside * depth.top / depth.layers
            prepared = batches * self.pairs * mean + (longest if depth.below else 0)
            total += 2 * (_filled(prepared, TRUNK_ROWS) * inside + batches * logits)
            total += 2 * _filled(longest, ROWS) * above
            total += passes * 2 * (rows * above + logits)
            total += steps * (6 * rows * above + (6 if depth.head_trains else 4) * logits)
        return total


def _filled(rows: float, block: int) -> int:
    return block * math.ceil(rows / block)


def choose_dose(
    pairs: Sequence[TokenizedPair],
    per_step: int,
    inside: int,
    head: int,
    visits: Sequence[Visit],
    rate: float,
) -> Dose:
    """The largest dose that takes about SECONDS at most; of a very slow machine, the smallest there is.

    Args:
        pairs: all training pairs.
        per_step: of an optimizer step of the run.
        inside, head: parameters in all decoder layers, and in the LM head.
        rate: operations a second that a run reaches here.
    """
    scored = sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs) / len(pairs)
    lengths = [pair_length(pair) for pair in pairs]
    size = sum(lengths) / len(pairs), scored, max(lengths)
    counts = [count for count in PAIRS if count <= per_step] or [per_step]
    doses = [Dose(counts[0], True), *(Dose(count, False) for count in counts)]
    for dose in doses:
        if dose.operations(inside, head, visits, size) <= SECONDS * rate:
            return dose
    return doses[-1]
