"""Whether a policy's answers stopped ending, or began to repeat themselves. No torch here.

Both are means over answers to the same prompts, sampled with the same random numbers, so each is
tested prompt by prompt: the ends by McNemar's exact test, the repetition by random sign flips
(statistics.py). An alarm needs a change that is large enough to matter and has p < 0.05. A few
prompts raise none: p is below 0.05 only where six prompts changed, all of them the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from smoldpo.evaluation.answer_metrics import answer_metrics, repetition_of
from smoldpo.evaluation.headline import p_text
from smoldpo.evaluation.metrics import mean
from smoldpo.evaluation.schema import Alarm, AnswerChange, Estimate
from smoldpo.evaluation.statistics import (
    LEVEL,
    SIGNIFICANT,
    mean_interval,
    paired_test,
    sign_flip_test,
)

if TYPE_CHECKING:
    from smoldpo.models.generate import Answer

ENDED_DROP = 0.10
"""Share of the answers: a significant fall beyond it of those that end raises the alarm."""
REPETITION_RISE = 0.05
"""Share of an answer's 4-grams: likewise a rise of those that stood in it before."""
ADVICE = [
    "a smaller learning_rate, fewer epochs or a larger beta: all three keep the policy closer to "
    "the reference, whose answers did not do this",
    "rpo_alpha 1 (or loss_type sigmoid,sft), which adds the likelihood of the chosen answers to "
    "the loss, their end-of-turn token included",
    "ld_alpha (such as 0.5), where chosen answers are mostly the longer ones: the tokens by which "
    "one answer is longer then count less",
]
CUT_ANSWERS = (
    "a larger max_length, where data.json counts cut answers (chosen_truncated): they teach no end"
)


def ended_change(ours: Sequence[Answer], theirs: Sequence[Answer], seed: int) -> AnswerChange:
    """Of the share of answers that ended of themselves; one answer of each to each prompt."""
    new, old = ([float(answer.ended) for answer in side] for side in (ours, theirs))
    prompts = _prompts(new)
    test = paired_test(old, new, prompts)
    change = _change(new, old, seed)
    return AnswerChange(change=change, test=test.name, p=test.p)


def repetition_change(ours: Sequence[Answer], theirs: Sequence[Answer], seed: int) -> AnswerChange:
    """Of the share of an answer's 4-grams that stood in it before."""
    new, old = ([repetition_of(answer.text) for answer in side] for side in (ours, theirs))
    differences = [a - b for a, b in zip(new, old, strict=True)]
    p = sign_flip_test(differences, _prompts(new), seed)
    return AnswerChange(change=_change(new, old, seed), test="sign-flip test", p=p)


def answer_alarms(
    ours: Sequence[Answer], theirs: Sequence[Answer], max_new_tokens: int, seed: int
) -> tuple[AnswerChange, AnswerChange, list[Alarm]]:
    """The change of ends, that of repetition, and the alarms that they raise."""
    ended, repeats = ended_change(ours, theirs, seed), repetition_change(ours, theirs, seed)
    new, old = answer_metrics(ours), answer_metrics(theirs)
    alarms = []
    if ended.change.value < -ENDED_DROP and ended.p < SIGNIFICANT:
        text = (
            f"Fewer answers end by themselves within {max_new_tokens:,} tokens: "
            f"{_compared(new.ended, old.ended, len(ours))} {_evidence(ended)}."
        )
        alarms.append(Alarm(text=text, advice=[*ADVICE, CUT_ANSWERS]))
    if repeats.change.value > REPETITION_RISE and repeats.p < SIGNIFICANT:
        text = (
            "The answers repeat themselves more; share of their runs of four words that stood in "
            f"the same answer before: {_compared(new.repetition, old.repetition, len(ours))} "
            f"{_evidence(repeats)}."
        )
        alarms.append(Alarm(text=text, advice=ADVICE))
    return ended, repeats, alarms


def _compared(new: float, old: float, prompts: int) -> str:
    return f"the policy {new:.0%}, the reference {old:.0%}, on {prompts:,} prompts"


def _evidence(found: AnswerChange) -> str:
    low, high, points = found.change.low, found.change.high, 100 * found.change.value
    interval = (
        ""
        if low is None or high is None
        else (f", {LEVEL:.0%} interval {100 * low:+.0f} to {100 * high:+.0f}")
    )
    return f"({points:+.0f} points{interval}; {found.test}, {p_text(found.p)})"


def _change(new: Sequence[float], old: Sequence[float], seed: int) -> Estimate:
    differences = [a - b for a, b in zip(new, old, strict=True)]
    return Estimate.of(mean(differences), mean_interval(differences, _prompts(new), seed))


def _prompts(values: Sequence[float]) -> list[str]:
    """A group to each: the prompts are distinct."""
    return [str(number) for number in range(len(values))]
