"""Checks of answers, which need no model."""

import re

import pytest

from smoldpo.pairs.checks import GivenAnswer, parse_check
from smoldpo.utils.errors import SmoldpoError, UsageError

CASES = {
    "json": (['{"a": [1, 2]}', '```json\n{"a": 1}\n```', "3"], ["{'a': 1}", "See: {}", "a"]),
    "max_words=3": (["one two three", "one"], ["one two three four"]),
    "min_words=2": (["one two"], ["one"]),
    "contains=Ça=va": (["et ÇA=VA bien"], ["ca va"]),
    r"regex=^\d+ eggs?$": (["12 eggs", "1 egg"], ["12 hens", "eggs"]),
    "no_repetition": (["a b c a b c", "a b c d"], ["a b c d and A b\nc d"]),
}


@pytest.mark.parametrize("spec", CASES)
def test_what_passes_and_what_does_not(spec):
    check = parse_check(spec)
    good, bad = CASES[spec]
    assert [check("P", GivenAnswer(text, False)) for text in good] == [1.0] * len(good)
    assert [check("P", GivenAnswer(text, True)) for text in bad] == [0.0] * len(bad)
    assert check.name == spec


def test_ends_is_what_the_model_did():
    check = parse_check("ends")
    assert check("P", GivenAnswer("Yes.", True)) == 1.0
    assert check("P", GivenAnswer("Yes.", False)) == 0.0


@pytest.mark.parametrize("spec", ["ends", "max_words=3", "no_repetition", "regex=^$"])
def test_an_answer_without_text_passes_nothing(spec):
    assert parse_check(spec)("P", GivenAnswer(" \n", True)) == 0.0


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("max_wrods=5", r"did you mean max_words\?.*no_repetition.*module:function"),
        ("max_words", "needs a number of words"),
        ("max_words=0", "needs a number of words"),
        ("max_words=-1", "needs a number of words"),
        ("contains=", "needs what to look for"),
        ("regex=(", "is no pattern"),
        ("ends=yes", "takes no value"),
        ("no.such.module:f", "cannot be imported"),
        ("math:no_such", "cannot be imported"),
        ("math:pi", "is no function"),
    ],
)
def test_what_is_no_check_is_a_usage_error(spec, message):
    with pytest.raises(UsageError, match=message):
        parse_check(spec)


def test_a_pattern_that_would_take_centuries_is_told(monkeypatch):
    monkeypatch.setattr("smoldpo.pairs.checks.SECONDS", 0.05)
    check = parse_check(r"regex=^(a|aa)+$")
    with pytest.raises(SmoldpoError, match="took more than"):
        check("P", GivenAnswer("a" * 60 + "b", True))


def test_a_function_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "polite_test_module.py").write_text(
        "def thanks(prompt, answer):\n    return 'thank' in answer.lower()\n"
        "def share(prompt, answer):\n    return answer.count('a') / 2\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/nowhere"])
    check = parse_check("polite_test_module:thanks")
    assert [check("P", GivenAnswer(text, True)) for text in ("Thank you", "No")] == [1.0, 0.0]
    share = parse_check("polite_test_module:share")
    assert share("P", GivenAnswer("a", True)) == 0.5
    with pytest.raises(SmoldpoError, match=re.escape("returned 1.5; it is to return")):
        share("P", GivenAnswer("aaa", True))
