"""Preference accuracy, three ways, from one row a pair. No torch here.

    logp            the policy gives chosen the higher log-probability (sum over tokens)
    logp_per_token  the same, divided by the number of completion tokens
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
    """What a model (and a reference) make of one pair. Log-probabilities are in nats, summed."""

    id: str
    chosen_logp: float
    rejected_logp: float
    chosen_tokens: int
    rejected_tokens: int
    reference_chosen_logp: float | None = None
    reference_rejected_logp: float | None = None

    def as_row(self) -> dict[str, Any]:
        """The pair's row in evaluation.json; without a reference, without its keys."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    @property
    def margins(self) -> dict[str, float | None]:
        """By how much chosen leads, for each way of preferring; None where there is no reference.

        The reward's margin is in units of β, which is positive and so never changes its sign.
        """
        margins: dict[str, float | None] = {
            "logp": self.chosen_logp - self.rejected_logp,
            "logp_per_token": self.chosen_logp / self.chosen_tokens
            - self.rejected_logp / self.rejected_tokens,
            "reward": None,
        }
        if self.reference_chosen_logp is not None and self.reference_rejected_logp is not None:
            margins["reward"] = (self.chosen_logp - self.reference_chosen_logp) - (
                self.rejected_logp - self.reference_rejected_logp
            )
        return margins


@dataclass(frozen=True)
class PairFacts:
    """What is known of a pair besides its log-probabilities, for slices and for what belongs together."""

    prompt: str
    """Equal exactly for pairs of the same prompt."""
    source: str = ""
    category: str = ""

    @classmethod
    def of(cls, pair: PreferencePair) -> PairFacts:
        """The facts of one pair; its prompt as a hash."""
        text = json.dumps(pair.prompt, ensure_ascii=True, sort_keys=True)
        return cls(hashlib.sha256(text.encode()).hexdigest()[:12], pair.source, pair.category)


def wins(scores: Sequence[PairScore], metric: str) -> list[float]:
    """For each pair 1 where chosen is preferred, 0 where rejected is, one half for a tie.

    Raises:
        ValueError: a pair has no reference, and the metric is the implicit reward.
    """
    margins = [score.margins[metric] for score in scores]
    if any(margin is None for margin in margins):
        raise ValueError(f"{metric} needs a reference")
    return [_wins(margin) for margin in margins if margin is not None]


def accuracies(scores: Sequence[PairScore]) -> dict[str, float | None]:
    """Each accuracy over all pairs; None where no pair has what it needs."""
    found: dict[str, float | None] = {}
    for name in METRICS:
        margins = [margin for score in scores if (margin := score.margins[name]) is not None]
        found[name] = sum(map(_wins, margins)) / len(margins) if margins else None
    return found


def _wins(margin: float) -> float:
    return 0.5 if margin == 0 else float(margin > 0)


def reward_metrics(scores: Sequence[PairScore], beta: float) -> dict[str, float]:
    """TRL's names for the means over pairs; every score must have a reference."""
    chosen = [beta * (s.chosen_logp - (s.reference_chosen_logp or 0.0)) for s in scores]
    rejected = [beta * (s.rejected_logp - (s.reference_rejected_logp or 0.0)) for s in scores]
    margins = [ours - theirs for ours, theirs in zip(chosen, rejected, strict=True)]
    return {
        "rewards/chosen": _mean(chosen),
        "rewards/rejected": _mean(rejected),
        "rewards/accuracies": _mean([_wins(margin) for margin in margins]),
        "rewards/margins": _mean(margins),
        **_logp_means(scores),
    }


def logp_metrics(scores: Sequence[PairScore]) -> dict[str, float]:
    """The same for a loss without a reference: accuracy and margin of log-probabilities, in nats."""
    margins = [score.chosen_logp - score.rejected_logp for score in scores]
    return {
        **_logp_means(scores),
        "logps/accuracies": _mean([_wins(margin) for margin in margins]),
        "logps/margins": _mean(margins),
    }


def _logp_means(scores: Sequence[PairScore]) -> dict[str, float]:
    return {
        "logps/chosen": _mean([score.chosen_logp for score in scores]),
        "logps/rejected": _mean([score.rejected_logp for score in scores]),
    }


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


# From an engine's log-probabilities to one score a pair.


def pair_scores(
    pairs: Sequence[TokenizedPair], policy: PairLogps, reference: PairLogps | None
) -> list[PairScore]:
    """One score a pair, in the pairs' order."""
    return [
        PairScore(
            id=pair.id,
            chosen_logp=policy.chosen[index].item(),
            rejected_logp=policy.rejected[index].item(),
            chosen_tokens=len(pair.chosen_ids),
            rejected_tokens=len(pair.rejected_ids),
            reference_chosen_logp=reference.chosen[index].item() if reference else None,
            reference_rejected_logp=reference.rejected[index].item() if reference else None,
        )
        for index, pair in enumerate(pairs)
    ]
