"""Log-probabilities of packed pairs under one model, cut at the boundary of what trains.

stream P C R -> trunk (frozen layers) -> states [T, D]
states -> top (the other layers) -> rows that are read -> final norm -> head -> log-probabilities
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import compress
from typing import Any

import torch
from transformers import PreTrainedModel

from smoldpo.engine.autotune import KernelChoice
from smoldpo.engine.base import batched_logps
from smoldpo.engine.batching import STREAM_MULTIPLE, TokenBatching
from smoldpo.engine.kernels.layers import own_modules
from smoldpo.engine.kernels.lm_head import completion_scores
from smoldpo.engine.kernels.lora import kind_of
from smoldpo.engine.kernels.native.library import load
from smoldpo.engine.kernels.native_layers import native_kind
from smoldpo.engine.layout import ROWS, TRUNK_ROWS
from smoldpo.engine.packing import PackedBatch, common_prefix, pack
from smoldpo.engine.trunk import head_weight, split_base
from smoldpo.models.families import unsupported
from smoldpo.types import Advance, Completion, PairLogps, TokenizedPair, no_progress
from smoldpo.utils.distributed import ALONE, Ranks
from smoldpo.utils.memory import keep_freed_memory
from smoldpo.utils.workers import Workers

Sides = tuple[list[float], list[float]]
"""log π of each scored token of chosen and of rejected, in nats."""


class LogprobModel:
    """One model, its layers below `at` apart from the others; `at` 0 is no trunk.

    It computes with modules of its own, which share the model's parameters: the model stays as it
    is, and what several threads may compute at once are several of these.

    With `squares` it gives PairLogps' squares too, which takes the LM head by products. `leaves` as
    for own_modules.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        at: int,
        kernels: KernelChoice,
        squares: bool = False,
        leaves: Mapping[int, torch.nn.Parameter] | None = None,
    ):
        keep_freed_memory()
        self.model, self.kernels, self.squares = model, kernels, squares
        head = head_weight(model)
        self.head = head if leaves is None else leaves.get(id(head), head)
        kind: Callable[[torch.nn.Module], type[torch.nn.Module]]
        kind = partial(kind_of, dtype=self.head.dtype)
        native = kernels.native and self.head.dtype == torch.bfloat16
        self.native = load(kernels.native) if native else None
        if self.native is not None:
            kind = native_kind(kind, self.native)
        known: dict[int, Any] = {}
        for layer in model.model.layers[:at]:
            own_modules(layer, TRUNK_ROWS, kind, known, leaves)
        self._base = own_modules(model.model, ROWS, kind, known, leaves)
        self.trunk, self.top = split_base(self._base, at)

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
        """Log-probabilities of each pair's sides, [B] each, from trunk states [T, D] or tokens."""
        return batch.logps(*self._token_scores(batch, states))

    def token_logps(self, batch: PackedBatch, states: torch.Tensor | None) -> torch.Tensor:
        """Log-probability of each scored token, [N], in the order of `batch.targets`."""
        return self._token_scores(batch, states)[0]

    def _token_scores(
        self, batch: PackedBatch, states: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What engine/kernels/lm_head.py gives for each scored token, [N]."""
        if states is None:
            states = self._embedded(batch)
        top = self._run(self.top, batch, states)
        read = self._base.norm(top[batch.rows])[batch.predictors]
        fused, squares = self.kernels.fused_head, self.squares
        native = self.native if fused else None
        return completion_scores(read, self.head, batch.targets, fused, squares, native)

    def _embedded(self, batch: PackedBatch) -> torch.Tensor:
        """[T, D] in the dtype of the head; frozen embeddings may be stored in a narrower one."""
        embedded: torch.Tensor = self._base.embed_tokens(batch.input_ids)[0]
        return embedded.to(self.head.dtype)

    def _run(self, part: PreTrainedModel, batch: PackedBatch, states: torch.Tensor) -> torch.Tensor:
        """[T, D] after some layers; float32 at least between layers, products in their dtype."""
        states_dtype = torch.promote_types(states.dtype, torch.float32)
        found = part(
            inputs_embeds=states[None].to(states_dtype),
            position_ids=batch.position_ids,
            layout=batch.layout,
            rows=batch.rows,
            last_layer=self.model.config.num_hidden_layers - 1,
            fused=self.kernels.fused_attention,
            native=self.native,
            use_cache=False,
        )
        result: torch.Tensor = found.last_hidden_state[0]
        return result


@torch.no_grad()
def score(
    model: PreTrainedModel,
    pairs: Sequence[TokenizedPair],
    kernels: KernelChoice,
    advance: Advance = no_progress,
    ranks: Ranks = ALONE,
) -> PairLogps:
    """Log-probabilities of pairs under one frozen model, on the CPU, in order.

    Args:
        ranks: all of which call this, to compute a share each.
    """
    workers = _workers(model)
    frozen, batching = _copies(model, kernels, workers), TokenBatching(prefix=common_prefix(pairs))

    def logps_of(worker: int, batch: Sequence[TokenizedPair]) -> PairLogps:
        packed = pack(batch, model.device, STREAM_MULTIPLE, batching.prefix)
        return frozen[worker].logps(packed, None).map(torch.Tensor.cpu)

    return batched_logps(pairs, batching, logps_of, advance, workers, ranks)


@torch.no_grad()
def token_logps(
    model: PreTrainedModel,
    pairs: Sequence[TokenizedPair],
    kernels: KernelChoice,
    advance: Advance = no_progress,
) -> list[Sides]:
    """log π of every scored token under a model that does not train, in the pairs' order."""
    if unsupported(model) is not None:
        return [_one_by_one(model, pair, advance) for pair in pairs]
    workers = _workers(model)
    frozen = _copies(model, kernels, workers)
    found: list[Sides] = [([], [])] * len(pairs)

    def work(worker: int, indices: list[int]) -> list[float]:
        packed = pack([pairs[index] for index in indices], model.device, STREAM_MULTIPLE)
        values: list[float] = frozen[worker].token_logps(packed, None).tolist()
        return values

    def finished(indices: list[int], logps: list[float]) -> None:
        for index in indices:
            chosen, rejected = pairs[index].chosen_tokens, pairs[index].rejected_tokens
            found[index] = (logps[:chosen], logps[chosen : chosen + rejected])
            logps = logps[chosen + rejected :]
        advance(len(indices))

    workers.run(work, TokenBatching().indices(pairs), finished)
    return found


def _workers(model: PreTrainedModel) -> Workers:
    return Workers(None if model.device.type == "cpu" else 1)


def _copies(model: PreTrainedModel, kernels: KernelChoice, workers: Workers) -> list[LogprobModel]:
    return [LogprobModel(model, 0, kernels) for _ in range(workers.count)]


def _one_by_one(model: PreTrainedModel, pair: TokenizedPair, advance: Advance) -> Sides:
    """The same, plainly, for models that the fast engine does not take."""

    def of(completion: Completion) -> list[float]:
        ids = torch.tensor([pair.prompt_ids + completion.ids], device=model.device)
        logits = model(ids).logits[0, len(pair.prompt_ids) - 1 : -1]
        full_dtype = torch.promote_types(logits.dtype, torch.float32)
        logps = torch.log_softmax(logits, -1, dtype=full_dtype)
        found: list[float] = logps.gather(1, ids[0, len(pair.prompt_ids) :, None])[:, 0].tolist()
        return list(compress(found, completion.scored))

    chosen, rejected = map(of, pair.completions)
    advance(1)
    return chosen, rejected
