"""The reference implementation: two models, padded batches, full logits. The textbook, line by line.

Everything faster is held against this file. Shapes: B pairs in a micro-batch, R = 2B rows (the chosen
sides, then the rejected ones), T tokens in the longest row, V words in the vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from smoldpo.engine.base import LossFunction, StepResult, ordered
from smoldpo.engine.batch_budget import saved_for_backward
from smoldpo.engine.gradient_accumulation import accumulate_step
from smoldpo.engine.ref_sync import SyncedReference
from smoldpo.models.adapters import without_adapters
from smoldpo.types import Advance, PairLogps, TokenizedPair, no_progress


@dataclass(frozen=True)
class PaddedBatch:
    """Rows of tokens, padded on the right. Masks come from lengths, never from token ids."""

    input_ids: torch.Tensor  # [R, T]
    attention_mask: torch.Tensor  # [R, T] 1 on tokens, 0 on padding
    scored: torch.Tensor  # [R, T] True on completion tokens
    tail: torch.Tensor  # [R, T] True on those behind the length of the pair's shorter completion


def pad_batch(pairs: Sequence[TokenizedPair], device: torch.device | str = "cpu") -> PaddedBatch:
    """Chosen rows, then rejected rows."""
    rows = [(pair.prompt_ids, pair.chosen_ids) for pair in pairs]
    rows += [(pair.prompt_ids, pair.rejected_ids) for pair in pairs]
    input_ids = [torch.tensor(prompt + completion) for prompt, completion in rows]
    attention_mask = [torch.ones_like(ids) for ids in input_ids]
    scored = [torch.arange(len(p + c)) >= len(p) for p, c in rows]
    shorter = [pair.shorter for pair in pairs] * 2
    tail = [torch.arange(len(p + c)) >= len(p) + n for (p, c), n in zip(rows, shorter, strict=True)]
    columns = (input_ids, attention_mask, scored, tail)
    return PaddedBatch(*(pad_sequence(rows, batch_first=True).to(device) for rows in columns))


def sequence_logps(model: PreTrainedModel, batch: PaddedBatch) -> torch.Tensor:
    """log π(y|x) of each row, summed over its completion tokens: [R], float32 or wider."""
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
    wide = torch.promote_types(logits.dtype, torch.float32)
    logps = torch.log_softmax(logits.to(wide), dim=-1)  # [R, T-1, V]
    found = logps.gather(-1, batch.input_ids[:, 1:, None]).squeeze(-1)  # [R, T-1]
    return found, torch.logsumexp(2 * logps.detach(), -1) if squares else None


def _summed(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Values of all tokens but the first, [R, T-1], added up where the mask [R, T] is True: [R]."""
    return torch.where(mask[:, 1:], values, 0.0).sum(-1)


class PlainEngine:
    """Policy and reference side by side, each run on every padded micro-batch.

    Args:
        policy: the model that trains, its parameters in float32 (or float64).
        reference: a frozen model of its own; or the policy itself, which is the reference with its adapters
            switched off; None for losses that compare with none.
        moving: the same model, where its weights move during training.
        compute_dtype: precision of the matrix products; parameters stay as they are (autocast).
        train_batch_size, eval_batch_size: pairs that go through the models at once.
        use_weighting: give the policy's squares (types.PairLogps) too.
    """

    budget_unit = "pairs"

    def __init__(
        self,
        policy: PreTrainedModel,
        reference: PreTrainedModel | None,
        *,
        compute_dtype: torch.dtype,
        train_batch_size: int,
        eval_batch_size: int,
        use_weighting: bool = False,
        moving: SyncedReference | None = None,
    ):
        self.policy = policy
        self.reference = reference
        self.train_batch_size = train_batch_size
        self.eval_batch_size = eval_batch_size
        self.device = policy.device
        self.synced_reference = moving
        self._compute_dtype = compute_dtype
        self._use_weighting = use_weighting
        if reference is policy:
            self.reference = without_adapters(policy)
        elif reference is not None:
            reference.eval().requires_grad_(False)

    def prepare(self, pairs: Sequence[TokenizedPair], advance: Advance = no_progress) -> None:
        advance(len(pairs))  # the textbook keeps nothing

    def release_frozen(self, rest: bool = False) -> int:
        return 0  # and reads every layer each time

    def trainable_parameters(self) -> Iterable[tuple[str, torch.nn.Parameter]]:
        return [(n, p) for n, p in self.policy.named_parameters() if p.requires_grad]

    def updated(self) -> None:
        pass

    @property
    def budget(self) -> int:
        return self.train_batch_size

    @budget.setter
    def budget(self, pairs: int) -> None:
        self.train_batch_size = pairs

    def drop_gradients(self) -> None:
        self.policy.zero_grad(set_to_none=True)

    def halve_budget(self, pairs: Sequence[TokenizedPair]) -> bool:
        self.drop_gradients()
        fewer = halved(self.train_batch_size, self.eval_batch_size, len(pairs))
        if fewer is not None:
            self.train_batch_size, self.eval_batch_size = fewer
        return fewer is not None

    def backward_bytes(
        self, pairs: Sequence[TokenizedPair], pairs_per_step: int
    ) -> tuple[int, int]:
        longest = max(pairs, key=lambda pair: pair.longest)
        one = saved_for_backward(
            lambda: self._forward(self.policy, [longest]), self.policy.parameters()
        )
        return one, one * min(self.train_batch_size, pairs_per_step)

    def disk_bytes(self, pairs: Sequence[TokenizedPair]) -> int:
        return 0

    def reference_sha256(self, pairs: Sequence[TokenizedPair]) -> str | None:
        return None  # computed each time; the reference's weights are what is fixed

    def policy_logps(
        self, pairs: Sequence[TokenizedPair], advance: Advance = no_progress
    ) -> PairLogps:
        return self._logps(self.policy, pairs, advance)

    def reference_logps(
        self, pairs: Sequence[TokenizedPair], advance: Advance = no_progress
    ) -> PairLogps:
        if self.synced_reference is not None and self.synced_reference.syncs:
            raise RuntimeError("the reference has moved: its start must be asked before training")
        return self._logps(self._require_reference(), pairs, advance)

    @torch.no_grad()
    def _logps(
        self, model: PreTrainedModel, pairs: Sequence[TokenizedPair], advance: Advance
    ) -> PairLogps:
        """Pairs of like length go together, which saves padding; the results keep the given order."""
        order = sorted(range(len(pairs)), key=lambda index: pairs[index].longest)
        parts = []
        for batch in _cut([pairs[index] for index in order], self.eval_batch_size):
            parts.append(self._forward(model, batch).map(torch.Tensor.cpu))
            advance(len(batch))
        return ordered(parts, order)

    def _forward(self, model: PreTrainedModel, pairs: Sequence[TokenizedPair]) -> PairLogps:
        batch = pad_batch(pairs, self.device)
        with self._autocast():
            weighting = self._use_weighting and model is self.policy
            logps, squares = token_logps(model, batch, weighting)
        sums = [_summed(logps, batch.scored), _summed(logps, batch.tail)]
        sums += [] if squares is None else [_summed(squares, batch.scored)]
        return PairLogps(*(side for both in sums for side in both.chunk(2)))

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if self._compute_dtype == self.policy.dtype:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self._compute_dtype)

    def accumulate_gradients(
        self, pairs: Sequence[TokenizedPair], loss: LossFunction, advance: Advance = no_progress
    ) -> StepResult:
        return accumulate_step(
            _cut(pairs, self.train_batch_size),
            lambda batch: self._forward(self.policy, batch),
            self._reference_forward,
            loss,
            advance,
        )

    @torch.no_grad()
    def _reference_forward(self, pairs: Sequence[TokenizedPair]) -> PairLogps:
        return self._forward(self._require_reference(), pairs)

    def _require_reference(self) -> PreTrainedModel:
        if self.reference is None:
            raise RuntimeError("this engine was made without a reference")
        return self.reference


def halved(train: int, evaluated: int, pairs: int) -> tuple[int, int] | None:
    """Half of what goes through at once, of so many pairs; None where that was one pair already."""
    if max(train, evaluated) == 1:
        return None
    return max(1, min(train, pairs) // 2), max(1, evaluated // 2)


def _cut(pairs: Sequence[TokenizedPair], size: int) -> list[Sequence[TokenizedPair]]:
    return [pairs[start : start + size] for start in range(0, len(pairs), size)]
