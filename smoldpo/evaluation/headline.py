"""The answer in one sentence, and what it rests on in a few more. No torch here."""

from __future__ import annotations

import math
from typing import Literal

from smoldpo.evaluation.schema import Accuracy, Estimate, Evaluation
from smoldpo.evaluation.statistics import SIGNIFICANT
from smoldpo.utils.text import p_value

METRIC_SUFFIX = {
    "reward": "",
    "logp": " (by log-probability, summed)",
    "logp_per_token": " (by log-probability per token)",
}
P_IN_WORDS = (
    (0.001, "very unlikely to be chance"),
    (0.01, "unlikely to be chance"),
    (SIGNIFICANT, "probably not chance"),
    (0.2, "it may well be chance"),
    (math.inf, "it looks like chance"),
)


def p_in_words(p: float) -> str:
    """What a (corrected) p-value says, for people."""
    return next(words for bound, words in P_IN_WORDS if p < bound)


def how_often(p: float) -> str:
    """The p-value as a frequency: what it is a probability of, said in full."""
    if p > 0.5:
        return "if nothing had changed, a difference this large would be the rule"
    times = 1 / max(p, 1e-9)
    rounded = round(times) if times < 10 else round(times, 1 - math.ceil(math.log10(times)) + 1)
    least = "less than " if p < 1e-9 else "about "
    return (
        f"if nothing had changed, a difference this large would come up {least}once in "
        f"{rounded:,.0f} such evaluations"
    )


def p_text(p: float) -> str:
    """p for a sentence."""
    digits = p_value(p)
    return f"p {digits}" if digits.startswith("<") else f"p = {digits}"


def verdict(p_corrected: float, change: float) -> Literal["change", "no evidence", "worse"]:
    """`change` for the better, `worse`, or `no evidence` of either."""
    if p_corrected >= SIGNIFICANT:
        return "no evidence"
    return "change" if change > 0 else "worse"


def headline(evaluation: Evaluation) -> str:
    """The policy's accuracy before and after, and whether the change is chance."""
    accuracy, p = _main_accuracy(evaluation)
    old, new = accuracy.before.value, accuracy.after.value
    if evaluation.kind == "run":
        who, what, was = "The tuned model", "held-out pairs", f"before {old:.1%}"
    else:
        names = evaluation.names
        who, what, was = names.after, "pairs", f"{names.before} {old:.1%}"
    sentence = (
        f"{who} prefers the human-preferred answer in {new:.1%} of {evaluation.n:,} {what}"
        f"{METRIC_SUFFIX[evaluation.metric]}, {was}"
    )
    if evaluation.verdict == "no evidence":
        return f"{sentence}: no evidence of a change ({p_text(p)})."
    direction = "" if evaluation.verdict == "change" else "a change for the worse, "
    return f"{sentence}; {direction}{accuracy.words}: {p_text(p)}."


def explanations(evaluation: Evaluation) -> list[str]:
    """The test, the smallest change that could be seen, and what length alone gives."""
    accuracy, p = _main_accuracy(evaluation)
    lines = [
        f"{_capitalised(how_often(p))} ({accuracy.test}: {accuracy.improved:,} pairs improved, "
        f"{accuracy.worsened:,} worsened).",
    ]
    if evaluation.verdict == "no evidence":
        lines += _smallest_visible_change(accuracy.change)
    reward, before = evaluation.metric == "reward", accuracy.before
    if reward and before.low is None and before.value == 0.5:
        lines.append(
            f"{_capitalised(evaluation.names.before)}, policy and reference are equal: every "
            "implicit reward ties, which counts one half."
        )
    if not reward and evaluation.kind == "run":
        lines.append(
            "The loss compares with no reference, so there is no implicit reward; the "
            "log-probability of an answer falls with its length, that per token does not."
        )
    return [*lines, _against_length(evaluation, accuracy.after.value)]


def _main_accuracy(evaluation: Evaluation) -> tuple[Accuracy, float]:
    """The accuracy that the headline is about, and its corrected p."""
    accuracy = evaluation.accuracy[evaluation.metric]
    assert accuracy is not None and accuracy.p_corrected is not None
    return accuracy, accuracy.p_corrected


def _smallest_visible_change(change: Estimate) -> list[str]:
    """How small a change these pairs could have shown: half the interval."""
    if change.low is None or change.high is None:
        return []
    half = (change.high - change.low) / 2
    if not half:
        return ["Too few pairs changed, or none, to say how small a change could have been seen."]
    return [
        f"With these pairs, a change of less than about {100 * half:.0f} points could not be told "
        "from chance; more held-out pairs would narrow that."
    ]


def _against_length(evaluation: Evaluation, after: float) -> str:
    longer = evaluation.baselines["longer"] or 0.0
    which, best = ("longer", longer) if longer >= 0.5 else ("shorter", 1 - longer)
    sentence = f"Picking the {which} answer (in tokens) would be right in {best:.1%}"
    sentence += ", more than the model" if best > after else ""
    if evaluation.by_length and (balanced := evaluation.by_length.balanced):
        sentence += (
            "; with pairs where chosen is the shorter and the longer one weighing alike, the "
            f"accuracy is {balanced.after:.1%}, before {balanced.before or 0:.1%}"
        )
    return sentence + "."


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]
