"""Log-probabilities of packed pairs under one model, cut at the boundary of what trains.

stream P C R -> trunk (frozen layers) -> states [T, D]
states -> top (the other layers) -> rows that are read -> final norm -> head -> log-probabilities
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from smoldpo.engine.autotune import KernelChoice
from smoldpo.engine.base import ordered
from smoldpo.engine.kernels.layers import ROWS, TRUNK_ROWS, own_modules
from smoldpo.engine.kernels.lm_head import completion_scores
from smoldpo.engine.kernels.lora import kind_of
from smoldpo.engine.packing import PackedBatch, by_length, common_prefix, pack
from smoldpo.engine.trunk import cut
from smoldpo.models.families import unsupported
from smoldpo.types import Advance, PairLogps, TokenizedPair, no_progress
from smoldpo.utils.memory import keep_freed_memory

MAX_TOKENS = 3840
"""Tokens of a stream: enough to keep matrix products busy, little enough for a laptop's memory."""
FILL = 128
"""Streams are filled up to a multiple of this, for few shapes of products (kernels/attention.py says why)."""


class LogprobModel:
    """One model, its layers below `at` apart from the others; `at` 0 is no trunk.

    It computes with modules of its own, which share the model's parameters: the model stays as it is, and
    what several threads may compute at once are several of these.

    With `squares` it gives PairLogps' squares too, which takes the LM head by products.
    """

    def __init__(
        self, model: PreTrainedModel, at: int, kernels: KernelChoice, squares: bool = False
    ):
        keep_freed_memory()
        self.model, self.kernels, self.squares = model, kernels, squares
        self.head = model.get_output_embeddings().weight
        kind = partial(kind_of, dtype=self.head.dtype)
        known: dict[int, Any] = {}
        for layer in model.model.layers[:at]:
            own_modules(layer, TRUNK_ROWS, kind, known)
        self._base = own_modules(model.model, ROWS, kind, known)
        self.trunk, self.top = cut(self._base, at)

    @torch.no_grad()
    def trunk_states(self, batch: PackedBatch) -> torch.Tensor:
        """What the frozen layers give for the stream: [T, D]."""
        if self.trunk is None:
            raise ValueError("this model has no trunk")
        return self._run(self.trunk, batch, self._embedded(batch)).to(self.head.dtype)

    def trunk_weights(self) -> Iterator[torch.nn.Parameter]:
        """What the trunk alone reads; a tied head reads the embeddings too."""
        if self.trunk is not None:
            yield from (weight for weight in self.trunk.parameters() if weight is not self.head)

    def logps(self, batch: PackedBatch, states: torch.Tensor | None) -> PairLogps:
        """Log-probabilities of each pair's sides, [B] each, from trunk states [T, D] or from tokens."""
        return batch.logps(*self._token_scores(batch, states))

    def token_logps(self, batch: PackedBatch, states: torch.Tensor | None) -> torch.Tensor:
        """Log-probability of each completion token, [N], in the order of `batch.targets`."""
        return self._token_scores(batch, states)[0]

    def _token_scores(
        self, batch: PackedBatch, states: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What engine/kernels/lm_head.py gives for each completion token, [N]."""
        if states is None:
            states = self._embedded(batch)
        top = self._run(self.top, batch, states)
        read = self._base.norm(top[batch.rows])[batch.predictors]
        fused, squares = self.kernels.fused_head, self.squares
        return completion_scores(read, self.head, batch.targets, fused, squares)

    def _embedded(self, batch: PackedBatch) -> torch.Tensor:
        """[T, D] in the dtype of the head; embeddings that nothing trains may lie in a narrower one."""
        return self._base.embed_tokens(batch.input_ids)[0].to(self.head.dtype)

    def _run(self, part: PreTrainedModel, batch: PackedBatch, states: torch.Tensor) -> torch.Tensor:
        """What some layers make of [T, D]; from layer to layer in float32 at least, products in theirs."""
        wide = torch.promote_types(states.dtype, torch.float32)
        found = part(
            inputs_embeds=states[None].to(wide),
            position_ids=batch.position_ids,
            layout=batch.layout,
            rows=batch.rows,
            last_layer=self.model.config.num_hidden_layers - 1,
            fused=self.kernels.fused_attention,
            use_cache=False,
        )
        return found.last_hidden_state[0]


@torch.no_grad()
def score(
    model: PreTrainedModel,
    pairs: Sequence[TokenizedPair],
    kernels: KernelChoice,
    advance: Advance = no_progress,
) -> PairLogps:
    """Log-probabilities of pairs under one model that does not train, on the CPU, in their order."""
    scorer = LogprobModel(model, 0, kernels)
    shared = common_prefix(pairs)
    return in_order(
        pairs,
        MAX_TOKENS,
        lambda some: pack(some, model.device, FILL, shared),
        lambda _, batch: scorer.logps(batch, None).map(torch.Tensor.cpu),
        advance,
    )


def in_order(
    pairs: Sequence[TokenizedPair],
    max_tokens: int,
    packed: Callable[[Sequence[TokenizedPair]], PackedBatch],
    logps_of: Callable[[Sequence[TokenizedPair], PackedBatch], PairLogps],
    advance: Advance,
) -> PairLogps:
    """Go through pairs in batches of like length; the results are in the pairs' own order."""
    parts: list[PairLogps] = []
    order: list[int] = []
    for indices in by_length(pairs, max_tokens):
        some = [pairs[index] for index in indices]
        parts.append(logps_of(some, packed(some)))
        order += indices
        advance(len(some))
    return ordered(parts, order)


# Log-probabilities token by token, for those who want to see where two models differ.


Sides = tuple[list[float], list[float]]
"""log π of each token of chosen and of rejected, in nats."""


@torch.no_grad()
def token_logps(
    model: PreTrainedModel,
    pairs: Sequence[TokenizedPair],
    kernels: KernelChoice,
    advance: Advance = no_progress,
) -> list[Sides]:
    """log π of every completion token under a model that does not train, in the pairs' order."""
    if unsupported(model) is not None:
        return [_one_by_one(model, pair, advance) for pair in pairs]
    scorer = LogprobModel(model, 0, kernels)
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
