"""Choosing and building an engine for a policy and its reference."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from smoldpo.engine.autotune import KernelChoice, choose_kernels, dtype_name
from smoldpo.engine.base import Engine, EngineSettings
from smoldpo.engine.cache import folder as cache
from smoldpo.engine.cache import reference_logps, trunk_states
from smoldpo.engine.cache.keys import results_key
from smoldpo.engine.cache.reference_logps import ReferenceStore
from smoldpo.engine.cache.trunk_states import MEMORY_SHARE, DiskStore, MemoryStore, TrunkStore
from smoldpo.engine.fast import FastEngine
from smoldpo.engine.kernels.native.library import build_id
from smoldpo.engine.plain import PlainEngine
from smoldpo.engine.precision import MasterWeights, cast, cast_frozen, master_dtype
from smoldpo.engine.ref_sync import synced_copy, synced_model
from smoldpo.engine.trunk import boundary
from smoldpo.models.adapters import adapted_modules
from smoldpo.models.families import unsupported
from smoldpo.models.mapped_weights import names_kept_as_stored
from smoldpo.models.weights import copy_sharing, tensors_sha256
from smoldpo.utils import progress
from smoldpo.utils.distributed import world
from smoldpo.utils.errors import UsageError
from smoldpo.utils.files import free_bytes
from smoldpo.utils.memory import free_memory, trim_memory

DISK_SHARE = 0.5
"""Stored states may take this share of what is free on the cache folder's disk."""


@dataclass(frozen=True)
class EngineChoice:
    """Which engine, and why in words when it is not the one hoped for."""

    name: str
    reason: str | None = None


@dataclass(frozen=True)
class BuiltEngine:
    """An engine, its cache folders, and its kernels (None: the plain engine)."""

    engine: Engine
    folders: set[Path] = field(default_factory=set)
    kernels: KernelChoice | None = None


def choose_engine(asked: str, *models: PreTrainedModel) -> EngineChoice:
    """The engine for these models: `auto` takes the fast one wherever it is proven.

    Raises:
        UsageError: `fast` was asked for, and cannot run these models.
    """
    reasons = [reason for model in models if (reason := unsupported(model)) is not None]
    if asked == "fast" and reasons:
        raise UsageError(f"engine fast: {reasons[0]}; say --engine plain, or auto")
    if asked == "plain" or reasons:
        return EngineChoice("plain", reasons[0] if asked == "auto" else None)
    return EngineChoice("fast")


def kernels_for(dtype: torch.dtype, device: str, asked: str) -> KernelChoice:
    """What `asked` (auto, native or torch) comes to on the first rank; see choose_kernels."""
    measure = functools.partial(choose_kernels, dtype, device, asked)
    return KernelChoice.of(world().of_first(lambda: asdict(measure())))


def build_engine(
    policy: PreTrainedModel,
    reference: PreTrainedModel | None,
    settings: EngineSettings,
    reference_sha256: str = "",
    about: Mapping[str, str] | None = None,
) -> BuiltEngine:
    """The engine that `settings` names; the models become its own, and are cast as it needs them.

    Args:
        reference: None where the reference is the policy as it is now.
        reference_sha256: of the reference's weights as loaded (the policy's, where it is its own
            reference): the key of its stored log-probabilities.
        about: names of model and reference, for those who look into the cache.

    Raises:
        UsageError: the cache is asked to be on disk, and nothing can be written there; a reference
            that is to move, and has another architecture.
    """
    if settings.engine == "plain":
        return BuiltEngine(_build_plain(policy, reference, settings))
    if settings.kernels is None:
        kernels = kernels_for(settings.compute_dtype, policy.device.type, "auto")
        settings = replace(settings, kernels=kernels)
    dtype = settings.compute_dtype
    masters = MasterWeights(policy, dtype, names_kept_as_stored(policy, dtype))
    synced = None
    if reference is not None and settings.sync_ref_model:
        theirs = MasterWeights(reference.requires_grad_(True), dtype)
        synced = synced_model(policy, masters.named(), reference, dict(theirs.named()), own=True)
    elif reference is not None:
        cast_frozen(reference, dtype)
    elif settings.sync_ref_model:
        synced = synced_copy(policy, masters.named())
    stores = EngineStores(policy, reference, settings, reference_sha256, about)
    states, logps = stores.trunk(boundary(policy)), stores.reference(boundary(policy))
    engine = FastEngine(policy, masters, reference, stores.settings, states, logps, synced)
    if len(states) or len(logps):
        progress.say(
            f"cache: trunk states of {len(states):,} pairs and reference log-probabilities of "
            f"{len(logps):,} are there from earlier runs"
        )
    folders = {store.folder for store in (states, logps) if store.folder is not None}
    return BuiltEngine(engine, folders, engine.kernels)


def _build_plain(
    policy: PreTrainedModel, reference: PreTrainedModel | None, settings: EngineSettings
) -> Engine:
    """Without a reference, the policy as it is now is one: with its adapters off, or as a copy."""
    if settings.fsdp:
        return _build_sharded(policy, reference, settings)
    own = reference is not None
    for model in filter(None, (policy, reference)):
        cast(model, master_dtype(settings.compute_dtype))
    if reference is None and settings.needs_reference:
        reference = policy if adapted_modules(policy) else copy.deepcopy(policy)
    synced = None
    if settings.sync_ref_model and reference is not None:
        trains = [(name, p) for name, p in policy.named_parameters() if p.requires_grad]
        masters = dict(reference.named_parameters())
        synced = synced_model(policy, trains, reference, masters, own=own)
    return PlainEngine(policy, reference, settings, synced)


def _build_sharded(
    policy: PreTrainedModel, reference: PreTrainedModel | None, settings: EngineSettings
) -> Engine:
    """As _build_plain; each rank keeps a share of every weight."""
    from smoldpo.engine.sharding import mesh_of, shard  # here, for it loads much

    if reference is None and settings.needs_reference:
        reference = policy if adapted_modules(policy) else copy_sharing(policy)
    mesh = mesh_of(world(), policy.device)
    shard(policy, mesh, settings.compute_dtype)
    if reference is not None and reference is not policy:
        shard(reference.requires_grad_(False), mesh, settings.compute_dtype)
    return PlainEngine(policy, reference, settings)


class EngineStores:
    """The stores of a fast engine: of trunk states, and of the reference's log-probabilities.

    Args:
        settings: with `kernels` chosen. `settings` of this object says where the cache really is.
        read_only: to see what is stored, at any boundary: no folder is touched, nothing is said.
        free: bytes of memory of which states in memory may take a share; by default what is free.

    Raises:
        UsageError: the cache is asked to be on disk, and nothing can be written there.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        reference: PreTrainedModel | None,
        settings: EngineSettings,
        reference_sha256: str,
        about: Mapping[str, str] | None = None,
        *,
        read_only: bool = False,
        free: float | None = None,
    ):
        assert settings.kernels is not None
        if settings.use_weighting:  # the policy's head goes by products; so must the reference's
            settings = replace(settings, kernels=replace(settings.kernels, fused_head=False))
        if settings.cache in ("auto", "disk"):
            reason = cache.unusable(read_only)
            if reason is not None and settings.cache == "disk" and not read_only:
                raise UsageError(f"cache disk: {reason}; say --cache memory, or set XDG_CACHE_HOME")
            if reason is not None and not read_only:
                progress.say(f"cache: {reason}, so states are kept in memory, for this run alone")
            settings = replace(settings, cache="disk" if reason is None else "memory")
        dtype = dtype_name(settings.compute_dtype)
        self._about = dict(about or {}) | {"dtype": dtype, "kernels": str(settings.kernels)}
        self.settings = settings
        self._policy, self._reference, self._sha256 = policy, reference, reference_sha256
        self._read_only, self._free = read_only, free
        self._say: Callable[[str], None] = _say_nothing if read_only else progress.say
        self._kinds = {entry.about.get("what") for entry in cache.entries()} if read_only else set()

    def trunk(self, below: int) -> TrunkStore:
        """States of pairs behind the first `below` layers."""
        settings = self.settings
        if settings.cache == "off" or below == 0:
            return TrunkStore()
        if settings.cache == "memory":
            if self._read_only:
                return self._memory_store()
            key = functools.partial(self._trunk_key, below)
            return cache.store("trunk", key, self._memory_store, exclusive=True)
        what = f"states behind layer {below - 1}"
        # A key is a hash over weights: none is made where no entry can have it.
        known = not self._read_only or what in self._kinds
        folder = cache.entry_folder("trunk", self._trunk_key(below) if known else "none")
        room = min(settings.cache_bytes - cache.size_of(folder), DISK_SHARE * free_bytes(folder))
        room /= world().local_size
        width: int = self._policy.config.hidden_size
        about = self._about | {"what": what}
        return DiskStore(
            folder, width, settings.compute_dtype, room, about, self._say, self._read_only
        )

    def _memory_store(self) -> MemoryStore:
        if self._free is not None:
            return MemoryStore(MEMORY_SHARE * self._free)
        trim_memory()  # of a store that was let go for this one
        share = MEMORY_SHARE / world().local_size
        return MemoryStore(share * free_memory(self._policy.device))

    def reference(self, below: int) -> ReferenceStore:
        """Log-probabilities of the reference; as the policy's start, `below` trunk layers."""
        if not self.settings.needs_reference:
            return ReferenceStore()
        if self.settings.cache in ("off", "memory"):
            if self._read_only:
                return ReferenceStore()
            key = functools.partial(self._reference_key, below)
            return cache.store("reference", key, ReferenceStore)
        folder = cache.entry_folder("reference", self._reference_key(below))
        about = self._about | {"what": "log-probabilities"}
        return ReferenceStore(folder, about, self._say, self._read_only)

    def _trunk_key(self, below: int) -> str:
        base = self._policy.model
        named = [(name, p) for name, p in base.layers[:below].named_parameters()]
        named.append(("embeddings", base.embed_tokens.weight))
        settings = self.settings
        assert settings.kernels is not None
        return results_key(
            tensors_sha256(named, settings.compute_dtype),  # some may lie in a narrower one
            settings.compute_dtype,
            self._policy.device,
            config=_shape(self._policy),
            attention=settings.kernels.fused_attention,
            compiled=settings.compiled,
            native=_native_build(settings.kernels),
            format=trunk_states.FORMAT,
        )

    def _reference_key(self, below: int) -> str:
        model, settings = self._reference or self._policy, self.settings
        assert settings.kernels is not None
        return results_key(
            self._sha256,
            settings.compute_dtype,
            model.device,
            config=_shape(model),
            format=reference_logps.FORMAT,
            boundary=0 if self._reference is not None else below,  # products have other rows
            kernels=asdict(settings.kernels),
            native=_native_build(settings.kernels),
            compiled=settings.compiled,
        )


def _native_build(kernels: KernelChoice) -> str:
    return build_id(kernels.native) if kernels.native else ""


def _say_nothing(_: str) -> None:
    pass


def configuration_sha256(*models: PreTrainedModel) -> str:
    """SHA-256 (hex) of what the models' configurations say about how they compute."""
    shapes = json.dumps([_shape(model) for model in models], sort_keys=True)
    return hashlib.sha256(shapes.encode()).hexdigest()


def _shape(model: PreTrainedModel) -> dict[str, Any]:
    """The configuration without what differs between two folders of the same model."""
    skipped = {"_name_or_path", "transformers_version", "dtype", "torch_dtype"}
    return {k: repr(v) for k, v in model.config.to_dict().items() if k not in skipped}
