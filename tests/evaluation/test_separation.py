"""How well a reward tells liked answers from others."""

import numpy as np
import pytest

from smoldpo.evaluation.separation import auc, separation


def test_auc_by_hand():
    # 3 beats 1 and 2 and ties with 3; 1 ties with 1: 2.5 and 0.5 of three
    assert auc([3, 1], [1, 2, 3]) == pytest.approx((2.5 + 0.5) / 6)
    assert auc([2.0], [1.0]) == 1 and auc([1.0], [2.0]) == 0 and auc([0.0] * 3, [0.0]) == 0.5
    assert auc([], [1.0]) is None and auc([1.0], []) is None


def test_the_interval_is_of_prompts():
    random = np.random.default_rng(0)
    liked = [True, False] * 30
    rewards = random.normal(size=60) + np.array(liked)
    alone = separation([0.0] * 60, rewards, liked, [str(n) for n in range(60)], 1)
    assert alone.before == 0.5 and alone.low < alone.after < alone.high
    assert alone.after == auc(rewards[::2], rewards[1::2])
    # Ten prompts of six answers each that are the same: as sure as ten answers, not sixty.
    same = separation(
        [0.0] * 60, np.repeat(rewards[:10], 6), np.repeat(liked[:10], 6),
        [str(n // 6) for n in range(60)], 1,
    )  # fmt: skip
    assert same.high - same.low > alone.high - alone.low
    assert separation([0.0], [1.0], [True], ["a"], 1) is None
