"""What earlier runs left in the cache for this one, looked up without touching it."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from smoldpo.config.losses import needs_reference
from smoldpo.config.schema import TrainConfig
from smoldpo.engine.autotune import KernelChoice
from smoldpo.engine.build import EngineSettings, disk_room, reference_key, states_behind, trunk_key
from smoldpo.engine.cache import folder as cache
from smoldpo.engine.cache.keys import pair_key
from smoldpo.engine.cache.reference_logps import ReferenceStore
from smoldpo.engine.cache.trunk_states import DiskStore
from smoldpo.engine.fast import KEEP_SHARE
from smoldpo.engine.packing import pair_length, shares
from smoldpo.training.policy_and_reference import PolicyAndReference
from smoldpo.types import TokenizedPair
from smoldpo.utils.files import cache_folder


@dataclass(frozen=True, eq=False)
class Kept:
    """Pairs by what is still to be computed of them, and whether states will find room.

    Depths at which that is the same have the same object, so that it is counted once.
    """

    without_states: list[TokenizedPair]
    without_logps: list[TokenizedPair]
    states_bytes: float
    """Bytes that will be written for the former, on disk or in memory."""
    missing: float
    """Share of all pairs whose states find no room, so that they are computed each time."""


NOTHING = Kept([], [], 0.0, 0.0)
"""For an engine that keeps nothing."""


class Cupboard:
    """The cache as a run with this configuration would open it.

    Args:
        models: loaded as the run would load them, before any step.
        free: bytes of memory free before they were.
        pairs, shared: all of the run's, and what most of their prompts begin with.
    """

    def __init__(
        self,
        config: TrainConfig,
        models: PolicyAndReference,
        free: float,
        pairs: Sequence[TokenizedPair],
        shared: tuple[int, ...],
    ):
        self._config, self._models, self._free = config, models, free
        self._keyed = {
            pair_key(pair, len(shared) if shares(pair, shared) else 0): pair for pair in pairs
        }
        self._found: dict[tuple[frozenset[str] | None, frozenset[str], float], Kept] = {}
        self._logps_kept: dict[str, frozenset[str]] = {}
        self.where = config.cache
        if config.cache in ("auto", "disk"):
            self.where = "disk" if _writable(cache_folder()) else "memory"
        self._settings = EngineSettings(
            compute_dtype=models.dtype,
            train_batch_size=config.per_device_train_batch_size,
            eval_batch_size=config.per_device_eval_batch_size,
            max_tokens=config.max_tokens,
            cache=self.where,
            cache_bytes=config.cache_limit * 1e9,
            compiled=models.computing["compiled"],
            needs_reference=needs_reference(config.loss_type),
        )
        self._kernels = KernelChoice(**models.computing["kernels"])
        self._entries = cache.entries() if self.where == "disk" else []

    def look(self, below: int) -> Kept:
        """What is there, and what will be, with so many layers below the boundary."""
        states, room = self._states(below)
        logps = self._logps(below)
        same = (states if below else None, logps, room)
        if same not in self._found:
            self._found[same] = self._kept(below, states, room, logps)
        return self._found[same]

    def _kept(self, below: int, states: frozenset[str], room: float, logps: frozenset[str]) -> Kept:
        keyed = self._keyed
        no_states = [pair for key, pair in keyed.items() if below and key not in states]
        no_logps = [
            pair
            for key, pair in keyed.items()
            if self._settings.needs_reference and key not in logps
        ]
        policy = self._models.engine.policy
        size = policy.config.hidden_size * self._models.dtype.itemsize
        wanted = size * sum(map(pair_length, no_states))
        kept = min(room, wanted)
        missing = (1 - kept / wanted) * len(no_states) / len(keyed) if wanted else 0.0
        return Kept(no_states, no_logps, kept, missing)

    def _states(self, below: int) -> tuple[frozenset[str], float]:
        """Keys of the pairs whose states are on disk, and bytes of room for others."""
        if below == 0 or self.where == "off":
            return frozenset(), 0.0
        if self.where == "memory":
            return frozenset(), KEEP_SHARE * self._free
        what = states_behind(below)
        if not any(entry.about.get("what") == what for entry in self._entries):
            return frozenset(), self._room_for_new
        policy = self._models.engine.policy
        key = trunk_key(policy, below, self._settings, self._kernels)
        folder = cache.entry_folder("trunk", key)
        width, dtype = policy.config.hidden_size, self._models.dtype
        store = DiskStore(folder, width, dtype, 0, {}, _say_nothing, looking=True)
        return frozenset(store.keys()), disk_room(folder, self._settings)

    @functools.cached_property
    def _room_for_new(self) -> float:
        """Bytes that a store may take that is not there yet."""
        return disk_room(cache.entry_folder("trunk", "none"), self._settings)

    def _logps(self, below: int) -> frozenset[str]:
        if self.where != "disk" or not self._settings.needs_reference:
            return frozenset()
        own = self._config.reference is not None
        key = reference_key(
            self._models.engine.reference if own else self._models.engine.policy,
            0 if own else below,
            self._models.hashes["reference"],
            self._settings,
            self._kernels,
        )
        if key not in self._logps_kept:
            folder = cache.entry_folder("reference", key)
            keys = ReferenceStore(folder, {}, _say_nothing, looking=True).keys()
            self._logps_kept[key] = frozenset(keys)
        return self._logps_kept[key]


def _writable(folder: Path) -> bool:
    """Whether the folder, or the one that it would be made in, may be written to."""
    while not folder.exists():
        folder = folder.parent
    return os.access(folder, os.W_OK)


def _say_nothing(_: str) -> None:
    pass
