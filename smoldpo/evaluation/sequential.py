"""Statistics of votes: an interval that holds however often one looks, and how far voters agree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import special

from smoldpo.evaluation.statistics import LEVEL

PRIOR = 0.5
"""Both parameters of the beta mixture: Jeffreys' prior."""
HALVINGS = 50


def confidence_sequence(scores: Sequence[float], level: float = LEVEL) -> tuple[float, float]:
    """An interval of the mean of scores in 0..1 that covers it at all numbers of scores at once.

    So one may look after each score and stop at will. With S the sum of n scores,

        M(p) = B(½ + S, ½ + n - S) / (B(½, ½) pˢ (1 - p)ⁿ⁻ˢ)

    is a supermartingale with mean at most 1 where the mean is p, and exceeds 1 / (1 - level) at any
    time with a probability of at most 1 - level (Ville 1939). The interval holds all p at which it
    did not. For scores of 0 and 1 this is Robbins' beta mixture (Robbins 1970, "Statistical methods
    related to the law of the iterated logarithm", example 3). A tie of one half keeps it valid: the
    ratio of likelihoods is convex in a score, hence at most its chord between 0 and 1.

    Raises:
        ValueError: a score outside 0..1.
    """
    if not all(0 <= score <= 1 for score in scores):
        raise ValueError("scores must lie between 0 and 1")
    n, won = len(scores), math.fsum(scores)
    if n == 0:
        return 0.0, 1.0
    bound = math.log(1 / (1 - level))
    mixture = float(special.betaln(PRIOR + won, PRIOR + n - won) - special.betaln(PRIOR, PRIOR))

    def is_out(p: float) -> bool:
        likelihood = special.xlogy(won, p) + special.xlog1py(n - won, -p)
        return mixture - float(likelihood) > bound

    def edge(inside: float, outside: float) -> float:
        if not is_out(outside):
            return outside
        for _ in range(HALVINGS):
            middle = (inside + outside) / 2
            inside, outside = (inside, middle) if is_out(middle) else (middle, outside)
        return outside

    return edge(won / n, 0.0), edge(won / n, 1.0)


@dataclass(frozen=True)
class Agreement:
    """Cohen's κ of two voters over what both judged; 1 is full agreement, 0 that of chance."""

    kappa: float
    low: float
    high: float
    items: int


def cohens_kappa(ours: Sequence[str], theirs: Sequence[str]) -> Agreement | None:
    """Agreement of two lists of verdicts beyond chance, with its interval.

    κ = (p_o - p_e) / (1 - p_e), and its standard error √(p_o (1 - p_o) / n) / (1 - p_e)
    (Cohen 1960, eq. 1 and 7). None where there is nothing in common, or where both gave one and the
    same verdict throughout, so that chance explains all.
    """
    n = len(ours)
    if n != len(theirs):
        raise ValueError("both must have judged the same items")
    kinds = set(ours) | set(theirs)
    chance = sum(ours.count(kind) * theirs.count(kind) for kind in kinds) / max(1, n * n)
    if n == 0 or chance == 1:
        return None
    same = sum(one == other for one, other in zip(ours, theirs, strict=True)) / n
    kappa = (same - chance) / (1 - chance)
    half = float(special.ndtri((1 + LEVEL) / 2)) * math.sqrt(same * (1 - same) / n) / (1 - chance)
    return Agreement(kappa, max(-1.0, kappa - half), min(1.0, kappa + half), n)
