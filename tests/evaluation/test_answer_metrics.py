"""Measures of answers, against values worked by hand."""

import subprocess
import sys

import pytest

from smoldpo.evaluation.answer_metrics import answer_metrics, repetition
from smoldpo.models.generate import Answer


def answer(text: str, tokens: int = 1, ended: bool = True) -> Answer:
    return Answer(tuple(range(tokens)), text, ended)


def test_answer_metrics_by_hand():
    found = answer_metrics(
        [answer("the cat The cat sat", tokens=6), answer("the dog", tokens=3, ended=False)]
    )
    assert found.as_json() == {
        "tokens": 4.5,
        "words": 3.5,
        "ended": 0.5,
        "distinct_1": 4 / 7,  # the cat sat dog, of 7 words
        "distinct_2": 4 / 5,  # the-cat twice; no bigram from one answer to the next
        "distinct_3": 1.0,
        "repetition": 0.0,
    }


def test_repetition_by_hand():
    assert repetition(list("abcde")) == 0.0
    assert repetition(list("abcdabcd")) == pytest.approx(1 / 5)  # abcd bcda cdab dabc abcd
    assert repetition(["x"] * 13) == pytest.approx(9 / 10)
    assert repetition(list("abc")) == 0.0 and repetition([]) == 0.0
    assert answer_metrics(
        [answer("x " * 13), answer("A b c d a B c d"), answer("short")]
    ).repetition == pytest.approx((0.9 + 0.2 + 0) / 3)


def test_variety_counts_over_all_answers():
    assert answer_metrics([answer("yes"), answer("Yes"), answer("no")]).distinct_1 == 2 / 3


def test_empty_answers_have_no_variety_to_speak_of():
    found = answer_metrics([answer("", tokens=1), answer("", tokens=1)])
    assert found.words == 0.0 and found.tokens == 1.0 and found.repetition == 0.0
    assert found.distinct_1 is found.distinct_2 is found.distinct_3 is None
    with pytest.raises(ValueError):
        answer_metrics([])


def test_answer_metrics_import_no_torch():
    code = "import sys, smoldpo.evaluation.answer_metrics; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
