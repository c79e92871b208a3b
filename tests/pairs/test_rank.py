"""Scores by hand, and which answers make pairs."""

import pytest

from smoldpo.evaluation.judges.base import Verdict
from smoldpo.pairs.checks import GivenAnswer
from smoldpo.pairs.rank import ALL, Ranking, Score, choose_pairs
from smoldpo.utils.errors import UsageError


class Alphabetical:
    """Prefers the first in the alphabet; has no number for an answer."""

    name = "alphabetical"

    def __init__(self):
        self.asked = []

    def compare(self, _, a, b):
        self.asked.append((a, b))
        return Verdict(None) if "?" in (a, b) else Verdict(float(a < b), False)


def scores_of(ranking, texts):
    found = [ranking.verdicts(judge, "P", texts) for judge in ranking.judges]
    return ranking.scores("P", [GivenAnswer(text, True) for text in texts], found)


def test_scores_by_hand():
    judge = Alphabetical()
    ranking = Ranking.of(["length"], ["max_words=1"], [1.0, 2.0])
    ranking = Ranking([judge, *ranking.judges], ranking.checks, [3.0, 1.0, 2.0])
    first, second, third = scores_of(ranking, ["aa", "b b b", "aa"])
    assert judge.asked == [("aa", "b b b"), ("b b b", "aa")], "equal answers tie without asking"
    assert first == third
    # beats one of two and ties with the other; shorter than one, ties with the other; one word
    assert first.parts == {"alphabetical": 0.75, "length": 0.25, "max_words=1": 1.0}
    assert first.total == pytest.approx((3 * 0.75 + 0.25 + 2 * 1) / 6)
    assert second.parts == {"alphabetical": 0.0, "length": 1.0, "max_words=1": 0.0}
    assert first.passes and not second.passes


def test_what_a_judge_cannot_say_counts_for_nobody():
    ranking = Ranking([Alphabetical()], [], [1.0])
    assert [score.total for score in scores_of(ranking, ["?", "a", "b"])] == [0.5, 1.0, 0.0]


def given(*totals, failing=()):
    return [Score(total, {}, at not in failing) for at, total in enumerate(totals)]


TEXTS = ["one fox", "two lazy dogs", "three brown bears", "four"]


def test_best_against_worst():
    assert choose_pairs(TEXTS, given(0.2, 0.9, 0.1, 0.5)).pairs == [(1, 2)]
    assert choose_pairs(TEXTS, given(0.5, 0.9, 0.5, 0.9)).pairs == [(1, 0)], "the first of equals"
    assert choose_pairs(TEXTS, given(0.2, 0.9, 0.1, 0.5), margin=0.8).dropped == {"tie": 1}
    assert choose_pairs(TEXTS, given(0.3, 0.3, 0.3, 0.1 + 0.2)).dropped == {"tie": 1}


def test_the_better_answer_passes_every_check():
    assert choose_pairs(TEXTS, given(0.2, 0.9, 0.1, 0.5, failing=[1])).pairs == [(3, 2)]
    found = choose_pairs(TEXTS, given(0.2, 0.9, 0.1, 0.5, failing=range(4)))
    assert found.pairs == [] and found.dropped == {"all fail": 1}
    assert choose_pairs(TEXTS, given(0.9, 0.2, 0.9, 0.9, failing=[0, 2, 3])).dropped == {"tie": 1}


def test_near_identical_answers_and_those_without_text():
    texts = ["It rains in Oslo today, I hear.", "It rains in Oslo today, I hear!", "", " "]
    assert choose_pairs(texts, given(0.9, 0.1, 0.0, 0.0)).dropped == {"near-identical": 1}
    assert choose_pairs(texts, given(0.9, 0.1, 0.0, 0.0), near_identical=0.99).pairs == [(0, 1)]
    assert choose_pairs(["a", "", ""], given(1.0, 0.0, 0.0)).dropped == {"no text": 1}


def test_all_pairs_above_a_margin():
    found = choose_pairs(TEXTS, given(0.2, 0.9, 0.1, 0.5, failing=[0]), ALL, 0.25)
    assert found.pairs == [(1, 3), (1, 0), (1, 2), (3, 0), (3, 2)]
    assert found.dropped == {"tie": 1}


@pytest.mark.parametrize(
    ("judges", "checks", "weights", "message"),
    [
        ([], [], [], "give a --judge or a --check"),
        (["length"], ["ends", "ends"], [], "ends: is named twice"),
        (["length"], ["ends"], [1.0], "1 numbers for length, ends"),
        (["length"], ["ends"], [1.0, 0.0], "positive"),
        (["lenght"], ["ends"], [], "did you mean length"),
    ],
)
def test_what_cannot_rank_is_a_usage_error(judges, checks, weights, message):
    with pytest.raises(UsageError, match=message):
        Ranking.of(judges, checks, weights)
