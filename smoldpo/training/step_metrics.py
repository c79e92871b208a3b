"""Metrics of an evaluation, and of single answers (KTO) in a step too, under TRL's names."""

from __future__ import annotations

from collections.abc import Sequence

from smoldpo.evaluation.metrics import (
    PairScore,
    accuracies,
    logp_metrics,
    mean,
    pair_scores,
    reward_metrics,
)
from smoldpo.evaluation.separation import auc
from smoldpo.losses import Objective
from smoldpo.types import PairLogps, TokenizedPair


def kinds(pairs: Sequence[TokenizedPair]) -> list[bool] | None:
    """Of single answers whether people liked each; None for pairs."""
    found = [pair.numbers.liked for pair in pairs]
    return None if None in found or not found else [bool(liked) for liked in found]


def thumb_metrics(
    policy: PairLogps, reference: PairLogps, beta: float, liked: Sequence[bool]
) -> dict[str, float]:
    """Means over the answers that people liked (`chosen`) and over the others (`rejected`).

    A kind that is missing has no mean. `kl` is KTO's estimate, in nats. `rewards/accuracies`, for
    which TRL has nothing, is the share of liked and other answers that the reward tells apart; one
    half where a kind is missing.
    """
    logps = policy.chosen.double().cpu().tolist()
    rewards = (beta * (policy.chosen - reference.chosen)).double().cpu().tolist()
    found: dict[str, float] = {}
    sides = {"chosen": True, "rejected": False}
    for name, values in (("logps", logps), ("rewards", rewards)):
        for side, kind in sides.items():
            of_side = [value for value, each in zip(values, liked, strict=True) if each is kind]
            if of_side:
                found[f"{name}/{side}"] = mean(of_side)
    told = auc(
        [reward for reward, each in zip(rewards, liked, strict=True) if each],
        [reward for reward, each in zip(rewards, liked, strict=True) if not each],
    )
    found["rewards/accuracies"] = 0.5 if told is None else told
    if told is not None:
        found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
    moved = (policy.rejected - reference.rejected).double().mean().item()
    return found | {"kl": max(0.0, moved)}


def evaluation_metrics(
    pairs: Sequence[TokenizedPair],
    scores: Sequence[PairScore],
    policy: PairLogps,
    reference: PairLogps | None,
    loss: Objective,
    beta: float,
) -> dict[str, float | None]:
    """What metrics.jsonl says of held-out pairs besides the loss; of single answers less.

    Under TRL's names is what the loss compares; accuracies are of whole answers.
    """
    if (liked := kinds(pairs)) is not None and reference is not None:
        return {**thumb_metrics(policy, reference, beta, liked)}
    against = None if reference is None else loss.logps_for_loss(reference)
    seen = pair_scores(pairs, loss.logps_for_loss(policy), against)
    means = logp_metrics(seen) if against is None else reward_metrics(seen, beta)
    return {**means, **{f"accuracy/{k}": v for k, v in accuracies(scores).items()}}
