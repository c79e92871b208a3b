"""The interval that holds at every look, and the agreement of voters."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smoldpo.evaluation.sequential import cohens_kappa, confidence_sequence


@pytest.mark.parametrize(("truth", "tie"), [(0.5, 0.0), (0.6, 0.0), (0.9, 0.0), (0.5, 0.5)])
def test_it_covers_at_the_most_flattering_moment(truth, tie):
    """2,000 sessions of 200 votes, each judged at the look that is worst for the interval."""
    rng = np.random.default_rng(3)
    sessions, votes = 2000, 200
    won = rng.random((sessions, votes)) < truth
    scores = np.where(rng.random((sessions, votes)) < tie, 0.5, won)  # ties where truth is one half
    sums, n = scores.cumsum(1), np.arange(1, votes + 1)
    # M(truth) at each look, by the definition: the interval misses where it exceeds 20.
    ways = np.vectorize(lambda s, n: math.lgamma(s + 0.5) + math.lgamma(n - s + 0.5))
    mixture = ways(sums, n) - np.vectorize(math.lgamma)(n + 1.0) - math.log(math.pi)
    missed = (
        mixture - sums * math.log(truth) - (n - sums) * math.log(1 - truth) > math.log(20)
    ).any(1)
    assert missed.mean() <= 1 - 0.945
    for session in rng.choice(sessions, 4):
        at = (mixture[session] - sums[session] * math.log(truth)
              - (n - sums[session]) * math.log(1 - truth)).argmax() + 1  # fmt: skip
        low, high = confidence_sequence(scores[session, :at])
        assert (low <= truth <= high) == (not missed[session])


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=60))
def test_it_holds_the_share_and_is_symmetric(scores):
    low, high = confidence_sequence(scores)
    assert 0 <= low <= sum(scores) / len(scores) <= high <= 1
    other = confidence_sequence([1 - score for score in scores])
    assert other == pytest.approx((1 - high, 1 - low), abs=1e-9)


def test_its_ends_are_where_the_mixture_says():
    """Ten of ten: B(10.5, 0.5) / B(0.5, 0.5) / p^10 = 20, solved by hand."""
    ratio = math.exp(math.lgamma(10.5) + math.lgamma(0.5) - math.lgamma(11)) / math.pi
    low, high = confidence_sequence([1.0] * 10)
    assert high == 1 and low == pytest.approx((ratio / 20) ** (1 / 10), abs=1e-9)
    assert confidence_sequence([]) == (0.0, 1.0)
    assert confidence_sequence([1.0] * 4)[0] < 0.5 < confidence_sequence([1.0] * 8)[0]
    with pytest.raises(ValueError):
        confidence_sequence([2.0])


def test_kappa_by_hand():
    """20 yes-yes, 15 no-no, 5 and 10 apart: p_o 0.7, p_e 0.5."""
    ours = ["a"] * 25 + ["b"] * 25
    theirs = ["a"] * 20 + ["b"] * 5 + ["a"] * 10 + ["b"] * 15
    found = cohens_kappa(ours, theirs)
    assert found.kappa == pytest.approx(0.4) and found.items == 50
    half = 1.959964 * math.sqrt(0.7 * 0.3 / 50) / 0.5
    assert (found.low, found.high) == pytest.approx((0.4 - half, 0.4 + half), abs=1e-6)
    assert cohens_kappa([], []) is None and cohens_kappa(["a"] * 3, ["a"] * 3) is None
