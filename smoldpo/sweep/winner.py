"""Which trial is the best on the validation pairs, and which others it is shown to be better than. No torch.

The best of many trials looks better than it is, because chance has chosen it too. So its lead over each
other is tested pair by pair (statistics.paired_test, whole prompts at once), and the p-values are corrected
for every two trials that could have come out as winner and rival: Holm's correction (1979) over all k(k-1)/2
pairs of trials. Corrected for the winner's own k-1 comparisons alone, twenty equal trials would yield a false
"better" far more often than once in twenty sweeps (tests/test_sweep_winner.py counts it).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from smoldpo.evaluation.statistics import SIGNIFICANT, all_pairs_p, holm


@dataclass(frozen=True)
class Standing:
    """A trial beside the winner.

    Attributes:
        behind: the winner's accuracy minus this one's.
        p, p_corrected: of no difference; of the winner itself 1.
        as_good: not shown to be worse than the winner.
    """

    number: int
    behind: float
    p: float
    p_corrected: float
    as_good: bool


def winner_of(scores: Mapping[int, Sequence[float]]) -> int:
    """The trial with the highest mean; of equal ones the first."""
    return max(sorted(scores), key=lambda number: sum(scores[number]) / len(scores[number]))


def standings(
    scores: Mapping[int, Sequence[float]], groups: Sequence[str]
) -> tuple[int, dict[int, Standing]]:
    """The winner, and every trial beside it.

    Args:
        scores: of each trial 0, ½ or 1 for each pair, in the same order.
        groups: of each pair, its prompt.
    """
    winner = winner_of(scores)
    numbers = sorted(scores)
    p = all_pairs_p([scores[number] for number in numbers], groups)
    two = list(combinations(range(len(numbers)), 2))
    corrected = dict(zip(two, holm([p[both] for both in two]), strict=True))
    at = numbers.index(winner)
    best = sum(scores[winner]) / len(groups)
    found = {}
    for index, number in enumerate(numbers):
        raw = float(p[at, index])
        last = corrected[min(at, index), max(at, index)] if index != at else 1.0
        behind = best - sum(scores[number]) / len(groups)
        found[number] = Standing(number, behind, raw, last, last >= SIGNIFICANT)
    return winner, found


def comparisons(trials: int) -> int:
    """How many p-values are corrected for."""
    return trials * (trials - 1) // 2
