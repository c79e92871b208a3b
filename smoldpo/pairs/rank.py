"""Which of a prompt's answers are better: judges and checks on one scale, and the pairs they make.

An answer's score is the weighted mean of numbers from 0 to 1: of a check what it finds, of a judge
the share of the prompt's other answers that the answer beats (a tie counts half).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from rapidfuzz import fuzz

from smoldpo.evaluation.judges import parse_judge
from smoldpo.evaluation.judges.base import Judge, ScoringJudge, Verdict, by_score
from smoldpo.evaluation.metrics import mean
from smoldpo.pairs.checks import Check, GivenAnswer, parse_check, passes
from smoldpo.types import Prompt
from smoldpo.utils.errors import UsageError

BEST_WORST, ALL = "best-worst", "all"
NO_TEXT, ALL_FAIL, TIE, NEAR_IDENTICAL = "no text", "all fail", "tie", "near-identical"
ROUNDING = 1e-9
"""Scores that differ by less are one score: sums of the same numbers in another order."""


@dataclass(frozen=True)
class Compared:
    """Answers a and b of a prompt, by their numbers, and what a judge made of them."""

    a: int
    b: int
    verdict: Verdict


@dataclass(frozen=True)
class Score:
    """An answer's score, the parts that it is made of by name, and whether it passes all checks."""

    total: float
    parts: dict[str, float]
    passes: bool


@dataclass(frozen=True)
class Ranking:
    """Judges and checks with their weights: one a judge, then one a check."""

    judges: Sequence[Judge]
    checks: Sequence[Check]
    weights: Sequence[float]

    @classmethod
    def of(
        cls, judges: Sequence[str], checks: Sequence[str], weights: Sequence[float] = ()
    ) -> Ranking:
        """From what a user names; models of judges are found now, and loaded when first asked.

        Raises:
            UsageError: nothing to rank by, an unknown name or one twice, or weights that do not
                fit.
            ModelError: as `parse_judge`.
        """
        names = [*judges, *checks]
        if not names:
            raise UsageError("nothing says which answer is better: give a --judge or a --check")
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UsageError(f"{twice}: is named twice; give it a weight instead")
        if weights and len(weights) != len(names):
            raise UsageError(f"--weights has {len(weights)} numbers for {', '.join(names)}")
        if not all(weight > 0 and math.isfinite(weight) for weight in weights):
            raise UsageError("--weights must be positive numbers")
        parsed = [parse_check(spec) for spec in checks]  # first: they need no model
        return cls([parse_judge(spec) for spec in judges], parsed, weights or [1.0] * len(names))

    @property
    def names(self) -> list[str]:
        """The judges, then the checks."""
        return [*(judge.name for judge in self.judges), *(check.name for check in self.checks)]

    def verdicts(self, judge: Judge, prompt: Prompt, texts: Sequence[str]) -> list[Compared]:
        """What a judge makes of each two answers; of equal texts nobody is asked.

        Raises:
            SmoldpoError: as the judge.
        """
        scores = (
            [judge.score(prompt, text) for text in texts] if isinstance(judge, ScoringJudge) else []
        )
        found = []
        for a, b in itertools.combinations(range(len(texts)), 2):
            if texts[a] == texts[b]:
                verdict = Verdict(0.5)
            elif scores:
                verdict = by_score(scores[a], scores[b])
            else:
                verdict = judge.compare(prompt, texts[a], texts[b])
            found.append(Compared(a, b, verdict))
        return found

    def scores(
        self,
        prompt: Prompt,
        answers: Sequence[GivenAnswer],
        verdicts: Sequence[Sequence[Compared]],
    ) -> list[Score]:
        """A score an answer; `verdicts` are those of each judge.

        Raises:
            SmoldpoError: as the checks.
        """
        columns = [_win_rates(found, len(answers)) for found in verdicts]
        checked = [[check(prompt, answer) for answer in answers] for check in self.checks]
        names = self.names
        found = []
        for at in range(len(answers)):
            values = [column[at] for column in (*columns, *checked)]
            total = math.fsum(w * v for w, v in zip(self.weights, values, strict=True))
            found.append(
                Score(
                    total / math.fsum(self.weights),
                    dict(zip(names, values, strict=True)),
                    passes([column[at] for column in checked]),
                )
            )
        return found

    def passes(self, prompt: Prompt, answer: GivenAnswer) -> bool:
        """Whether an answer passes every check."""
        return passes([check(prompt, answer) for check in self.checks])

    def prefer(self, prompt: Prompt, a: GivenAnswer, b: GivenAnswer) -> Verdict:
        """Which of two answers to a prompt has the higher score.

        Raises:
            SmoldpoError: as judges and checks.
        """
        found = [self.verdicts(judge, prompt, [a.text, b.text]) for judge in self.judges]
        ours, theirs = self.scores(prompt, [a, b], found)
        lead = ours.total - theirs.total
        disagreed = [c.verdict.disagreed for both in found for c in both]
        told = [each for each in disagreed if each is not None]
        return Verdict(
            0.5 if abs(lead) <= ROUNDING else float(lead > 0), any(told) if told else None
        )


def _win_rates(found: Sequence[Compared], answers: int) -> list[float]:
    """Of each answer the share of those compared with it that it beat; ½ where none was."""
    won: list[list[float]] = [[] for _ in range(answers)]
    for compared in found:
        if compared.verdict.score is not None:
            won[compared.a].append(compared.verdict.score)
            won[compared.b].append(1 - compared.verdict.score)
    return [mean(each) if each else 0.5 for each in won]


@dataclass
class ChosenPairs:
    """Pairs of answers by their numbers, the better one first; and why others make none."""

    pairs: list[tuple[int, int]] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)
    """For a prompt without a pair, one reason; with `all`, each two answers that make none."""


def choose_pairs(
    texts: Sequence[str],
    scores: Sequence[Score],
    how: str = BEST_WORST,
    margin: float = 0.0,
    near_identical: float = 0.95,
) -> ChosenPairs:
    """Which answers to a prompt make pairs.

    Args:
        how: the best against the worst, or all whose scores are more than `margin` apart.
        near_identical: likeness (Indel, 0 to 1) from which two answers make no pair.

    An answer that fails a check is never the better one, and one without text is in no pair.
    """
    usable = [at for at, text in enumerate(texts) if text.strip()]
    if len(usable) < 2:
        return ChosenPairs(dropped={NO_TEXT: 1})
    if not any(scores[at].passes for at in usable):
        return ChosenPairs(dropped={ALL_FAIL: 1})
    ordered = sorted(usable, key=lambda at: -scores[at].total)  # of equals the first drawn first
    both = [(a, b) for a, b in itertools.combinations(ordered, 2)]
    differing = [
        (a, b)
        for a, b in both
        if scores[a].passes and scores[a].total - scores[b].total > margin + ROUNDING
    ]
    distinct = [
        (a, b) for a, b in differing if fuzz.ratio(texts[a], texts[b]) < 100 * near_identical
    ]
    if how == BEST_WORST:
        if not distinct:
            return ChosenPairs(dropped={NEAR_IDENTICAL if differing else TIE: 1})
        widest = max(distinct, key=lambda pair: scores[pair[0]].total - scores[pair[1]].total)
        return ChosenPairs([widest])
    dropped = {TIE: len(both) - len(differing), NEAR_IDENTICAL: len(differing) - len(distinct)}
    return ChosenPairs(distinct, {why: n for why, n in dropped.items() if n})
