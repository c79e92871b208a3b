"""Preference accuracy, three ways, from one row a pair. No torch here.

    logp            the policy gives chosen the higher log-probability (sum over tokens)
    logp_per_token  the same, divided by the number of scored tokens
    reward          the implicit reward β (log π - log π_ref) is higher for chosen

A tie counts one half. Means are over pairs, never over batches.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from smoldpo.types import PairLogps, PreferencePair, TokenizedPair

METRICS = {
    "logp": "log-probability (sum)",
    "logp_per_token": "log-probability per token",
    "reward": "implicit reward",
}
"""Keys in evaluation.json, and the full names that people see."""


@dataclass(frozen=True)
class PairScore:
    """A pair's log-probabilities under a model and its reference: nats, summed over scored tokens.

    `chosen_tokens` and `rejected_tokens` are their numbers.
    """

    id: str
    chosen_logp: float
    rejected_logp: float
    chosen_tokens: int
    rejected_tokens: int
    reference_chosen_logp: float | None = None
    reference_rejected_logp: float | None = None

    def as_row(self) -> dict[str, Any]:
        """The pair's row in evaluation.json; the reference's keys only with a reference."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    @property
    def logp_margin(self) -> float:
        """log π(chosen) - log π(rejected)."""
        return self.chosen_logp - self.rejected_logp

    @property
    def margins(self) -> dict[str, float | None]:
        """By how much chosen leads under each metric; None for the reward without a reference.

        The reward's margin is in units of β, which is positive and so never changes its sign.
        """
        reward = None
        if self.reference_chosen_logp is not None and self.reference_rejected_logp is not None:
            reward = (self.chosen_logp - self.reference_chosen_logp) - (
                self.rejected_logp - self.reference_rejected_logp
            )
        per_token = self.chosen_logp / self.chosen_tokens - (
            self.rejected_logp / self.rejected_tokens
        )
        return {"logp": self.logp_margin, "logp_per_token": per_token, "reward": reward}


@dataclass(frozen=True)
class PairFacts:
    """A pair's prompt (as a hash, equal exactly for equal prompts), source and category."""

    prompt: str
    source: str = ""
    category: str = ""

    @classmethod
    def of(cls, pair: PreferencePair) -> PairFacts:
        """The facts of one pair."""
        text = json.dumps(pair.prompt, ensure_ascii=True, sort_keys=True)
        return cls(hashlib.sha256(text.encode()).hexdigest()[:12], pair.source, pair.category)


def wins(scores: Sequence[PairScore], metric: str) -> list[float]:
    """For each pair 1 where chosen is preferred, 0 where rejected is, one half for a tie.

    Raises:
        ValueError: a pair has no reference, and the metric is the implicit reward.
    """
    margins = [score.margins[metric] for score in scores]
    known = [margin for margin in margins if margin is not None]
    if len(known) < len(margins):
        raise ValueError(f"{metric} needs a reference")
    return _wins(known)


def accuracies(scores: Sequence[PairScore]) -> dict[str, float | None]:
    """The accuracy by each metric over the pairs that have it; None where no pair has."""
    found: dict[str, float | None] = {}
    for name in METRICS:
        margins = [margin for score in scores if (margin := score.margins[name]) is not None]
        found[name] = sum(_wins(margins)) / len(margins) if margins else None
    return found


def _wins(margins: Sequence[float]) -> list[float]:
    return [0.5 if margin == 0 else float(margin > 0) for margin in margins]


def reward_metrics(scores: Sequence[PairScore], beta: float) -> dict[str, float]:
    """Means of rewards and log-probabilities over pairs, by TRL's names; all need a reference."""
    chosen = [beta * (s.chosen_logp - (s.reference_chosen_logp or 0.0)) for s in scores]
    rejected = [beta * (s.rejected_logp - (s.reference_rejected_logp or 0.0)) for s in scores]
    return _preference_means("rewards", chosen, rejected) | {
        "logps/chosen": mean([score.chosen_logp for score in scores]),
        "logps/rejected": mean([score.rejected_logp for score in scores]),
    }


def logp_metrics(scores: Sequence[PairScore]) -> dict[str, float]:
    """The same for a loss without a reference: accuracy and margin are of log-probabilities."""
    return _preference_means(
        "logps", [s.chosen_logp for s in scores], [s.rejected_logp for s in scores]
    )


def _preference_means(
    name: str, chosen: Sequence[float], rejected: Sequence[float]
) -> dict[str, float]:
    margins = [ours - theirs for ours, theirs in zip(chosen, rejected, strict=True)]
    return {
        f"{name}/chosen": mean(chosen),
        f"{name}/rejected": mean(rejected),
        f"{name}/accuracies": mean(_wins(margins)),
        f"{name}/margins": mean(margins),
    }


def mean(values: Sequence[float]) -> float:
    """The mean, summed without rounding error."""
    return math.fsum(values) / len(values)


def pair_scores(
    pairs: Sequence[TokenizedPair], policy: PairLogps, reference: PairLogps | None
) -> list[PairScore]:
    """One score a pair, in the pairs' order, from an engine's log-probabilities."""
    nothing = [None] * len(pairs)
    columns = (
        policy.chosen.tolist(),
        policy.rejected.tolist(),
        [pair.chosen_tokens for pair in pairs],
        [pair.rejected_tokens for pair in pairs],
        reference.chosen.tolist() if reference else nothing,
        reference.rejected.tolist() if reference else nothing,
    )
    return [PairScore(pair.id, *row) for pair, *row in zip(pairs, *columns, strict=True)]
