"""Intervals and tests against values worked by hand, scipy, and simulation."""

import math
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from smoldpo.evaluation import statistics
from smoldpo.evaluation.headline import how_often, p_in_words, p_text
from smoldpo.evaluation.statistics import (
    effective_size,
    holm,
    mean_interval,
    paired_test,
    sign_test,
    wilson,
)

REPLICATIONS = 1000


def singles(count):
    return [str(number) for number in range(count)]


def test_wilson_by_hand():
    # 8 of 10, z = 1.959964: centre (0.8 + 3.841459/20) / 1.3841459, reach as in Wilson's formula.
    low, high = wilson(8, 10)
    z2 = 3.841458820694124
    centre = (0.8 + z2 / 20) / (1 + z2 / 10)
    reach = math.sqrt(z2) * math.sqrt(0.016 + z2 / 400) / (1 + z2 / 10)
    assert (low, high) == pytest.approx((centre - reach, centre + reach), abs=1e-12)
    assert (low, high) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)


@pytest.mark.parametrize(("successes", "n"), [(0, 5), (1, 1), (37, 128), (509, 509), (311, 509)])
def test_wilson_is_scipys(successes, n):
    expected = stats.binomtest(successes, n).proportion_ci(method="wilson")
    assert wilson(successes, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_takes_ties_as_halves_and_refuses_nonsense():
    low, high = wilson(2.5, 5)
    assert low == pytest.approx(1 - high)
    assert wilson(2, 5)[0] < low < wilson(3, 5)[0]
    for successes, n in ((1, 0), (-1, 5), (6, 5)):
        with pytest.raises(ValueError):
            wilson(successes, n)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.85])
def test_wilson_covers(share):
    """Of a thousand 95% intervals about 95% hold the truth (binomial bounds at 1 in 10,000)."""
    random = np.random.default_rng(1)
    found = [wilson(int(k), 80) for k in random.binomial(80, share, REPLICATIONS)]
    covered = sum(low <= share <= high for low, high in found)
    assert 915 <= covered <= 980


def test_interval_of_clustered_scores_covers():
    """Five pairs a prompt, all alike within a prompt: as if there were a fifth as many pairs."""
    random = np.random.default_rng(2)
    groups = [str(number // 5) for number in range(300)]
    covered = naive = 0
    for _ in range(REPLICATIONS):
        scores = np.repeat(random.binomial(1, 0.6, 60), 5).astype(float)
        size = effective_size(scores, groups)
        for low, high, counts in (
            (*wilson(scores.mean() * size, size), True),
            (*wilson(scores.sum(), len(scores)), False),
        ):
            covered += counts and low <= 0.6 <= high
            naive += (not counts) and low <= 0.6 <= high
    assert 915 <= covered <= 980
    assert naive < 700  # what ignoring the prompts would have given


def test_effective_size_by_hand():
    assert effective_size([1, 0, 1, 1], singles(4)) == 4
    # Two prompts, right twice and wrong twice: residual sums +1 and -1, variance 2 * 2/1 = 4,
    # against 4 * 1/4 = 1 if independent. So four pairs tell as much as one.
    assert effective_size([1, 1, 0, 0], ["a", "a", "b", "b"]) == pytest.approx(1)
    assert effective_size([1, 1, 1, 1], ["a", "a", "b", "b"]) == 4  # no variance to judge by


def test_sign_test_by_hand():
    # 1 against 5: P(X <= 1) + P(X >= 5) for 6 fair coins = 2 * (1 + 6) / 64.
    assert sign_test(1, 5) == pytest.approx(14 / 64)
    assert sign_test(0, 0) == 1.0
    assert sign_test(3, 3) == 1.0


def test_paired_test_is_mcnemar_where_each_prompt_has_one_pair():
    before, after = [0] * 9 + [1] * 3 + [1, 0] * 10, [1] * 9 + [0] * 3 + [1, 0] * 10
    test = paired_test(before, after, singles(32))
    assert (test.improved, test.worsened) == (9, 3)
    assert test.p == pytest.approx(sign_test(9, 3), abs=1e-12)
    assert test.p == pytest.approx(stats.binomtest(3, 12).pvalue, abs=1e-12)
    assert "McNemar" in test.name
    assert paired_test(after, before, singles(32)).p == pytest.approx(test.p)


def test_paired_test_against_ties_is_a_binomial_test():
    """Before training every implicit reward ties; then the test asks whether half are right."""
    after = [1] * 70 + [0] * 40
    test = paired_test([0.5] * 110, after, singles(110))
    assert test.p == pytest.approx(stats.binomtest(70, 110).pvalue, abs=1e-12)


def test_many_pairs_are_no_trouble():
    test = paired_test([0.5] * 5000, [1] * 2600 + [0] * 2400, singles(5000))
    expected = stats.binomtest(2600, 5000).pvalue
    assert test.p == pytest.approx(expected, rel=1e-9)
    assert sign_test(2400, 2600) == pytest.approx(expected, rel=1e-9)


def test_paired_test_by_prompt_by_hand():
    # Prompt a improves by 2, b and c by 1 each: totals ±2 ±1 ±1; only +4 and -4 reach 4: 2 of 8.
    test = paired_test([0, 0, 0, 0], [1, 1, 1, 1], ["a", "a", "b", "c"])
    assert test.p == pytest.approx(2 / 8)
    assert "prompt" in test.name
    # And scipy's permutation test, all 2^10 ways.
    random = np.random.default_rng(3)
    before, after = random.integers(0, 2, (2, 30))
    groups = [str(number // 3) for number in range(30)]
    sums = (after - before).reshape(10, 3).sum(1)
    expected = stats.permutation_test(
        (sums,), np.sum, permutation_type="samples", n_resamples=np.inf, vectorized=True
    )
    assert paired_test(before, after, groups).p == pytest.approx(expected.pvalue, abs=1e-12)


def test_no_change_at_all_is_p_one():
    assert paired_test([0, 1, 0.5], [0, 1, 0.5], singles(3)).p == 1.0


@pytest.mark.parametrize("pairs_to_a_prompt", [1, 4])
def test_false_alarms_under_no_change(pairs_to_a_prompt):
    """Where nothing changed, p < 0.05 comes up in at most 5% (exact tests are a little shy of
    it).
    """
    random = np.random.default_rng(4)
    prompts = 120 // pairs_to_a_prompt
    groups = [str(number // pairs_to_a_prompt) for number in range(120)]
    alarms = naive = 0
    for _ in range(REPLICATIONS):
        # All pairs of a prompt move together, in either direction alike.
        moved = np.repeat(random.choice([-1, 0, 1], prompts, p=[0.2, 0.6, 0.2]), pairs_to_a_prompt)
        before = np.where(moved == 0, 1.0, (1 - moved) / 2)
        after = np.where(moved == 0, 1.0, (1 + moved) / 2)
        alarms += paired_test(before, after, groups).p < 0.05
        naive += paired_test(before, after, singles(120)).p < 0.05
    assert 5 <= alarms <= 72
    if pairs_to_a_prompt > 1:
        assert naive > 150  # what ignoring the prompts would have given


def test_power_where_something_changed():
    random = np.random.default_rng(5)
    found = 0
    for _ in range(200):
        after = random.binomial(1, 0.62, 300)
        found += paired_test([0.5] * 300, after, singles(300)).p < 0.05
    assert found > 190


def test_mean_interval_is_a_bootstrap_of_prompts():
    random = np.random.default_rng(6)
    values = random.normal(1, 2, 200)
    low, high = mean_interval(values, singles(200), seed=0)
    expected = 1.959964 * values.std() / math.sqrt(200)
    assert (high - low) / 2 == pytest.approx(expected, rel=0.08)
    assert (low, high) == mean_interval(values, singles(200), seed=0)
    assert (low, high) != mean_interval(values, singles(200), seed=1)
    # Each value twice under one prompt tells no more than once.
    doubled = mean_interval(np.repeat(values, 2), np.repeat(singles(200), 2), seed=0)
    assert doubled[1] - doubled[0] == pytest.approx(high - low, rel=0.05)
    assert mean_interval([1.0, 2.0], ["a", "a"], seed=0) is None


def test_mean_interval_is_scipys_percentile_bootstrap():
    values = np.random.default_rng(8).normal(1, 2, 60)
    tokens = np.arange(1, 61)
    expected = stats.bootstrap(
        (values, tokens),
        lambda v, n, axis: v.sum(axis) / n.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(9),
    ).confidence_interval
    # The bootstrap draws groups in the order of their names.
    names = [f"{number:02}" for number in range(60)]
    found = mean_interval(values, names, seed=0, weights=tokens)
    assert found == pytest.approx(tuple(expected), abs=0.03 * (expected.high - expected.low))


def test_mean_interval_per_token():
    sums, tokens = [10.0, 2.0, 6.0] * 40, [5, 1, 3] * 40
    low, high = mean_interval(sums, singles(120), seed=0, weights=tokens)
    assert low == pytest.approx(2) and high == pytest.approx(2)


def test_mean_interval_covers(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 499)
    random = np.random.default_rng(7)
    groups = [str(number // 2) for number in range(160)]
    covered = 0
    for seed in range(REPLICATIONS):
        values = np.repeat(random.choice([-1, 0, 1], 80, p=[0.1, 0.6, 0.3]), 2)
        low, high = mean_interval(values, groups, seed=seed)
        covered += low <= 0.2 <= high
    assert 910 <= covered <= 980


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_words():
    assert p_in_words(0.0004) == "very unlikely to be chance"
    assert p_in_words(0.03) == "probably not chance"
    assert p_in_words(0.6) == "it looks like chance"
    assert "once in 2,500 such" in how_often(0.0004)
    assert "once in 20 such" in how_often(0.05)
    assert "the rule" in how_often(0.8)
    assert "less than once" in how_often(0)
    assert p_text(0.00004) == "p < 0.0001" and p_text(0.034) == "p = 0.034"
    assert p_text(0.0999) == "p = 0.10"


def test_statistics_need_no_torch():
    code = (
        "import sys, smoldpo.evaluation.analysis, smoldpo.evaluation.gates\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
