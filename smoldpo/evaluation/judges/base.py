"""Which of two answers is better: one protocol for all judges, and the win rate. No torch here.

Answer a is the policy's, b the reference's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from smoldpo.evaluation.metrics import mean
from smoldpo.evaluation.schema import Judgement, WinRate
from smoldpo.evaluation.statistics import sign_test, wilson
from smoldpo.types import Advance, Prompt, no_progress
from smoldpo.utils.errors import ModelError


@dataclass(frozen=True)
class Verdict:
    """What a judge made of two answers."""

    score: float | None
    """For a: 1 better, 0 worse, 0.5 a tie; None where what the judge said cannot be understood."""
    disagreed: bool | None = None
    """Whether the judge disagreed with itself in swapped order; None if asked once."""


class Judge(Protocol):
    """Anything that compares two answers to a prompt."""

    name: str
    """What people read beside its figures."""

    def compare(self, prompt: Prompt, a: str, b: str) -> Verdict:
        """Whether a is the better answer."""
        ...


@runtime_checkable
class ScoringJudge(Judge, Protocol):
    """A judge that gives each answer a number, so that n answers need no n² comparisons."""

    def score(self, prompt: Prompt, answer: str) -> float:
        """A number that is higher for a better answer to the same prompt."""
        ...


class LengthJudge:
    """The answer with more characters wins: a baseline, for many judges favour length."""

    name = "length"

    def compare(self, prompt: Prompt, a: str, b: str) -> Verdict:
        """As `Judge.compare`."""
        return by_score(len(a), len(b))

    def score(self, _: Prompt, answer: str) -> float:
        """Its characters."""
        return float(len(answer))


def by_score(a: float, b: float) -> Verdict:
    """The verdict of a judge that gives each answer a number; only equal numbers tie.

    Raises:
        ModelError: a score is not a number, so nothing can be said.
    """
    if math.isnan(a) or math.isnan(b):
        raise ModelError("the judge gave an answer no number (NaN); its weights must be damaged")
    return Verdict(0.5 if a == b else float(a > b))


def compare_all(
    judge: Judge,
    prompts: Sequence[Prompt],
    a: Sequence[str],
    b: Sequence[str],
    advance: Advance = no_progress,
) -> list[Verdict]:
    """A verdict on each prompt's two answers, in order; errors as the judge's."""
    verdicts = []
    for prompt, ours, theirs in zip(prompts, a, b, strict=True):
        verdicts.append(judge.compare(prompt, ours, theirs))
        advance(1)
    return verdicts


def judgement(judge: str, verdicts: Sequence[Verdict]) -> Judgement:
    """How often a won, as evaluation.json has it; None where there is no verdict to tell from."""
    known = [verdict for verdict in verdicts if verdict.score is not None]
    wins, losses, ties = (sum(v.score == score for v in known) for score in (1, 0, 0.5))
    n = len(known)
    low, high = wilson(wins + ties / 2, n) if n else (None, None)
    in_both_orders = [v.disagreed for v in known if v.disagreed is not None]
    return Judgement(
        judge=judge,
        n=n,
        wins=wins,
        losses=losses,
        ties=ties,
        win_rate=WinRate(value=(wins + ties / 2) / n if n else None, low=low, high=high),
        p=sign_test(wins, losses) if wins + losses else None,
        disagreement=mean(in_both_orders) if in_both_orders else None,
        failed=len(verdicts) - n,
    )
