"""How sure a difference is: intervals and exact tests. No torch here.

A pair's score is 1 (chosen preferred), 0, or one half (a tie). Pairs of one prompt are not
independent: a model that understands a prompt is right about several of its pairs. So the bootstrap
draws prompts, the test of a change flips prompts, and an interval of a share counts pairs by their
effective number. Where every prompt has one pair, all of this is the textbook's.

Only scipy.special is imported, as transformers does: scipy.stats takes 22 MB more, which may be
missing at the end of a run that fills the memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

LEVEL = 0.95
"""Confidence of every interval."""
SIGNIFICANT = 1 - LEVEL
RESAMPLES = 4999
"""Draws of a bootstrap."""
RESAMPLES_AT_ONCE = 500

Array = NDArray[np.float64]


def wilson(successes: float, n: float, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927, eq. 1).

    Args:
        successes: may be fractional: ties count one half, which widens the interval if anything.
        n: pairs, or their `effective_size`.

    Raises:
        ValueError: n is not positive, or successes lie outside 0..n.
    """
    if not (n > 0 and 0 <= successes <= n):
        raise ValueError(f"{successes} successes of {n}")
    z = float(special.ndtri((1 + level) / 2))
    share = successes / n
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def effective_size(scores: Sequence[float], groups: Sequence[str]) -> float:
    """How many independent scores tell as much about the mean as these, at most their number.

    n divided by the design effect (Kish 1965): the variance of the mean by groups over the variance
    that independent scores of this mean would have.
    """
    values, n = np.asarray(scores, float), len(scores)
    mean = values.mean()
    independent = mean * (1 - mean) * n
    by_group = _sums(values - mean, groups)
    if len(by_group) == 1:
        return 1.0
    if len(by_group) == n or independent == 0:
        return float(n)
    clustered = (by_group**2).sum() * len(by_group) / (len(by_group) - 1)
    return float(n / max(1.0, clustered / independent))


def sign_test(improved: int, worsened: int) -> float:
    """Two-sided exact p of so uneven a split if either side were as likely (McNemar 1947).

    For 0/1 scores before and after, improved and worsened count the discordant pairs.
    """
    discordant = improved + worsened
    fewer = min(improved, worsened)
    return min(1.0, 2 * float(special.bdtr(fewer, discordant, 0.5))) if discordant else 1.0


@dataclass(frozen=True)
class PairedTest:
    """Whether scores changed: how many pairs improved and worsened, and p under no change."""

    improved: int
    worsened: int
    p: float
    name: str


def paired_test(
    before: Sequence[float], after: Sequence[float], groups: Sequence[str]
) -> PairedTest:
    """Exact test of no change: for each prompt, before and after might as well be swapped.

    The summed difference of each prompt's pairs gets a sign at random (Fisher 1935); p is the
    probability of a total at least as far from zero as the one seen, over all ways, two-sided. With
    one pair to a prompt, all differences are of one size, and this is McNemar's exact test
    (`sign_test`).

    Args:
        before, after: 0, ½ or 1 for each pair.
        groups: each pair's prompt.
    """
    difference = np.asarray(after, float) - np.asarray(before, float)
    halves = np.rint(2 * _sums(difference, groups)).astype(int)  # whole numbers: a tie is one half
    p, sizes = _sign_flip_p(halves)
    name = "exact McNemar test" if sizes < 2 else "exact sign-flip test by prompt"
    return PairedTest(int((difference > 0).sum()), int((difference < 0).sum()), p, name)


def all_pairs_p(scores: Sequence[Sequence[float]], groups: Sequence[str]) -> Array:
    """p of `paired_test` for every two rows of scores over the same pairs, [rows, rows]."""
    sums = np.array([_sums(np.asarray(row, float), groups) for row in scores])
    halves = np.rint(2 * sums).astype(int)
    p = np.ones((len(halves), len(halves)))
    for one in range(len(halves)):
        for other in range(one):
            p[one, other] = p[other, one] = _sign_flip_p(halves[one] - halves[other])[0]
    return p


def _sign_flip_p(halves: NDArray[np.int_]) -> tuple[float, int]:
    """P(|sum of ±halves| >= |their sum|) with signs at random, and how many sizes there are."""
    of_size = np.bincount(np.abs(halves))
    sizes = np.flatnonzero(of_size[1:]) + 1
    likely = np.ones(1)  # of the sums -reach .. reach, in steps of 1
    for size, count in zip(sizes, of_size[sizes], strict=True):
        heads = np.arange(count + 1)
        ways = -special.betaln(count - heads + 1, heads + 1) - math.log(count + 1)
        stretched = np.zeros(2 * size * count + 1)
        stretched[:: 2 * size] = np.exp(ways - count * math.log(2))  # P(k heads of `count` tosses)
        likely = np.convolve(likely, stretched)
    reach = len(likely) // 2
    far = np.abs(np.arange(-reach, reach + 1)) >= abs(int(halves.sum()))
    return min(1.0, float(likely[far].sum())), len(sizes)


def sign_flip_test(differences: Sequence[float], groups: Sequence[str], seed: int) -> float:
    """Two-sided p of no change, for differences of any size: flips as `paired_test`, at random.

    p is (1 + the draws at least as far from zero as what was seen) / (1 + draws), which is valid
    at any number of draws (Phipson and Smyth 2010).
    """
    sums = _sums(np.asarray(differences, float), groups)
    rng = np.random.default_rng(seed)
    signs = rng.choice(np.array([-1.0, 1.0]), (RESAMPLES, len(sums)))
    seen = abs(sums.sum())
    far = np.abs(signs @ sums) >= seen - 1e-12 * max(1.0, seen)
    return float((1 + far.sum()) / (1 + RESAMPLES))


def mean_interval(
    values: Sequence[float],
    groups: Sequence[str],
    seed: int,
    weights: Sequence[float] | None = None,
    level: float = LEVEL,
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of a mean over groups (prompts); None for fewer than two.

    Args:
        values: one a pair. With `weights`, the mean is sum(values) / sum(weights): a mean per
            token, say, of sums over tokens and their counts.

    Source: Efron 1979; Field and Welsh 2007 for drawing whole clusters.
    """
    sizes = np.ones(len(values)) if weights is None else np.asarray(weights, float)
    sums, counts = _sums(np.asarray(values, float), groups), _sums(sizes, groups)
    if len(sums) < 2:
        return None
    rng = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    for start in range(0, RESAMPLES, RESAMPLES_AT_ONCE):
        chunk = means[start : start + RESAMPLES_AT_ONCE]
        drawn = rng.integers(0, len(sums), (len(chunk), len(sums)))
        chunk[:] = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _sums(values: Array, groups: Sequence[str]) -> Array:
    """Sum of the values of each group, groups in the order of their names."""
    _, where = np.unique(np.asarray(groups, dtype=object).astype(str), return_inverse=True)
    return np.asarray(np.bincount(where, weights=values))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for how many comparisons were made (Holm 1979), in their own order."""
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected
