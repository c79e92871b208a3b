"""What an answer must be, told without a model. No torch here.

    json              it is JSON, and nothing else (a fence of ``` around it may stand)
    max_words=50      at most so many words; min_words=5: at least
    contains=TEXT     the text stands in it, whatever its case
    regex=PATTERN     the pattern is found in it (the `regex` module's, with a time limit)
    ends              the model ended it itself, and it was not cut off at --max-new-tokens
    no_repetition     no run of four words comes twice
    module:function   a Python function of prompt and answer, as bool or as a number from 0 to 1

An answer without text passes none of them: it would pass most for the wrong reason.
"""

from __future__ import annotations

import importlib
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smoldpo.evaluation.answer_metrics import repetition_of
from smoldpo.types import Prompt
from smoldpo.utils.errors import SmoldpoError, UsageError, nearest

KNOWN = ("json", "max_words", "min_words", "contains", "regex", "ends", "no_repetition")
SECONDS = 2.0
"""Of one search for a pattern: some patterns take centuries on some texts."""
PASSES = 0.5
"""From here on a function's number means that the answer passes."""
FENCE = re.compile(r"\A\s*```[a-z]*\s*\n(.*?)\n?\s*```\s*\Z", re.DOTALL)


@dataclass(frozen=True)
class GivenAnswer:
    """An answer as checks see it."""

    text: str
    ended: bool
    """Whether the model ended it itself."""


@dataclass(frozen=True)
class Check:
    """A named test of an answer, which gives a number from 0 (fails) to 1."""

    name: str
    _test: Callable[[Prompt, GivenAnswer], float]

    def __call__(self, prompt: Prompt, answer: GivenAnswer) -> float:
        """The number; 0 for an answer without text.

        Raises:
            SmoldpoError: the check itself fails on this answer.
        """
        return self._test(prompt, answer) if answer.text.strip() else 0.0


def parse_check(spec: str) -> Check:
    """The check that a user named.

    Raises:
        UsageError: there is no such check, or its value is none.
    """
    name, equals, value = spec.partition("=")
    if name in ("max_words", "min_words"):
        return Check(spec, _words(name, value, spec))
    if name in ("contains", "regex"):
        if not value:
            raise UsageError(f"check {spec}: needs what to look for, such as {name}=yes")
        return Check(spec, _contains(value) if name == "contains" else _regex(value))
    if name in ("json", "ends", "no_repetition"):
        if equals:
            raise UsageError(f"check {name}: takes no value, and {value!r} was given")
        tests = {"json": _is_json, "ends": _ends, "no_repetition": _no_repetition}
        return Check(name, tests[name])
    if ":" in name:
        return Check(spec, _function(spec))
    raise UsageError(
        f"check {spec}: there is none of this name{nearest(name, KNOWN)}; there are "
        f"{', '.join(KNOWN)}, and module:function for one of your own"
    )


def _words(name: str, value: str, spec: str) -> Callable[[Prompt, GivenAnswer], float]:
    if not (value.isdecimal() and int(value) > 0):
        raise UsageError(f"check {spec}: needs a number of words, such as {name}=50")
    limit = int(value)

    def test(_: Prompt, answer: GivenAnswer) -> float:
        words = len(answer.text.split())
        return float(words <= limit if name == "max_words" else words >= limit)

    return test


def _contains(value: str) -> Callable[[Prompt, GivenAnswer], float]:
    wanted = value.casefold()
    return lambda _, answer: float(wanted in answer.text.casefold())


def _regex(pattern: str) -> Callable[[Prompt, GivenAnswer], float]:
    import regex  # Python's own `re` has no time limit

    try:
        compiled = regex.compile(pattern)
    except regex.error as error:
        raise UsageError(f"check regex={pattern}: is no pattern: {error}") from None

    def test(_: Prompt, answer: GivenAnswer) -> float:
        try:
            return float(compiled.search(answer.text, timeout=SECONDS) is not None)
        except TimeoutError:
            raise SmoldpoError(
                f"check regex={pattern}: took more than {SECONDS:.0f} s on an answer of "
                f"{len(answer.text):,} characters; write it without repetitions inside "
                "repetitions, such as (a+)+"
            ) from None

    return test


def _is_json(_: Prompt, answer: GivenAnswer) -> float:
    fenced = FENCE.match(answer.text)
    try:
        json.loads(fenced[1] if fenced else answer.text)
    except (ValueError, RecursionError):
        return 0.0
    return 1.0


def _ends(_: Prompt, answer: GivenAnswer) -> float:
    return float(answer.ended)


def _no_repetition(_: Prompt, answer: GivenAnswer) -> float:
    return float(repetition_of(answer.text) == 0)


def _function(spec: str) -> Callable[[Prompt, GivenAnswer], float]:
    """A function of the user's own, in a module of the working folder or an installed one."""
    module, _, name = spec.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever a module of the user's raises when it is imported
        raise UsageError(f"check {spec}: cannot be imported: {error}") from None
    if not callable(function):
        raise UsageError(f"check {spec}: is no function")

    def test(prompt: Prompt, answer: GivenAnswer) -> float:
        return _number(spec, function(prompt, answer.text))

    return test


def _number(spec: str, value: Any) -> float:
    if not isinstance(value, bool | int | float) or not 0 <= value <= 1 or math.isnan(value):
        raise SmoldpoError(
            f"check {spec}: returned {value!r}; it is to return True, False, or a number from 0 "
            "to 1"
        )
    return float(value)


def passes(values: Sequence[float]) -> bool:
    """Whether an answer passes all checks, given what each found."""
    return all(value >= PASSES for value in values)
