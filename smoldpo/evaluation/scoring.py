"""From an engine's log-probabilities to one score a pair."""

from __future__ import annotations

from collections.abc import Sequence

from smoldpo.evaluation.metrics import PairScore
from smoldpo.types import PairLogps, TokenizedPair


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
