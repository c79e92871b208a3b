"""Choosing and building an engine for a policy and its reference."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from smoldpo.engine.autotune import KernelChoice, choose_kernels
from smoldpo.engine.base import Engine
from smoldpo.engine.cache import folder as cache
from smoldpo.engine.cache import reference_logps, trunk_states
from smoldpo.engine.cache.keys import results_key
from smoldpo.engine.cache.reference_logps import ReferenceStore
from smoldpo.engine.cache.trunk_states import DiskStore, MemoryStore, NoStore, TrunkStore
from smoldpo.engine.fast import KEEP_SHARE, FastEngine
from smoldpo.engine.plain import PlainEngine
from smoldpo.engine.precision import MasterWeights, cast_frozen
from smoldpo.engine.ref_sync import synced_copy, synced_model
from smoldpo.engine.trunk import boundary, names_kept_as_stored
from smoldpo.models.adapters import adapted_modules
from smoldpo.models.families import unsupported
from smoldpo.models.weights import tensors_sha256
from smoldpo.utils import progress
from smoldpo.utils.errors import UsageError
from smoldpo.utils.files import free_bytes
from smoldpo.utils.memory import free_memory, trim_memory

DISK_SHARE = 0.5
"""Kept states may take this share of what is free on the cache folder's disk."""


@dataclass(frozen=True)
class EngineChoice:
    """Which engine, and why in words when it is not the one hoped for."""

    name: str
    reason: str | None = None


@dataclass(frozen=True)
class EngineSettings:
    """What an engine can be told besides its models; see the settings in config/schema.py."""

    compute_dtype: torch.dtype
    train_batch_size: int
    eval_batch_size: int
    max_tokens: int
    cache: str
    cache_bytes: float
    compiled: bool
    kernels: KernelChoice | None = None
    """As an interrupted run had them; by default whichever are faster here."""
    needs_reference: bool = True
    """False where the loss compares with no reference: then no reference is made or run."""
    use_weighting: bool = False
    """Whether the loss weighs pairs by the policy's token probabilities: these must be looked at then."""
    sync_ref_model: bool = False
    """Whether the reference moves during training (ref_sync.py)."""


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


def build_plain(
    policy: PreTrainedModel, reference: PreTrainedModel | None, settings: EngineSettings
) -> Engine:
    """The reference implementation; without a reference, the policy as it is now is one.

    Where adapters train, that is the policy with its adapters off, and no second model.
    """
    own = reference is not None
    if reference is None and settings.needs_reference:
        reference = policy if adapted_modules(policy) else copy.deepcopy(policy)
    moving = None
    if settings.sync_ref_model and reference is not None:
        trains = [(name, p) for name, p in policy.named_parameters() if p.requires_grad]
        wide = dict(reference.named_parameters())
        moving = synced_model(policy, trains, reference, wide, own=own)
    return PlainEngine(
        policy,
        reference,
        compute_dtype=settings.compute_dtype,
        train_batch_size=settings.train_batch_size,
        eval_batch_size=settings.eval_batch_size,
        use_weighting=settings.use_weighting,
        moving=moving,
    )


def build_fast(
    policy: PreTrainedModel,
    reference: PreTrainedModel | None,
    settings: EngineSettings,
    reference_sha256: str,
    about: dict[str, Any],
) -> tuple[FastEngine, set[Path]]:
    """The fast engine, with what was kept from earlier runs over the same weights, and where it is kept.

    Args:
        reference: None where the reference is the policy as it is now.
        reference_sha256: of the reference's weights as loaded; for a policy that is its own reference, its.
        about: names of model and reference, for those who look into the cache.

    Raises:
        UsageError: the cache is asked to be on disk, and nothing can be written there.
    """
    dtype = settings.compute_dtype
    masters = MasterWeights(policy, dtype, names_kept_as_stored(policy, dtype))
    moving = None
    if reference is not None and settings.sync_ref_model:
        wide = MasterWeights(reference.requires_grad_(True), dtype)
        moving = synced_model(policy, masters.named(), reference, dict(wide.named()), own=True)
    elif reference is not None:
        cast_frozen(reference, dtype)
    elif settings.sync_ref_model:
        moving = synced_copy(policy, masters.named())
    if settings.cache in ("auto", "disk") and (reason := cache.unusable()) is not None:
        if settings.cache == "disk":
            raise UsageError(f"cache disk: {reason}; say --cache memory, or set XDG_CACHE_HOME")
        progress.say(f"cache: {reason}, so states are kept in memory, for this run alone")
        settings = replace(settings, cache="memory")
    kernels = settings.kernels or choose_kernels(dtype, policy.device.type)
    if settings.use_weighting:  # the policy's head goes by products then; so must the reference's
        kernels = replace(kernels, fused_head=False)
    about = about | {"dtype": str(dtype).removeprefix("torch."), "kernels": str(kernels)}
    states = _trunk_store(policy, settings, kernels, about)
    at = boundary(policy) if reference is None else 0
    logps = ReferenceStore()
    if settings.needs_reference:
        logps = _reference_store(
            reference or policy, at, reference_sha256, settings, kernels, about
        )
    engine = FastEngine(
        policy,
        masters,
        reference,
        settings.max_tokens,
        kernels,
        states,
        logps,
        settings.needs_reference,
        settings.use_weighting,
        moving,
    )
    if len(states) or len(logps):
        progress.say(
            f"cache: trunk states of {len(states):,} pairs and reference log-probabilities of "
            f"{len(logps):,} are there from earlier runs"
        )
    folders = {store.folder for store in (states, logps) if isinstance(store.folder, Path)}
    return engine, folders


def _trunk_store(
    policy: PreTrainedModel, settings: EngineSettings, kernels: KernelChoice, about: dict[str, Any]
) -> TrunkStore:
    at = boundary(policy)
    if settings.cache == "off" or at == 0:
        return NoStore()
    if settings.cache == "memory":
        return cache.store(
            "trunk",
            lambda: trunk_key(policy, at, settings, kernels),
            lambda: _memory_store(policy.device),
            alone=True,
        )
    folder = cache.entry_folder("trunk", trunk_key(policy, at, settings, kernels))
    about = about | {"what": states_behind(at)}
    return DiskStore(
        folder,
        policy.config.hidden_size,
        settings.compute_dtype,
        disk_room(folder, settings),
        about,
        progress.say,
    )


def _memory_store(device: torch.device) -> MemoryStore:
    trim_memory()  # of a store that was let go for this one
    return MemoryStore(KEEP_SHARE * free_memory(device))


def states_behind(at: int) -> str:
    """What a trunk store's about.json says of the boundary."""
    return f"states behind layer {at - 1}"


def disk_room(folder: Path, settings: EngineSettings) -> float:
    """Bytes that states may still take in a store's folder."""
    limit = settings.cache_bytes - cache.size_of(folder)
    return min(limit, DISK_SHARE * free_bytes(folder))


def trunk_key(
    policy: PreTrainedModel, at: int, settings: EngineSettings, kernels: KernelChoice
) -> str:
    """Under which states behind the first `at` layers are kept."""
    base = policy.model
    named = [(name, p) for name, p in base.layers[:at].named_parameters()]
    named.append(("embeddings", base.embed_tokens.weight))
    return results_key(
        tensors_sha256(named, settings.compute_dtype),  # some may lie in a narrower one
        settings.compute_dtype,
        policy.device,
        config=_shape(policy),
        attention=kernels.fused_attention,
        compiled=settings.compiled,
        format=trunk_states.FORMAT,
    )


def _reference_store(
    model: PreTrainedModel,
    at: int,
    sha256: str,
    settings: EngineSettings,
    kernels: KernelChoice,
    about: dict[str, Any],
) -> ReferenceStore:
    def key() -> str:
        return reference_key(model, at, sha256, settings, kernels)

    if settings.cache in ("off", "memory"):
        return cache.store("reference", key, ReferenceStore)
    about = about | {"what": "log-probabilities"}
    return ReferenceStore(cache.entry_folder("reference", key()), about, progress.say)


def reference_key(
    model: PreTrainedModel, at: int, sha256: str, settings: EngineSettings, kernels: KernelChoice
) -> str:
    """Under which the log-probabilities of a reference with these weights are kept."""
    return results_key(
        sha256,
        settings.compute_dtype,
        model.device,
        config=_shape(model),
        format=reference_logps.FORMAT,
        boundary=at,  # products below it have other numbers of rows
        kernels=asdict(kernels),
        compiled=settings.compiled,
    )


def configuration_sha256(*models: PreTrainedModel) -> str:
    """SHA-256 (hex) of what the models' configurations say about how they compute."""
    shapes = json.dumps([_shape(model) for model in models], sort_keys=True)
    return hashlib.sha256(shapes.encode()).hexdigest()


def _shape(model: PreTrainedModel) -> dict[str, Any]:
    """The configuration without what differs between two folders of the same model."""
    skipped = {"_name_or_path", "transformers_version", "dtype", "torch_dtype"}
    return {k: repr(v) for k, v in model.config.to_dict().items() if k not in skipped}
