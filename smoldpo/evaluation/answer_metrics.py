"""What a model's answers are like: length, ends, variety, repetition. No torch here.

A word is a run of characters without white space, in lower case; an n-gram is n words in a row
within one answer. Text that is written without spaces has few words by this, and its figures say
little.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from smoldpo.evaluation.metrics import mean
from smoldpo.evaluation.schema import Answers

if TYPE_CHECKING:
    from smoldpo.models.generate import Answer

Gram = tuple[str, ...]


def answer_metrics(answers: Sequence[Answer]) -> Answers:
    """Figures of a model's answers; at least one answer.

    tokens        mean number of tokens, the end-of-turn token included
    words         mean number of words
    ended         share of answers that ended of themselves
    distinct_n    distinct n-grams over all n-grams, of all answers together; None without any. From
                  Li et al. 2016, who divide by the number of words instead; by n-grams, 1 means
                  that none comes twice. It falls as there is more text: compare models on the same
                  prompts.
    repetition    mean over answers of the share of 4-grams seen earlier in the answer: seq-rep-4 of
                  Welleck et al. 2019, 1 - distinct / all. Fewer than four words count 0.

    Raises:
        ValueError: there are no answers.
    """
    if not answers:
        raise ValueError("no answers to measure")
    words = [_words(answer.text) for answer in answers]
    distinct = (_distinct([gram for w in words for gram in _grams(w, n)]) for n in (1, 2, 3))
    return Answers(
        tokens=mean([len(answer.ids) for answer in answers]),
        words=mean([len(w) for w in words]),
        ended=mean([answer.ended for answer in answers]),
        **{f"distinct_{n}": share for n, share in enumerate(distinct, 1)},
        repetition=mean([repetition(w) for w in words]),
    )


def repetition(words: Sequence[str]) -> float:
    """Share of an answer's 4-grams that stood in it before."""
    distinct = _distinct(_grams(words, 4))
    return 0.0 if distinct is None else 1.0 - distinct


def repetition_of(text: str) -> float:
    """`repetition` of an answer's text."""
    return repetition(_words(text))


def _words(text: str) -> list[str]:
    return text.lower().split()


def _distinct(grams: Sequence[Gram]) -> float | None:
    return len(set(grams)) / len(grams) if grams else None


def _grams(words: Sequence[str], size: int) -> list[Gram]:
    return [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]
