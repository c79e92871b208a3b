"""Log-probabilities token by token, for those who want to see where two models differ."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from smoldpo.engine.kernels import Kernels
from smoldpo.engine.packing import by_length, pack
from smoldpo.engine.scorer import FILL, MAX_TOKENS, Scorer
from smoldpo.engine.trunk import unsupported
from smoldpo.types import Advance, TokenizedPair, no_progress

Sides = tuple[list[float], list[float]]
"""log π of each token of chosen and of rejected, in nats."""


@torch.no_grad()
def token_logps(
    model: PreTrainedModel,
    pairs: Sequence[TokenizedPair],
    kernels: Kernels,
    advance: Advance = no_progress,
) -> list[Sides]:
    """log π of every completion token under a model that does not train, in the pairs' order.

    The model is changed on the way (engine/scorer.py): generate before, not after.
    """
    if unsupported(model) is not None:
        return [_one_by_one(model, pair, advance) for pair in pairs]
    scorer = Scorer(model, 0, kernels)
    found: list[Sides] = [([], [])] * len(pairs)
    for indices in by_length(pairs, MAX_TOKENS):
        some = [pairs[index] for index in indices]
        left = scorer.token_logps(pack(some, model.device, FILL), None).tolist()
        for index, pair in zip(indices, some, strict=True):
            chosen, rejected = len(pair.chosen_ids), len(pair.rejected_ids)
            found[index] = (left[:chosen], left[chosen : chosen + rejected])
            left = left[chosen + rejected :]
        advance(len(some))
    return found


def _one_by_one(model: PreTrainedModel, pair: TokenizedPair, advance: Advance) -> Sides:
    """The textbook's way, for models that the fast engine does not take."""
    sides = []
    for completion in (pair.chosen_ids, pair.rejected_ids):
        ids = torch.tensor([pair.prompt_ids + completion], device=model.device)
        logits = model(ids).logits[0, len(pair.prompt_ids) - 1 : -1]
        wide = torch.promote_types(logits.dtype, torch.float32)
        logps = torch.log_softmax(logits, -1, dtype=wide)
        sides.append(logps.gather(1, ids[0, len(pair.prompt_ids) :, None])[:, 0].tolist())
    advance(1)
    return sides[0], sides[1]
