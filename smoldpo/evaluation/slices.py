"""Where a model is right: by length, by source and category, by size of margin. No torch here.

Many preference sets prefer the longer answer, so an accuracy is read beside what picking the longer would
give, and beside the accuracy among pairs where chosen is the shorter one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from smoldpo.evaluation.metrics import PairFacts, PairScore, wins
from smoldpo.evaluation.statistics import effective_size, mean_interval, wilson

BINS = 10
SMALLEST_BIN = 8
"""Fewer pairs than this to a bin say nothing; there are fewer bins then."""
MOST_SLICES = 20


def share_with_interval(scores: Sequence[float], groups: Sequence[str]) -> dict[str, float | None]:
    """The mean of 0, ½, 1 scores with Wilson's interval; none where all tie: that is no observation."""
    value = math.fsum(scores) / len(scores)
    if all(score == 0.5 for score in scores):
        return {"value": value, "low": None, "high": None}
    size = effective_size(scores, groups)
    low, high = wilson(value * size, size)
    return {"value": value, "low": low, "high": high}


def baselines(scores: Sequence[PairScore]) -> dict[str, float]:
    """Accuracy of picking the answer with more tokens, with fewer, and of a coin."""
    longer = [_longer(score) for score in scores]
    share = math.fsum(longer) / len(longer)
    return {"longer": share, "shorter": 1 - share, "coin": 0.5}


def _longer(score: PairScore) -> float:
    difference = score.chosen_tokens - score.rejected_tokens
    return 0.5 if difference == 0 else float(difference > 0)


class Sliced:
    """One metric after, and before if there is a before, cut into slices of pairs."""

    def __init__(
        self,
        metric: str,
        before: Sequence[PairScore] | None,
        after: Sequence[PairScore],
        facts: Sequence[PairFacts],
    ):
        self.metric, self.scores, self.facts = metric, after, facts
        self.before = None if before is None else wins(before, metric)
        self.after = wins(after, metric)

    def slice(self, where: Sequence[int]) -> dict[str, Any]:
        """Number of pairs, and accuracy before and after, of the pairs at these indices."""
        if not len(where):
            return {"n": 0, "before": None, "after": None}
        groups = [self.facts[i].prompt for i in where]
        return {
            "n": len(where),
            "before": self._before(where),
            "after": share_with_interval([self.after[i] for i in where], groups),
        }

    def _before(self, where: Sequence[int]) -> float | None:
        if self.before is None:
            return None
        return math.fsum(self.before[i] for i in where) / len(where)

    def by_length(self) -> dict[str, Any]:
        """Pairs where chosen has fewer tokens, more, or as many; and the mean of the first two."""
        sides = {"chosen_shorter": 0.0, "chosen_longer": 1.0, "equal": 0.5}
        found: dict[str, Any] = {
            name: self.slice([i for i, score in enumerate(self.scores) if _longer(score) == value])
            for name, value in sides.items()
        }
        both = [found["chosen_shorter"], found["chosen_longer"]]
        balanced = None
        if all(side["n"] for side in both):
            balanced = {
                "before": None if self.before is None else sum(side["before"] for side in both) / 2,
                "after": sum(side["after"]["value"] for side in both) / 2,
            }
        return {"metric": self.metric, **found, "balanced": balanced}

    def by_length_difference(self) -> list[dict[str, Any]]:
        """Bins of equal size along chosen minus rejected, in tokens."""
        difference = [s.chosen_tokens - s.rejected_tokens for s in self.scores]
        found = []
        for where in _bins(difference):
            part = self.slice(where)
            after = part["after"]
            found.append(
                {
                    "low": difference[where[0]],
                    "high": difference[where[-1]],
                    "n": part["n"],
                    "before": part["before"],
                    "value": after["value"],
                    "low_ci": after["low"],
                    "high_ci": after["high"],
                }
            )
        return found

    def by_fact(self, name: str) -> list[dict[str, Any]]:
        """Slices by `source` or `category`, the largest first; empty where there is one alone."""
        where: dict[str, list[int]] = {}
        for index, fact in enumerate(self.facts):
            where.setdefault(getattr(fact, name) or "(none)", []).append(index)
        if len(where) < 2:
            return []
        largest = sorted(where.items(), key=lambda item: (-len(item[1]), item[0]))
        return [{"name": key, **self.slice(indices)} for key, indices in largest[:MOST_SLICES]]


def calibration(
    scores: Sequence[PairScore], facts: Sequence[PairFacts], beta: float
) -> dict[str, Any]:
    """Implicit-reward margin against observed accuracy, in bins of equal size by its absolute value.

    The reward model that DPO implies gives the side it prefers a probability of σ(β|margin|) (Rafailov et
    al. 2023, eq. 1 with the rewards of eq. 5). `error` is the expected calibration error: the mean over
    pairs of |predicted - observed| of their bin (Naeini et al. 2015).
    """
    right = wins(scores, "reward")
    margins = [beta * abs(score.margins["reward"] or 0.0) for score in scores]
    bins = []
    for where in _bins(margins):
        predicted = math.fsum(_sigmoid(margins[i]) for i in where) / len(where)
        observed = share_with_interval([right[i] for i in where], [facts[i].prompt for i in where])
        bins.append(
            {
                "n": len(where),
                "margin": math.fsum(margins[i] for i in where) / len(where),
                "predicted": predicted,
                "observed": observed["value"],
                "low": observed["low"],
                "high": observed["high"],
            }
        )
    error = sum(b["n"] * abs(b["predicted"] - b["observed"]) for b in bins) / len(scores)
    return {"error": error, "bins": bins}


def margin_histograms(
    before: Sequence[PairScore], after: Sequence[PairScore], margin: Callable[[PairScore], float]
) -> dict[str, Any]:
    """How margins are spread before and after, over the same edges; the ends hold what lies beyond."""
    both = {
        "before": [margin(score) for score in before],
        "after": [margin(score) for score in after],
    }
    reach = float(np.percentile(np.abs(both["before"] + both["after"]), 99)) or 1.0
    edges = np.linspace(-reach, reach, 42)
    return {
        name: {
            "edges": [round(float(edge), 6) for edge in edges],
            "counts": np.histogram(np.clip(values, -reach, reach), edges)[0].tolist(),
        }
        for name, values in both.items()
    }


def _bins(values: Sequence[float]) -> list[list[int]]:
    """Indices in the order of their values, cut into up to BINS parts of nearly equal size."""
    order = sorted(range(len(values)), key=values.__getitem__)
    count = max(1, min(BINS, len(order) // SMALLEST_BIN))
    return [part.tolist() for part in np.array_split(np.array(order), count) if len(part)]


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# How far the policy moved: log-probabilities of chosen and rejected, and an alarm when chosen falls.
#
# DPO rewards the difference alone, so it is content when both sides become less likely and rejected falls
# faster. Then accuracy rises while the model becomes less likely to say what people preferred.


FALL = 0.02
"""Nats per chosen token: a fall beyond it, that is not chance, raises the alarm; 2% in perplexity."""
SIDES = ("chosen", "rejected")

ADVICE = (
    "a smaller learning_rate or fewer epochs: the fall grows with how far the policy moves",
    "another beta: a larger one holds the policy closer to the reference; a smaller one asks for smaller "
    "margins before a pair counts as learnt, and often needs fewer steps",
    "rpo_alpha 1, which adds the likelihood of the chosen answers to the loss (or loss_type sigmoid,sft)",
    "a loss made against the fall (docs/losses.md): loss_type dpop makes every fall of a chosen answer cost, "
    "apo_zero draws chosen up and rejected down each on its own",
    "pairs whose two answers differ more: nearly identical ones share the tokens that are pushed down",
)


def drift(
    before: Sequence[PairScore], after: Sequence[PairScore], facts: Sequence[PairFacts], seed: int
) -> dict[str, Any]:
    """Mean log-probabilities before and after, per answer and per token, with intervals by prompt.

    Log-probabilities are in nats, summed over an answer's tokens. `alarm` is a sentence or None.
    """
    groups = [fact.prompt for fact in facts]
    found: dict[str, Any] = {side: _side(side, before, after, groups, seed) for side in SIDES}
    found["perplexity_chosen"] = {
        "before": _perplexity(before),
        "after": _perplexity(after),
    }
    found["alarm"] = _alarm(found)
    found["advice"] = list(ADVICE) if found["alarm"] else []
    return found


def _side(
    side: str,
    before: Sequence[PairScore],
    after: Sequence[PairScore],
    groups: Sequence[str],
    seed: int,
) -> dict[str, Any]:
    old, new = ([getattr(score, f"{side}_logp") for score in scores] for scores in (before, after))
    tokens = [getattr(score, f"{side}_tokens") for score in after]
    change = [b - a for a, b in zip(old, new, strict=True)]
    return {
        "before": _mean(old),
        "after": _mean(new),
        "change": _estimate(_mean(change), mean_interval(change, groups, seed)),
        "per_token": _estimate(
            math.fsum(change) / sum(tokens), mean_interval(change, groups, seed, tokens)
        ),
    }


def _estimate(value: float, interval: tuple[float, float] | None) -> dict[str, float | None]:
    low, high = interval or (None, None)
    return {"value": value, "low": low, "high": high}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _perplexity(scores: Sequence[PairScore]) -> float:
    """exp of the mean negative log-probability of a chosen token."""
    nats = -math.fsum(score.chosen_logp for score in scores)
    return math.exp(min(700.0, nats / sum(score.chosen_tokens for score in scores)))


def _alarm(found: dict[str, Any]) -> str | None:
    chosen, rejected = (found[side]["per_token"] for side in SIDES)
    if not (chosen["value"] < -FALL and chosen["high"] is not None and chosen["high"] < 0):
        return None
    perplexity = found["perplexity_chosen"]
    text = (
        f"The chosen answers became less likely: {found['chosen']['change']['value']:+.1f} nats per answer, "
        f"{chosen['value']:+.3f} per token (perplexity {perplexity['before']:.2f} before, "
        f"{perplexity['after']:.2f} after)."
    )
    if rejected["value"] < chosen["value"]:
        text += (
            " The rejected ones fell further, so the accuracy can rise all the same; but the policy now puts "
            "more weight on answers that are neither."
        )
    return text
