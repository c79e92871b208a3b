"""The exact fast engine: DPO's loss and gradients, doing only the work that the loss needs.

    once a pair     stream P C R -> trunk (frozen layers) -> states, kept
                    states -> top -> final norm -> head on completion positions -> reference
                    log-probabilities, kept (unless the loss compares with no reference)
    every epoch     states -> top -> final norm -> head -> policy log-probabilities -> loss
                    -> backward to the boundary
    (after a reference has moved, states -> its own top -> ... in each step as well)

Before the first update the policy is the reference, so the reference's log-probabilities come from
the policy itself; no second model exists. engine/plain.py is what all of this is held against.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from smoldpo.engine.autotune import KernelChoice
from smoldpo.engine.base import (
    Engine,
    EngineSettings,
    LossFunction,
    StepResult,
    batched_logps,
    naming,
)
from smoldpo.engine.batching import STREAM_MULTIPLE, TokenBatching
from smoldpo.engine.cache.reference_logps import ReferenceStore
from smoldpo.engine.cache.trunk_states import MEMORY_SHARE, MemoryStore, TrunkStore
from smoldpo.engine.dealing import deal
from smoldpo.engine.gradient_accumulation import StepStreams, accumulate_step
from smoldpo.engine.logprobs import LogprobModel
from smoldpo.engine.packing import PackedBatch, common_prefix, pack, pair_length
from smoldpo.engine.precision import Leaves, MasterWeights
from smoldpo.engine.ref_sync import SyncedReference
from smoldpo.engine.trunk import boundary
from smoldpo.models.mapped_weights import release_file_pages
from smoldpo.types import Advance, PairLogps, TokenizedPair, no_progress
from smoldpo.utils.distributed import world
from smoldpo.utils.memory import free_memory
from smoldpo.utils.workers import Workers

COMMIT_SECONDS = 30.0
"""What is computed once a pair is written at least this often."""


class FastEngine(Engine):
    """One model, cut at the freeze boundary.

    Args:
        policy: its weights in the compute dtype, but for those that stay as they are stored
            (mapped_weights.py); `requires_grad` set on what trains.
        masters: what trains, in float32 (or float64), for the optimizer.
        reference: a model of its own, only where the reference is not the policy's start.
        settings: of these stream_tokens, kernels, needs_reference and use_weighting.
        trunk_store, reference_store: of what is computed once a pair; by default in memory.
        synced_reference: the reference, where it moves during training: `reference`, or a copy of
            the policy's top.
    """

    batching: TokenBatching

    def __init__(
        self,
        policy: PreTrainedModel,
        masters: MasterWeights,
        reference: PreTrainedModel | None = None,
        settings: EngineSettings | None = None,
        trunk_store: TrunkStore | None = None,
        reference_store: ReferenceStore | None = None,
        synced_reference: SyncedReference | None = None,
    ):
        settings = settings or EngineSettings()
        self.policy, self.reference = policy, reference
        self.synced_reference = synced_reference
        self.batching = TokenBatching(settings.stream_tokens)
        self.kernels = settings.kernels or KernelChoice()
        self._needs_reference = settings.needs_reference
        self._masters = masters
        self.workers = Workers(None if self.device.type == "cpu" else 1)
        self.ranks = world()
        self._ordered_sum = settings.ordered_sum
        self._squares = settings.use_weighting
        self._models = self._models_of_workers()
        self._policy = self._models[0].policy
        self._storing = threading.Lock()
        if trunk_store is None:
            trunk_store = MemoryStore(MEMORY_SHARE * free_memory(self.device))
        self._states: TrunkStore = trunk_store
        self._reference_logps = ReferenceStore() if reference_store is None else reference_store
        self._prepared: set[str] = set()
        self._committed = time.monotonic()
        self._updates = 0

    def _models_of_workers(self) -> list[_WorkerModels]:
        at, count = boundary(self.policy), self.workers.count
        return [
            _WorkerModels(self, at, self._squares, self._masters.leaves()) for _ in range(count)
        ]

    def trainable_parameters(self) -> Iterable[tuple[str, torch.nn.Parameter]]:
        return self._masters.named()

    def updated(self) -> None:
        self._masters.copy_to_model()
        self._updates += 1

    def drop_gradients(self) -> None:
        self._masters.drop_gradients()

    def disk_bytes(self, pairs: Sequence[TokenizedPair]) -> int:
        if self._policy.trunk is None:
            return 0
        if not self.batching.prefix:
            self._find_prefix(pairs)
        missing = (pair for pair in set(pairs) if self.batching.key(pair) not in self._states)
        return self._states.disk_bytes(sum(map(pair_length, missing)))

    def reference_sha256(self, pairs: Sequence[TokenizedPair]) -> str | None:
        if not self._needs_reference:
            return None
        logps = self.reference_logps(pairs)
        sides = json.dumps([each.tolist() for each in logps.sums.values()])
        return hashlib.sha256(sides.encode()).hexdigest()

    @torch.no_grad()
    def prepare(self, pairs: Sequence[TokenizedPair], advance: Advance = no_progress) -> None:
        """Trunk states and reference log-probabilities of these pairs, each computed once.

        Raises:
            RuntimeError: the policy was updated, so that it is no longer the reference, and some of
                these pairs were not prepared.
        """
        if not self._prepared:
            self._find_prefix(pairs)
        keyed = {self.batching.key(pair): pair for pair in pairs}
        todo = [pair for key, pair in keyed.items() if key not in self._prepared]
        unscored = [pair for pair in todo if self._is_unscored(pair)]
        if unscored and self._reference_is_gone():
            raise RuntimeError(
                "the reference is gone: prepare() must see every pair before training"
            )
        trunk = self._policy.trunk is not None
        stateless = [p for p in todo if trunk and self.batching.key(p) not in self._states]
        computing = set(stateless)
        others = [pair for pair in unscored if pair not in computing]
        groups = self._missing_anywhere(todo, stateless, others)

        def done(batch: Sequence[TokenizedPair]) -> None:
            if time.monotonic() - self._committed > COMMIT_SECONDS:
                self._commit()
            advance(len(batch))

        try:
            advance(len(pairs) - sum(map(len, groups)))
            for group in groups:
                batches = self.batching.forward_batches(group)
                found = deal(self.ranks, self.workers, self._prepare_stream, batches, done)
                self._take(batches, found)
        finally:  # interrupted, or out of memory: what was computed is not computed again
            self._commit()
        if todo and self.ranks.size > 1:
            self.ranks.share(lambda: None)  # all have written theirs
            self._states.refresh()
        self._prepared.update(keyed)

    def _missing_anywhere(
        self, pairs: Sequence[TokenizedPair], *groups: Sequence[TokenizedPair]
    ) -> list[list[TokenizedPair]]:
        """Groups of `pairs` that lack something, with those that lack it on other ranks."""
        if self.ranks.size == 1 or not pairs:
            return [list(group) for group in groups]
        places = {self.batching.key(pair): place for place, pair in enumerate(pairs)}
        own = [[places[self.batching.key(pair)] for pair in group] for group in groups]
        known: set[int] = set()
        found = []
        for columns in zip(*self.ranks.share(lambda: own), strict=True):
            missing = {place for column in columns for place in column} - known
            known |= missing
            found.append([pairs[place] for place in sorted(missing)])
        return found

    def _take(
        self, batches: Sequence[Sequence[TokenizedPair]], found: Sequence[PairLogps | None]
    ) -> None:
        """The reference's log-probabilities that other ranks have computed."""
        for batch, logps in zip(batches, found, strict=True):
            if logps is not None:
                self._put_reference(batch, logps)

    def _find_prefix(self, pairs: Sequence[TokenizedPair]) -> None:
        self.batching = replace(self.batching, prefix=common_prefix(pairs))

    def _commit(self) -> None:
        with self._storing:
            self._states.commit()
            self._reference_logps.commit()
        self._committed = time.monotonic()

    def _reference_is_gone(self) -> bool:
        """Whether the reference as it was at the start can no longer be computed."""
        return self._has_moved or (self.reference is None and self._updates > 0)

    @property
    def _has_moved(self) -> bool:
        return self.synced_reference is not None and self.synced_reference.syncs > 0

    def _is_unscored(self, pair: TokenizedPair) -> bool:
        """Whether the reference's log-probabilities of this pair are needed and not known."""
        return self._needs_reference and self.batching.key(pair) not in self._reference_logps

    def _prepare_stream(self, worker: int, pairs: Sequence[TokenizedPair]) -> PairLogps | None:
        """Compute what is missing; the reference's log-probabilities, for ranks that lack them."""
        with naming(pairs):
            self._prepare(self._models[worker], pairs)
        alone = self.ranks.size == 1 or not self._needs_reference
        return None if alone else self._stored_reference(pairs, torch.device("cpu"))

    def _prepare(self, models: _WorkerModels, pairs: Sequence[TokenizedPair]) -> None:
        batch = self._pack(pairs)
        states = self._states_of(models, pairs, batch)
        if not any(self._is_unscored(pair) for pair in pairs):
            return
        if models.reference is None:
            logps = models.policy.logps(batch, states)
        else:
            logps = models.reference.logps(batch, None)
        self._put_reference(pairs, logps)

    def _put_reference(self, pairs: Sequence[TokenizedPair], logps: PairLogps) -> None:
        sums = [each.tolist() for each in logps.sums.values()]
        with self._storing:
            for pair, *sides in zip(pairs, *sums, strict=True):
                self._reference_logps.put(self.batching.key(pair), *sides)

    def release_frozen(self, rest: bool = False) -> int:
        return release_file_pages(self._frozen_weights() if rest else self._unread_weights())

    def _frozen_weights(self) -> Iterator[torch.Tensor]:
        for model in filter(None, (self.policy, self.reference)):
            yield from (weight for weight in model.parameters() if not weight.requires_grad)

    def _unread_weights(self) -> Iterator[torch.Tensor]:
        """Weights that nothing reads while states and log-probabilities of all pairs are cached."""
        if self.reference is not None and self.synced_reference is None:
            yield from self.reference.parameters()
        if self._policy.trunk is not None and all(key in self._states for key in self._prepared):
            yield from self._policy.trunk_weights()

    def _states_of(
        self, models: _WorkerModels, pairs: Sequence[TokenizedPair], batch: PackedBatch
    ) -> torch.Tensor | None:
        """Trunk states of the stream, [T, D]: from the store, or computed and then stored."""
        if models.policy.trunk is None:
            return None
        with self._storing:
            stored = [self._states.get(self.batching.key(pair)) for pair in pairs]
        known = [states for states in stored if states is not None]
        if len(known) == len(pairs):
            return self._in_stream(known, batch)
        states = models.policy.trunk_states(batch)
        with self._storing:
            for pair, segment in zip(pairs, batch.segments, strict=True):
                parts = [states[tokens.start : tokens.stop] for tokens in segment.tokens if tokens]
                self._states.put(self.batching.key(pair), torch.cat(parts))
        return states

    def _in_stream(self, stored: Sequence[torch.Tensor], batch: PackedBatch) -> torch.Tensor:
        """Each pair's states [n, D] in the stream's order, [T, D]; zeros where it is padded."""
        states = stored[0].new_zeros(batch.input_ids.shape[1], stored[0].shape[1])
        for pair_states, segment in zip(stored, batch.segments, strict=True):
            states[: segment.shared] = pair_states[: segment.shared]
            states[segment.start : segment.start + segment.length] = pair_states[segment.shared :]
        return states.to(self.device)

    def _pack(self, pairs: Sequence[TokenizedPair]) -> PackedBatch:
        return pack(pairs, self.device, STREAM_MULTIPLE, self.batching.prefix)

    def reference_logps(
        self, pairs: Sequence[TokenizedPair], advance: Advance = no_progress
    ) -> PairLogps:
        self.prepare(pairs, advance)
        return self._stored_reference(pairs, torch.device("cpu"))

    def _stored_reference(self, pairs: Sequence[TokenizedPair], device: torch.device) -> PairLogps:
        if not self._needs_reference:
            raise RuntimeError("this engine was made without a reference")
        sides = [self._reference_logps[self.batching.key(pair)] for pair in pairs]
        full_dtype = torch.promote_types(self._policy.head.dtype, torch.float32)
        # Through float64, which holds every float32 exactly, and which some devices do not have.
        both = torch.tensor(sides, dtype=torch.float64).to(full_dtype).to(device)
        return PairLogps(*both.unbind(1))

    @torch.no_grad()
    def policy_logps(
        self, pairs: Sequence[TokenizedPair], advance: Advance = no_progress
    ) -> PairLogps:
        try:
            return batched_logps(
                pairs,
                self.batching,
                lambda worker, batch: self._policy_of(worker, batch).map(torch.Tensor.cpu),
                advance,
                self.workers,
                self.ranks,
            )
        finally:
            self._states.commit()  # what was damaged and computed anew

    def accumulate_gradients(
        self, pairs: Sequence[TokenizedPair], loss: LossFunction, advance: Advance = no_progress
    ) -> StepResult:
        self.prepare(pairs)
        streams = StepStreams(
            self.batching.step_batches(pairs),
            self._policy_of,
            self._reference_of,
            [parameter for _, parameter in self._masters.named()],
            self.workers,
            lambda worker, place: self._models[worker].leaves.stream(place),
            self._masters.accumulate,
            self._masters.abandon,
            ranks=self.ranks,
            ordered_sum=self._ordered_sum,
            device=self.device,
        )
        return accumulate_step(streams, loss, advance)

    @torch.no_grad()
    def _reference_of(self, worker: int, pairs: Sequence[TokenizedPair]) -> PairLogps:
        """Stored at the start; of a reference that has moved, computed now."""
        if not self._has_moved:
            return self._stored_reference(pairs, self.device)
        models, batch = self._models[worker], self._pack(pairs)
        assert models.synced is not None
        own = models.synced is models.reference
        return models.synced.logps(batch, None if own else self._states_of(models, pairs, batch))

    def _policy_of(self, worker: int, pairs: Sequence[TokenizedPair]) -> PairLogps:
        models, batch = self._models[worker], self._pack(pairs)
        return models.policy.logps(batch, self._states_of(models, pairs, batch))

    def _forward_policy(self, pairs: Sequence[TokenizedPair]) -> PairLogps:
        return self._policy_of(0, pairs)


class _WorkerModels:
    """What one worker computes with: modules and leaves of its own over the engine's weights."""

    def __init__(self, engine: FastEngine, at: int, squares: bool, leaves: Leaves):
        self.leaves, kernels = leaves, engine.kernels
        self.policy = LogprobModel(engine.policy, at, kernels, squares, leaves.parameters)
        reference, synced = engine.reference, engine.synced_reference
        self.reference = None if reference is None else LogprobModel(reference, 0, kernels)
        self.synced = self.reference
        if synced is not None and synced.model is not reference:
            self.synced = LogprobModel(synced.model, at, kernels)
