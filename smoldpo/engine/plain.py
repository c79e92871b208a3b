"""The reference implementation, as a textbook has it: two models, padded batches, full logits.

Everything faster is held against this file. Shapes: B pairs in a micro-batch, R = 2B rows (the
chosen sides, then the rejected ones), T tokens in the longest row, V words in the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from smoldpo.engine.base import Engine, EngineSettings, LossFunction, StepResult, batched_logps
from smoldpo.engine.batching import PairBatching
from smoldpo.engine.gradient_accumulation import StepStreams, accumulate_step
from smoldpo.engine.ref_sync import SyncedReference
from smoldpo.models.adapters import adapters_off, without_adapters
from smoldpo.types import Advance, PairLogps, TokenizedPair, no_progress
from smoldpo.utils.distributed import world
from smoldpo.utils.workers import Workers


@dataclass(frozen=True)
class PaddedBatch:
    """Rows of tokens, padded on the right. Masks come from lengths, never from token ids."""

    input_ids: torch.Tensor  # [R, T]
    attention_mask: torch.Tensor  # [R, T] 1 on tokens, 0 on padding
    scored: torch.Tensor  # [R, T] True on the completion tokens that are scored
    tail: torch.Tensor  # [R, T] True on those behind as many as the pair's shorter completion has


def pad_batch(pairs: Sequence[TokenizedPair], device: torch.device | str = "cpu") -> PaddedBatch:
    """Chosen rows, then rejected rows."""
    rows = [(pair, pair.completions[side]) for side in (0, 1) for pair in pairs]
    input_ids = [torch.tensor(pair.prompt_ids + completion.ids) for pair, completion in rows]
    attention_mask = [torch.ones_like(ids) for ids in input_ids]
    unscored = [(False,) * len(pair.prompt_ids) for pair, _ in rows]
    scored = [torch.tensor(p + c.scored) for p, (_, c) in zip(unscored, rows, strict=True)]
    tail = [s & (s.cumsum(0) > pair.shorter) for s, (pair, _) in zip(scored, rows, strict=True)]
    columns = (input_ids, attention_mask, scored, tail)
    return PaddedBatch(*(pad_sequence(rows, batch_first=True).to(device) for rows in columns))


def sequence_logps(model: PreTrainedModel, batch: PaddedBatch) -> torch.Tensor:
    """log π(y|x) of each row, summed over its scored tokens: [R], float32 or wider."""
    return _summed(token_logps(model, batch)[0], batch.scored)


def token_logps(
    model: PreTrainedModel, batch: PaddedBatch, squares: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """log π of each token but the first, [R, T-1], and log Σ_v π(v)² where it stands if `squares`.

    The logits at position t predict the token at t + 1; Rafailov et al. 2023, section 4.
    """
    logits = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
    ).logits[:, :-1]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logps = torch.log_softmax(logits.to(dtype), dim=-1)  # [R, T-1, V]
    found = logps.gather(-1, batch.input_ids[:, 1:, None]).squeeze(-1)  # [R, T-1]
    return found, torch.logsumexp(2 * logps.detach(), -1) if squares else None


def _summed(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Values of all tokens but the first, [R, T-1], added up where the mask [R, T] is True: [R]."""
    return torch.where(mask[:, 1:], values, 0.0).sum(-1)


class PlainEngine(Engine):
    """Policy and reference side by side, each run on every padded micro-batch.

    Of `settings.fsdp`, policy and reference have been shared out among the ranks (sharding.py); a
    reference that is the policy is then computed by its own modules, with its adapters off for the
    moment.

    Args:
        policy: the model that trains, its parameters in float32 (or float64). Matrix products are
            in `settings.compute_dtype` (autocast).
        reference: a frozen model of its own; or the policy itself, which is the reference with its
            adapters switched off; None for losses that compare with none.
        synced_reference: the same model, where its weights move during training.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        reference: PreTrainedModel | None,
        settings: EngineSettings,
        synced_reference: SyncedReference | None = None,
    ):
        self.policy, self.reference = policy, reference
        self.batching = PairBatching(settings.train_batch_size, settings.eval_batch_size)
        self.synced_reference = synced_reference
        self._settings = settings
        self.workers = Workers(1, threads=torch.get_num_threads())
        self.ranks = world()
        self._sharded = settings.fsdp
        if reference is policy and not self._sharded:
            self.reference = without_adapters(policy)
        elif reference is not None and reference is not policy:
            reference.train(False).requires_grad_(False)

    def prepare(self, pairs: Sequence[TokenizedPair], advance: Advance = no_progress) -> None:
        advance(len(pairs))  # nothing is kept

    def release_frozen(self, rest: bool = False) -> int:
        return 0  # every layer is read each time

    def trainable_parameters(self) -> Iterable[tuple[str, torch.nn.Parameter]]:
        return [(n, p) for n, p in self.policy.named_parameters() if p.requires_grad]

    def updated(self) -> None:
        pass

    def drop_gradients(self) -> None:
        self.policy.zero_grad(set_to_none=True)

    @torch.no_grad()
    def policy_logps(
        self, pairs: Sequence[TokenizedPair], advance: Advance = no_progress
    ) -> PairLogps:
        return batched_logps(
            pairs,
            self.batching,
            lambda _, batch: self._forward_policy(batch).map(torch.Tensor.cpu),
            advance,
            self.workers,
            self.ranks,
            self._sharded,
        )

    def reference_logps(
        self, pairs: Sequence[TokenizedPair], advance: Advance = no_progress
    ) -> PairLogps:
        if self.synced_reference is not None and self.synced_reference.syncs:
            raise RuntimeError("the reference has moved: its start must be asked before training")
        return batched_logps(
            pairs,
            self.batching,
            lambda _, batch: self._forward_reference(batch).map(torch.Tensor.cpu),
            advance,
            self.workers,
            self.ranks,
            self._sharded,
        )

    def accumulate_gradients(
        self, pairs: Sequence[TokenizedPair], loss: LossFunction, advance: Advance = no_progress
    ) -> StepResult:
        streams = StepStreams(
            self.batching.step_batches(pairs),
            lambda _, batch: self._forward_policy(batch),
            lambda _, batch: self._forward_reference(batch),
            [parameter for _, parameter in self.trainable_parameters()],
            self.workers,
            ranks=self.ranks,
            ordered_sum=self._settings.ordered_sum,
            sharded=self._sharded,
            device=self.device,
        )
        return accumulate_step(streams, loss, advance)

    def _forward_policy(self, pairs: Sequence[TokenizedPair]) -> PairLogps:
        return self._forward(self.policy, pairs, self._settings.use_weighting)

    @torch.no_grad()
    def _forward_reference(self, pairs: Sequence[TokenizedPair]) -> PairLogps:
        if self.reference is None:
            raise RuntimeError("this engine was made without a reference")
        with adapters_off(self.policy) if self.reference is self.policy else nullcontext():
            return self._forward(self.reference, pairs)

    def _forward(
        self, model: PreTrainedModel, pairs: Sequence[TokenizedPair], squares: bool = False
    ) -> PairLogps:
        batch = pad_batch(pairs, self.device)
        dtype = self._settings.compute_dtype
        # What is shared out is converted where it is gathered.
        enabled = dtype != self.policy.dtype and not self._sharded
        autocast = torch.autocast(self.device.type, dtype, enabled=enabled)
        with autocast:
            logps, squared = token_logps(model, batch, squares)
        sums = [_summed(logps, batch.scored), _summed(logps, batch.tail)]
        sums += [] if squared is None else [_summed(squared, batch.scored)]
        return PairLogps(*(side for both in sums for side in both.chunk(2)))
