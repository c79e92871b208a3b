"""What a round of `iterate` gained, on held-out prompts. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from smoldpo.evaluation.answer_alarms import answer_alarms
from smoldpo.evaluation.headline import p_text
from smoldpo.evaluation.judges.base import judgement
from smoldpo.evaluation.metrics import mean
from smoldpo.evaluation.statistics import SIGNIFICANT, mean_interval, paired_test
from smoldpo.pairs.prompts import AskedPrompt
from smoldpo.pairs.rank import Ranking
from smoldpo.utils.text import p_value

if TYPE_CHECKING:
    from smoldpo.pairs.sample import DrawnAnswer, DrawnAnswers, SamplingSettings


@dataclass(frozen=True)
class WinRate:
    """How often one policy's answer scores higher than another's; a tie counts half."""

    value: float
    low: float
    high: float
    wins: int
    losses: int
    ties: int
    p: float
    """Of the sign test; 1 where all tie."""


@dataclass(frozen=True)
class PassingShare:
    """Shares of answers that pass every check: of the start, and of this round's policy."""

    start: float
    policy: float
    change: float
    low: float | None
    high: float | None
    test: str
    p: float


@dataclass(frozen=True)
class PolicyComparison:
    """A policy's answers against another's, to the same prompts with the same random numbers."""

    won: WinRate
    passing: PassingShare | None
    """None without checks."""
    alarms: list[str]
    """Where answers stopped ending or began to repeat themselves."""


@dataclass(frozen=True)
class RoundResult:
    """What a round gained over the start, and over the round before."""

    number: int
    pairs: int
    """Pairs that the round made, some of which its run held out."""
    against_start: PolicyComparison
    against_last: PolicyComparison

    @property
    def is_real(self) -> bool:
        """Whether the gain over the round before is one, at the usual level."""
        won = self.against_last.won
        return won.p < SIGNIFICANT and won.value > 0.5

    @property
    def sentence(self) -> str:
        """The gain, for people."""
        return f"round {self.number}, against the round before: {in_words(self.against_last.won)}"


def compare_policies(
    ranking: Ranking,
    prompts: Sequence[AskedPrompt],
    theirs: DrawnAnswers,
    ours: DrawnAnswers,
    sampling: SamplingSettings,
) -> PolicyComparison:
    """How `ours` does against `theirs`, by the first answer to each prompt that both answered.

    Raises:
        SmoldpoError: as judges and checks.
    """
    old, new = _by_prompt(theirs), _by_prompt(ours)
    both = [asked for asked in prompts if asked.key in old.keys() & new.keys()]
    pairs = [(asked.prompt, new[asked.key], old[asked.key]) for asked in both]
    verdicts = [ranking.prefer(prompt, a.given, b.given) for prompt, a, b in pairs]
    passing = None
    if ranking.checks:
        now = [float(ranking.passes(prompt, a.given)) for prompt, a, _ in pairs]
        was = [float(ranking.passes(prompt, b.given)) for prompt, _, b in pairs]
        passing = passing_share(was, now, sampling.seed)
    answers = [a.answer for _, a, _ in pairs], [b.answer for _, _, b in pairs]
    _, _, alarms = answer_alarms(*answers, sampling.max_new_tokens, sampling.seed)
    found = judgement("", verdicts)
    value, low, high = found.win_rate.value, found.win_rate.low, found.win_rate.high
    assert value is not None and low is not None and high is not None
    p = 1.0 if found.p is None else found.p
    won = WinRate(value, low, high, found.wins, found.losses, found.ties, p)
    return PolicyComparison(won, passing, [alarm.text for alarm in alarms])


def _by_prompt(drawn: DrawnAnswers) -> dict[str, DrawnAnswer]:
    return {
        asked.key: answers[0] for asked, answers in zip(drawn.prompts, drawn.answers, strict=True)
    }


def passing_share(was: Sequence[float], now: Sequence[float], seed: int) -> PassingShare:
    """Of one answer a prompt of each policy, whether it passes (1) or not (0)."""
    groups = [str(at) for at in range(len(was))]
    test = paired_test(was, now, groups)
    differences = [b - a for a, b in zip(was, now, strict=True)]
    low, high = mean_interval(differences, groups, seed) or (None, None)
    return PassingShare(mean(was), mean(now), mean(differences), low, high, test.name, test.p)


def report(
    rounds: Sequence[RoundResult],
    ranking: Ranking,
    held_out: int,
    kept: str | None,
    stopped: str,
) -> str:
    """All rounds, as Markdown."""
    lines = [
        "# Rounds",
        "",
        f"One answer to each of {held_out:,} held-out prompts, compared by "
        f"{', '.join(ranking.names)}. A tie counts half; intervals are 95%.",
        "",
        "| round | pairs | wins against the start | wins against the round before | p |",
        "| --: | --: | --- | --- | --- |",
    ]
    lines += [
        f"| {r.number} | {r.pairs:,} | {_won(r.against_start.won)} | {_won(r.against_last.won)} "
        f"| {p_value(r.against_last.won.p)} |"
        for r in rounds
    ]
    checked = [(r.number, r.against_start.passing) for r in rounds if r.against_start.passing]
    if checked:
        head = "| round | pass every check | start | change | p |"
        lines += ["", head, "| --: | --- | --- | --- | --- |"]
        lines += [
            f"| {number} | {p.policy:.1%} | {p.start:.1%} | {_points(p)} | {p_value(p.p)} |"
            for number, p in checked
        ]
    lines += [
        "",
        *(f"Alarm, round {r.number}: {text}" for r in rounds for text in r.against_start.alarms),
    ]
    if stopped:
        lines += ["", f"Ended: {stopped}. " + (f"Kept: {kept}." if kept else "No round is kept.")]
    return "\n".join(lines).rstrip() + "\n"


def in_words(won: WinRate) -> str:
    """A win rate, for a sentence."""
    return f"its answers win {_won(won)}, {p_text(won.p)}"


def _won(rate: WinRate) -> str:
    return f"{rate.value:.1%} ({rate.low:.1%} to {rate.high:.1%})"


def _points(share: PassingShare) -> str:
    if share.low is None or share.high is None:
        return f"{100 * share.change:+.1f}"
    return f"{100 * share.change:+.1f} ({100 * share.low:+.1f} to {100 * share.high:+.1f})"


def comparison_text(found: PolicyComparison, before: str, after: str, prompts: int) -> str:
    """What `smoldpo pairs compare` prints."""
    won, share = found.won, found.passing
    lines = [
        f"{after} against {before}, one answer each to {prompts:,} prompts; 95% intervals.",
        f"{in_words(won)} ({won.wins:,} won, {won.losses:,} lost, {won.ties:,} tied; sign test).",
    ]
    if share is not None:
        lines.append(
            f"pass every check: {share.policy:.1%}, {before} {share.start:.1%}; change "
            f"{_points(share)} points, {p_text(share.p)} ({share.test})."
        )
    return "\n".join([*lines, *(f"Alarm: {text}" for text in found.alarms)])
