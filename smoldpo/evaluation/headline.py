"""The answer in one sentence, and what it rests on in a few more. No torch here."""

from __future__ import annotations

from typing import Any

from smoldpo.evaluation.statistics import SIGNIFICANT, how_often, p_text

HOW = {
    "reward": "",
    "logp": " (by log-probability, summed)",
    "logp_per_token": " (by log-probability per token)",
}


def verdict(accuracy: dict[str, Any]) -> str:
    """`change` for the better, `worse`, or `no evidence` of either, by the corrected p."""
    if accuracy["p_corrected"] >= SIGNIFICANT:
        return "no evidence"
    return "change" if accuracy["change"]["value"] > 0 else "worse"


def headline(evaluation: dict[str, Any]) -> str:
    """Which share of pairs the policy is right about, before and after, and whether that is chance."""
    metric = evaluation["metric"]
    accuracy = evaluation["accuracy"][metric]
    old, new = accuracy["before"]["value"], accuracy["after"]["value"]
    p = p_text(accuracy["p_corrected"])
    n = f"{evaluation['n']:,}"
    if evaluation["kind"] == "run":
        who, was = "The tuned model", f"before {old:.1%}"
    else:
        names = evaluation["names"]
        who, was = names["after"], f"{names['before']} {old:.1%}"
    said = (
        f"{who} prefers the human-preferred answer in {new:.1%} of {n} held-out pairs"
        f"{HOW[metric]}, {was}"
    )
    if evaluation["kind"] != "run":
        said = said.replace("held-out pairs", "pairs")
    if evaluation["verdict"] == "no evidence":
        return f"{said}: no evidence of a change ({p})."
    direction = "" if evaluation["verdict"] == "change" else "a change for the worse, "
    return f"{said}; {direction}{accuracy['words']}: {p}."


def explanations(evaluation: dict[str, Any]) -> list[str]:
    """What the sentence rests on: the test, what could be seen at all, what length alone would give."""
    metric = evaluation["metric"]
    accuracy = evaluation["accuracy"][metric]
    lines = [
        f"{_first_up(how_often(accuracy['p_corrected']))} ({accuracy['test']}: "
        f"{accuracy['improved']:,} pairs improved, {accuracy['worsened']:,} worsened).",
    ]
    if evaluation["verdict"] == "no evidence" and accuracy["change"]["low"] is not None:
        lines.append(_could_be_seen(accuracy["change"]))
    if (
        metric == "reward"
        and accuracy["before"]["low"] is None
        and accuracy["before"]["value"] == 0.5
    ):
        lines.append(
            f"{_first_up(evaluation['names']['before'])}, policy and reference are equal: every implicit "
            "reward ties, which counts one half."
        )
    if metric != "reward" and evaluation["kind"] == "run":
        lines.append(
            "The loss compares with no reference, so there is no implicit reward; the log-probability of an "
            "answer falls with its length, that per token does not."
        )
    lines.append(_against_length(evaluation))
    return lines


def _could_be_seen(change: dict[str, float]) -> str:
    """How small a change these pairs could have shown: half the interval."""
    reach = (change["high"] - change["low"]) / 2
    if not reach:
        return "Too few pairs changed, or none, to say how small a change could have been seen."
    return (
        f"With these pairs, a change of less than about {100 * reach:.0f} points could not be told from "
        "chance; more held-out pairs would narrow that."
    )


def _against_length(evaluation: dict[str, Any]) -> str:
    longer = evaluation["baselines"]["longer"]
    after = evaluation["accuracy"][evaluation["metric"]]["after"]["value"]
    which, best = ("longer", longer) if longer >= 0.5 else ("shorter", 1 - longer)
    said = f"Picking the {which} answer (in tokens) would be right in {best:.1%}"
    said += ", more than the model" if best > after else ""
    balanced = evaluation["by_length"]["balanced"]
    if balanced is not None:
        said += (
            f"; with pairs where chosen is the shorter and the longer one weighing alike, the accuracy is "
            f"{balanced['after']:.1%}, before {balanced['before']:.1%}"
        )
    return said + "."


def _first_up(text: str) -> str:
    return text[:1].upper() + text[1:]
