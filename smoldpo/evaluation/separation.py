"""How well an implicit reward tells liked answers from others, where they are no pairs. No torch.

The area under the ROC curve (AUC) is the probability that a liked answer, drawn at random, has a
higher reward than one that was not liked; a tie counts half (Hanley and McNeil 1982).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from smoldpo.evaluation.statistics import LEVEL

RESAMPLES = 1999


def auc(liked: Sequence[float], others: Sequence[float]) -> float | None:
    """The AUC; None where a kind is missing."""
    if not len(liked) or not len(others):
        return None
    ordered, values = np.sort(np.asarray(others, float)), np.asarray(liked, float)
    below, not_above = (np.searchsorted(ordered, values, side) for side in ("left", "right"))
    return float((below + not_above).mean() / (2 * len(ordered)))


@dataclass(frozen=True)
class Separation:
    """AUC of the implicit reward before and after; before, policy and reference may be equal."""

    liked: int
    others: int
    before: float
    after: float
    low: float
    high: float
    """Of the AUC after: bootstrap by prompts, percentiles."""
    level: float = LEVEL

    def as_json(self) -> dict[str, Any]:
        """What separation.json holds."""
        return asdict(self)

    @property
    def sentence(self) -> str:
        """The answer, for people."""
        return (
            f"The tuned model's implicit reward puts a liked held-out answer before another one in "
            f"{self.after:.1%} of all comparisons ({self.level:.0%} interval {self.low:.1%} to "
            f"{self.high:.1%}), before {self.before:.1%}; {self.liked:,} answers were liked, "
            f"{self.others:,} not."
        )


def separation(
    before: Sequence[float],
    after: Sequence[float],
    liked: Sequence[bool],
    prompts: Sequence[str],
    seed: int,
) -> Separation | None:
    """Of rewards of single answers; None where all are of one kind.

    Args:
        before, after: rewards, one an answer.
        prompts: of each answer; the bootstrap draws prompts.
    """
    mask = np.asarray(liked, bool)
    old, new = np.asarray(before, float), np.asarray(after, float)
    if mask.all() or not mask.any():
        return None
    _, group = np.unique(np.asarray(prompts, object).astype(str), return_inverse=True)
    members = [np.flatnonzero(group == at) for at in range(group.max() + 1)]
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(RESAMPLES):
        at = np.concatenate([members[k] for k in rng.integers(0, len(members), len(members))])
        found = auc(new[at][mask[at]], new[at][~mask[at]])
        if found is not None:
            drawn.append(found)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    first, last = auc(old[mask], old[~mask]), auc(new[mask], new[~mask])
    assert first is not None and last is not None
    return Separation(int(mask.sum()), int((~mask).sum()), first, last, float(low), float(high))
