"""The exact fast engine: DPO's loss and gradients, doing only the work that the loss needs.

    once a pair     stream P C R -> trunk (frozen layers) -> kept
                    kept -> top -> final norm -> head on completion positions -> reference logps, kept
                    (the latter unless the loss compares with no reference)
    every epoch     kept -> top -> final norm -> head -> policy logps -> loss -> backward to the boundary
    (and once a reference has moved, kept -> its own top -> ... -> reference logps, in each step)

Before the first update the policy is the reference, so the reference's log-probabilities come from the
policy itself; no second model exists. engine/plain.py is what all of this is held against.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence

import torch
from transformers import PreTrainedModel

from smoldpo.engine.autotune import KernelChoice
from smoldpo.engine.base import LossFunction, StepResult
from smoldpo.engine.batch_budget import saved_for_backward
from smoldpo.engine.cache.keys import pair_key
from smoldpo.engine.cache.reference_logps import ReferenceStore
from smoldpo.engine.cache.trunk_states import MemoryStore, TrunkStore
from smoldpo.engine.gradient_accumulation import accumulate_step
from smoldpo.engine.logprobs import FILL, MAX_TOKENS, LogprobModel, in_order
from smoldpo.engine.packing import (
    PackedBatch,
    batch_by_tokens,
    by_length,
    common_prefix,
    pack,
    pair_length,
    shares,
)
from smoldpo.engine.precision import MasterWeights
from smoldpo.engine.ref_sync import SyncedReference
from smoldpo.engine.trunk import boundary
from smoldpo.types import Advance, PairLogps, TokenizedPair, no_progress
from smoldpo.utils.memory import free_memory, release_file_pages

TRAIN_SHARE = 2 / 3
"""Streams that are kept for a backward pass have this share of max_tokens: a step of eight usual pairs."""
COMMIT_SECONDS = 30.0
"""What is computed once a pair is made last at least this often."""
KEEP_SHARE = 0.5
"""Trunk states may take this share of the memory that is free at the start; the rest is recomputed."""


class FastEngine:
    """One model, cut at the freeze boundary; implements engine/base.py's protocol.

    Args:
        policy: its weights in the compute dtype, but for those that stay as they are stored (trunk.py);
            `requires_grad` set on what trains.
        masters: what trains, in float32 (or float64), for the optimizer.
        reference: a model of its own, only where the reference is not the policy's start.
        trunk_store, reference_store: where what is computed once a pair is kept; by default in memory.
        needs_reference: False for losses that compare with no reference: then none is ever run.
        use_weighting: give the policy's squares (types.PairLogps) too.
        moving: the reference, where it moves during training: `reference`, or a copy of the policy's top.
    """

    budget_unit = "tokens"

    def __init__(
        self,
        policy: PreTrainedModel,
        masters: MasterWeights,
        reference: PreTrainedModel | None = None,
        max_tokens: int = MAX_TOKENS,
        kernels: KernelChoice | None = None,
        trunk_store: TrunkStore | None = None,
        reference_store: ReferenceStore | None = None,
        needs_reference: bool = True,
        use_weighting: bool = False,
        moving: SyncedReference | None = None,
    ):
        self.kernels = kernels or KernelChoice()
        self.device = policy.device
        self.max_tokens = max_tokens
        self._masters = masters
        at = boundary(policy)
        self._policy = LogprobModel(policy, at, self.kernels, use_weighting)
        self._reference = None if reference is None else LogprobModel(reference, 0, self.kernels)
        self.synced_reference = moving
        self._moving = self._reference
        if moving is not None and moving.model is not reference:
            self._moving = LogprobModel(moving.model, at, self.kernels)
        self._needs_reference = needs_reference
        if trunk_store is None:
            trunk_store = MemoryStore(KEEP_SHARE * free_memory(self.device))
        self._states = trunk_store
        self._reference_logps = ReferenceStore() if reference_store is None else reference_store
        self._prepared: set[str] = set()
        self._committed = time.monotonic()
        self._shared: tuple[int, ...] = ()
        self._updates = 0

    @property
    def policy(self) -> PreTrainedModel:
        """As it computes."""
        return self._policy.model

    @property
    def reference(self) -> PreTrainedModel | None:
        """As it computes, where it is a model of its own."""
        return None if self._reference is None else self._reference.model

    def trainable_parameters(self) -> Iterable[tuple[str, torch.nn.Parameter]]:
        return self._masters.named()

    def updated(self) -> None:
        """The optimizer has moved the master weights: bring the computing ones up to date."""
        self._masters.copy_to_model()
        self._updates += 1

    @property
    def budget(self) -> int:
        return self.max_tokens

    @budget.setter
    def budget(self, tokens: int) -> None:
        self.max_tokens = tokens

    def drop_gradients(self) -> None:
        self._masters.drop_gradients()

    def halve_budget(self, pairs: Sequence[TokenizedPair]) -> bool:
        self.drop_gradients()
        fewer = halved(self.max_tokens, max(pair_length(pair) for pair in pairs))
        self.max_tokens = fewer or self.max_tokens
        return fewer is not None

    def backward_bytes(
        self, pairs: Sequence[TokenizedPair], pairs_per_step: int
    ) -> tuple[int, int]:
        longest = max(pairs, key=pair_length)
        one = saved_for_backward(
            lambda: self._policy_forward([longest]), self._policy.model.parameters()
        )
        return one, at_once_bytes(one, pair_length(longest), self.max_tokens, pairs_per_step)

    def disk_bytes(self, pairs: Sequence[TokenizedPair]) -> int:
        if self._policy.trunk is None:
            return 0
        self._shared = self._shared or common_prefix(pairs)
        missing = (pair for pair in set(pairs) if self._key(pair) not in self._states)
        return self._states.disk_bytes(sum(pair_length(pair) for pair in missing))

    def reference_sha256(self, pairs: Sequence[TokenizedPair]) -> str | None:
        if not self._needs_reference:
            return None
        logps = self.reference_logps(pairs)
        sides = json.dumps([each.tolist() for each in logps.sums.values()])
        return hashlib.sha256(sides.encode()).hexdigest()

    @torch.no_grad()
    def prepare(self, pairs: Sequence[TokenizedPair], advance: Advance = no_progress) -> None:
        """Trunk states and reference log-probabilities of these pairs, each computed once.

        Must see every pair before the first update: afterwards the policy is no longer the reference.
        """
        if not self._prepared:
            self._shared = common_prefix(pairs)
        keyed = {self._key(pair): pair for pair in pairs}
        todo = [pair for key, pair in keyed.items() if key not in self._prepared]
        unscored = [pair for pair in todo if self._unscored(pair)]
        if unscored and self._reference_is_gone():
            raise RuntimeError(
                "the reference is gone: prepare() must see every pair before training"
            )
        without_states = []
        if self._policy.trunk is not None:
            without_states = [pair for pair in todo if self._key(pair) not in self._states]
        computing = set(without_states)
        only_unscored = [pair for pair in unscored if pair not in computing]
        try:
            advance(len(pairs) - len(without_states) - len(only_unscored))
            for group in (without_states, only_unscored):
                for indices in by_length(group, self.max_tokens):
                    self._prepare_stream([group[index] for index in indices])
                    self._commit_now_and_then()
                    advance(len(indices))
        finally:  # interrupted, or out of memory: what was computed is not computed again
            self._states.commit()
            self._reference_logps.commit()
        self._prepared.update(keyed)

    def release_frozen(self, rest: bool = False) -> int:
        return release_file_pages(self._frozen() if rest else self._unread())

    def _frozen(self) -> Iterator[torch.Tensor]:
        for model in filter(None, (self.policy, self.reference)):
            yield from (weight for weight in model.parameters() if not weight.requires_grad)

    def _unread(self) -> Iterator[torch.Tensor]:
        """Weights that nothing reads while states and log-probabilities of what was prepared are there."""
        if self._reference is not None and self.synced_reference is None:
            yield from self._reference.model.parameters()
        if self._policy.trunk is not None and all(key in self._states for key in self._prepared):
            yield from self._policy.trunk_weights()

    def _commit_now_and_then(self) -> None:
        """So that a kill costs COMMIT_SECONDS of the pass at most."""
        if time.monotonic() - self._committed > COMMIT_SECONDS:
            self._states.commit()
            self._reference_logps.commit()
            self._committed = time.monotonic()

    def _reference_is_gone(self) -> bool:
        """Whether what the reference was at the start can no longer be computed."""
        moved = self.synced_reference is not None and self.synced_reference.syncs > 0
        return moved or (self._reference is None and self._updates > 0)

    def _unscored(self, pair: TokenizedPair) -> bool:
        """Whether the reference's log-probabilities of this pair are needed, and not there yet."""
        return self._needs_reference and self._key(pair) not in self._reference_logps

    def _prepare_stream(self, pairs: Sequence[TokenizedPair]) -> None:
        batch = self._pack(pairs)
        states = self._states_of(pairs, batch)
        if not any(self._unscored(pair) for pair in pairs):
            return
        if self._reference is None:
            logps = self._policy.logps(batch, states)
        else:
            logps = self._reference.logps(batch, None)
        sums = [each.tolist() for each in logps.sums.values()]
        for pair, *sides in zip(pairs, *sums, strict=True):
            self._reference_logps.put(self._key(pair), *sides)

    def _states_of(self, pairs: Sequence[TokenizedPair], batch: PackedBatch) -> torch.Tensor | None:
        """Trunk states of the stream, [T, D]: as they were kept, or computed and then kept."""
        if self._policy.trunk is None:
            return None
        kept = [self._states.get(self._key(pair)) for pair in pairs]
        if all(states is not None for states in kept):
            return self._laid_out(kept, batch)
        states = self._policy.trunk_states(batch)
        for pair, segment in zip(pairs, batch.segments, strict=True):
            whole = [states[tokens.start : tokens.stop] for tokens in segment.tokens if tokens]
            self._states.put(self._key(pair), torch.cat(whole))
        return states

    def _laid_out(self, kept: Sequence[torch.Tensor], batch: PackedBatch) -> torch.Tensor:
        """Each pair's states [n, D] in the stream's order, [T, D]; zeros in what fills it up."""
        tokens = batch.input_ids.shape[1]
        states = kept[0].new_zeros(tokens, kept[0].shape[1])
        for own, segment in zip(kept, batch.segments, strict=True):
            states[: segment.shared] = own[: segment.shared]
            states[segment.start : segment.start + segment.length] = own[segment.shared :]
        return states.to(self.device)

    def _pack(self, pairs: Sequence[TokenizedPair]) -> PackedBatch:
        return pack(pairs, self.device, FILL, self._shared)

    def _key(self, pair: TokenizedPair) -> str:
        return pair_key(pair, len(self._shared) if shares(pair, self._shared) else 0)

    def reference_logps(
        self, pairs: Sequence[TokenizedPair], advance: Advance = no_progress
    ) -> PairLogps:
        self.prepare(pairs, advance)
        return self._kept_reference(pairs, torch.device("cpu"))

    def _kept_reference(self, pairs: Sequence[TokenizedPair], device: torch.device) -> PairLogps:
        if not self._needs_reference:
            raise RuntimeError("this engine was made without a reference")
        sides = [self._reference_logps[self._key(pair)] for pair in pairs]
        wide = torch.promote_types(self._policy.head.dtype, torch.float32)
        # Through float64, which holds every float32 exactly, and which some devices do not have.
        both = torch.tensor(sides, dtype=torch.float64).to(wide).to(device)
        return PairLogps(*both.unbind(1))

    @torch.no_grad()
    def policy_logps(
        self, pairs: Sequence[TokenizedPair], advance: Advance = no_progress
    ) -> PairLogps:
        try:
            return in_order(
                pairs,
                self.max_tokens,
                self._pack,
                lambda some, batch: self._policy.logps(batch, self._states_of(some, batch)).map(
                    torch.Tensor.cpu
                ),
                advance,
            )
        finally:
            self._states.commit()  # what was damaged and computed anew

    def accumulate_gradients(
        self, pairs: Sequence[TokenizedPair], loss: LossFunction, advance: Advance = no_progress
    ) -> StepResult:
        self.prepare(pairs)
        cut = batch_by_tokens(pairs, int(TRAIN_SHARE * self.max_tokens))
        with self._masters.accumulate():
            return accumulate_step(
                [[pairs[index] for index in indices] for indices in cut],
                self._policy_forward,
                self._reference_of,
                loss,
                advance,
            )

    @torch.no_grad()
    def _reference_of(self, pairs: Sequence[TokenizedPair]) -> PairLogps:
        """Kept from the start; of a reference that has moved, computed now."""
        if self.synced_reference is None or not self.synced_reference.syncs:
            return self._kept_reference(pairs, self.device)
        assert self._moving is not None
        batch = self._pack(pairs)
        own = self._moving is self._reference
        return self._moving.logps(batch, None if own else self._states_of(pairs, batch))

    def _policy_forward(self, pairs: Sequence[TokenizedPair]) -> PairLogps:
        batch = self._pack(pairs)
        return self._policy.logps(batch, self._states_of(pairs, batch))


def halved(max_tokens: int, longest: int) -> int | None:
    """Half the budget, in tokens; None where every stream held one pair already."""
    return None if TRAIN_SHARE * max_tokens <= longest else max_tokens // 2


def at_once_bytes(one: int, alone: int, max_tokens: int, pairs_per_step: int) -> int:
    """Bytes kept by the longest stream of a step, from those of the longest pair, of `alone` tokens."""
    tokens = max(alone, min(TRAIN_SHARE * max_tokens, pairs_per_step * alone))
    return int(one * _filled(tokens) / _filled(alone))


def _filled(tokens: float) -> int:
    """Length of a stream of so many tokens with what fills it up."""
    return math.ceil(tokens / FILL) * FILL
