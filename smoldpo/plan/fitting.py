"""How much goes through at once at a depth, by the rule of the run itself (engine/memory_budget.py)."""

from __future__ import annotations

from collections.abc import Sequence

from smoldpo.engine.memory_budget import ASIDE, halve_until_it_fits
from smoldpo.plan.counting import Packing
from smoldpo.types import TokenizedPair


class Foreseen:
    """Stands for an engine that is to be built at some depth.

    Args:
        packing: as it would lay out pairs if memory were no matter; halved below.
        longest: of the pairs, the one that needs the most memory.
        row_bytes: kept of a row for the backward pass.
    """

    def __init__(self, packing: Packing, longest: TokenizedPair, row_bytes: float):
        self.packing, self._longest = packing, longest
        self._one = round(packing.held([longest]) * row_bytes)

    def backward_bytes(self, pairs: Sequence[TokenizedPair], per_step: int) -> tuple[int, int]:
        return self._one, self.packing.at_once_bytes(self._one, self._longest, per_step)

    def halve_budget(self, pairs: Sequence[TokenizedPair]) -> bool:
        fewer = self.packing.halved(self._longest, len(pairs))
        self.packing = fewer or self.packing
        return fewer is not None


def fitting(
    packing: Packing,
    pairs: Sequence[TokenizedPair],
    pairs_per_step: int,
    row_bytes: float,
    taken: float,
    free: float,
) -> Packing | None:
    """The packing with which a step fits; None: not even one pair at once does.

    Args:
        packing: that of a run for which memory is no matter.
        row_bytes: kept of a row for the backward pass.
        taken: bytes of gradients, the optimizer's state and its temporaries.
        free: bytes free when training begins.
    """
    run = Foreseen(packing, packing.longest(pairs), row_bytes)
    fits, _ = halve_until_it_fits(run, pairs, pairs_per_step, free - taken - ASIDE)
    return run.packing if fits else None
