"""From one score a pair before and after to everything that is said about them; no torch here.

    scores -> accuracy three ways, each with an interval; the change with an interval and a test
           -> baselines, slices, calibration, drift                        (slices.py, slices.py)
           -> one sentence                                                 (headline.py)

"Before" and "after" are a policy's start and end, or two models A and B on the same pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from smoldpo.evaluation.headline import explanations, headline, verdict
from smoldpo.evaluation.metrics import METRICS, PairFacts, PairScore, accuracies, wins
from smoldpo.evaluation.slices import (
    Sliced,
    baselines,
    calibration,
    drift,
    margin_histograms,
    share_with_interval,
)
from smoldpo.evaluation.statistics import LEVEL, holm, in_words, mean_interval, paired_test


@dataclass(frozen=True)
class Compared:
    """What is compared: one training's before and after, or models A and B."""

    kind: str = "run"
    before: str = "before"
    after: str = "after"


RUN = Compared()


def analyse(
    before: Sequence[PairScore],
    after: Sequence[PairScore],
    facts: Sequence[PairFacts],
    beta: float,
    seed: int,
    compared: Compared = RUN,
    logistic: bool = True,
) -> dict[str, Any]:
    """What evaluation.json holds, but for answers and judges.

    Args:
        before, after: of the same pairs in the same order, each with a reference or none with one.
        seed: of the bootstrap.
        logistic: whether σ(margin) is what the loss makes of a margin, as DPO's does; else there is nothing
            to be calibrated.
    """
    has_reference = all(s.margins["reward"] is not None for s in (*before, *after))
    names = [name for name in METRICS if has_reference or name != "reward"]
    metric = "reward" if has_reference else "logp"
    accuracy = _accuracy(names, before, after, facts, seed)
    sliced = Sliced(metric, before, after, facts)
    found: dict[str, Any] = {
        "n": len(after),
        "prompts": len({fact.prompt for fact in facts}),
        "beta": beta,
        "kind": compared.kind,
        "names": {"before": compared.before, "after": compared.after},
        "metric": metric,
        "level": LEVEL,
        "comparisons": len(names),
        "correction": "Holm",
        "before": {"accuracy": accuracies(before)},
        "after": {"accuracy": accuracies(after)},
        "accuracy": accuracy,
        "baselines": baselines(after),
        "by_length": sliced.by_length(),
        "by_length_difference": sliced.by_length_difference(),
        "slices": {name: sliced.by_fact(name) for name in ("source", "category")},
        "calibration": calibration(after, facts, beta) if has_reference and logistic else None,
        "drift": drift(before, after, facts, seed),
        "margins": _margins(before, after, beta) if has_reference else None,
        "logp_margins": margin_histograms(before, after, lambda s: s.margins["logp"] or 0.0),
    }
    found["verdict"] = verdict(accuracy[metric])
    found["headline"] = headline(found)
    found["explanations"] = explanations(found)
    return found


def describe(scores: Sequence[PairScore], facts: Sequence[PairFacts]) -> dict[str, Any]:
    """What can be said about one model alone: accuracies with intervals, baselines, slices."""
    groups = [fact.prompt for fact in facts]
    found = accuracies(scores)
    known = [name for name in METRICS if found[name] is not None]
    sliced = Sliced("reward" if "reward" in known else "logp", None, scores, facts)
    return {
        "n": len(scores),
        "prompts": len(set(groups)),
        "accuracy": found,
        "level": LEVEL,
        "intervals": {
            name: share_with_interval(wins(scores, name), groups) if name in known else None
            for name in METRICS
        },
        "baselines": baselines(scores),
        "by_length": sliced.by_length(),
        "slices": {name: sliced.by_fact(name) for name in ("source", "category")},
    }


def pair_rows(
    before: Sequence[PairScore], after: Sequence[PairScore], facts: Sequence[PairFacts]
) -> list[dict[str, Any]]:
    """One row a pair: what evaluation.json keeps to compute everything anew."""
    return [
        {"id": new.id, **asdict(fact), "before": old.as_row(), "after": new.as_row()}
        for old, new, fact in zip(before, after, facts, strict=True)
    ]


def _accuracy(
    names: Sequence[str],
    before: Sequence[PairScore],
    after: Sequence[PairScore],
    facts: Sequence[PairFacts],
    seed: int,
) -> dict[str, Any]:
    groups = [fact.prompt for fact in facts]
    found: dict[str, Any] = {}
    for name in names:
        old, new = wins(before, name), wins(after, name)
        change = [b - a for a, b in zip(old, new, strict=True)]
        low, high = mean_interval(change, groups, seed) or (None, None)
        test = paired_test(old, new, groups)
        found[name] = {
            "before": share_with_interval(old, groups),
            "after": share_with_interval(new, groups),
            "change": {"value": math.fsum(change) / len(change), "low": low, "high": high},
            "improved": test.improved,
            "worsened": test.worsened,
            "test": test.name,
            "p": test.p,
        }
    corrected = holm([found[name]["p"] for name in names])
    for name, p in zip(names, corrected, strict=True):
        found[name] |= {"p_corrected": p, "words": in_words(p)}
    return found


def _margins(
    before: Sequence[PairScore], after: Sequence[PairScore], beta: float
) -> dict[str, Any]:
    return margin_histograms(before, after, lambda s: beta * (s.margins["reward"] or 0.0))
