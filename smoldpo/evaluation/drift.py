"""How far the policy moved: log-probabilities of chosen and rejected, and an alarm when chosen falls.

DPO rewards the difference alone, so it is content when both sides become less likely and rejected falls
faster. Then accuracy rises while the model becomes less likely to say what people preferred. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from smoldpo.evaluation.metrics import PairFacts, PairScore
from smoldpo.evaluation.statistics import mean_interval

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
