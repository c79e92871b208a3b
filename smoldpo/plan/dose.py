"""How much the dry run goes through: enough to be steady, and little enough to be done within a minute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from smoldpo.models.lean import TRUNK_ROWS
from smoldpo.plan.forecast import Depth
from smoldpo.types import TokenizedPair

SECONDS = 35.0
"""For all depths together; loading, saving and drawing answers come to it."""
PAIRS = 8
"""At most so many to a step of the dry run."""
STREAMS = 3
"""That go through trunk and reference, the one that warms up among them."""


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
        tokens, scored = (self.pairs * part for part in size)
        passes, steps = (4, 4) if self.twice else (2, 3)
        total = 2.0 * STREAMS * self.tokens * inside
        for depth in depths:
            above = inside * depth.top / depth.layers
            logits = scored * head
            total += 3 * 2 * (tokens * inside + logits)  # the states of both, and of one to warm up
            total += passes * 2 * (tokens * above + logits)
            total += steps * (6 * tokens * above + (6 if depth.head_trains else 4) * logits)
        return total


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
    most = min(per_step, PAIRS)
    few = min(stream, TRUNK_ROWS)
    doses = [Dose(most, stream, True), *(Dose(count, few, False) for count in range(most, 0, -1))]
    for dose in doses:
        if dose.operations(inside, head, depths, size) <= SECONDS * rate:
            return dose
    return doses[-1]
