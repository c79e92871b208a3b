"""What earlier runs left in the cache for this one, read without touching it."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from smoldpo.config.schema import TrainConfig
from smoldpo.engine.autotune import KernelChoice
from smoldpo.engine.build import disk_room, reference_key, states_behind, trunk_key
from smoldpo.engine.cache import folder as cache
from smoldpo.engine.cache.keys import pair_key
from smoldpo.engine.cache.reference_logps import ReferenceStore
from smoldpo.engine.cache.trunk_states import DiskStore
from smoldpo.engine.fast import KEEP_SHARE
from smoldpo.engine.packing import pair_length, shares
from smoldpo.training.policy_and_reference import PolicyAndReference
from smoldpo.training.setup import engine_settings
from smoldpo.types import TokenizedPair
from smoldpo.utils.files import cache_folder


@dataclass(frozen=True, eq=False)
class CacheMisses:
    """The pairs that the first pass still has to compute, and whether their states find room.

    Depths with the same misses get the same object, so that these are counted once.
    """

    without_states: Sequence[TokenizedPair] = ()
    without_logps: Sequence[TokenizedPair] = ()
    states_bytes: float = 0.0
    """Bytes that will be written for `without_states`, on disk or in memory."""
    without_room: float = 0.0
    """Share of all pairs whose states find no room, and are computed each time."""


NOTHING_CACHED = CacheMisses()
"""Of an engine that has no cache."""


class CacheLookup:
    """The cache as a run with this configuration would find it.

    Args:
        models: loaded as the run would load them, before any step.
        free: bytes of memory free before they were loaded.
        pairs: all pairs of the run.
        shared: the tokens with which most of their prompts begin.
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
        self.location = config.cache
        if config.cache in ("auto", "disk"):
            self.location = "disk" if _writable(cache_folder()) else "memory"
        settings = engine_settings(config, models.facts.dtype, models.computing.compiled)
        self._settings = replace(settings, cache=self.location)
        self._kernels = KernelChoice(**models.computing.kernels)
        self._entries = cache.entries() if self.location == "disk" else []
        self._misses = functools.cache(self._find_misses)
        self._kept_logps = functools.cache(self._read_logps)

    def misses(self, below: int) -> CacheMisses:
        """What is not cached, with so many layers below the boundary."""
        states, room = self._states(below)
        return self._misses(states if below else None, room, self._logps(below))

    def _find_misses(
        self, states: frozenset[str] | None, room: float, logps: frozenset[str] | None
    ) -> CacheMisses:
        """None for `states`: there is no trunk; for `logps`: no reference is needed."""
        keyed = self._keyed.items()
        no_states = [pair for key, pair in keyed if states is not None and key not in states]
        no_logps = [pair for key, pair in keyed if logps is not None and key not in logps]
        policy: Any = self._models.engine.policy
        size = policy.config.hidden_size * self._models.facts.dtype.itemsize
        wanted = size * sum(map(pair_length, no_states))
        kept = min(room, wanted)
        without_room = (1 - kept / wanted) * len(no_states) / len(keyed) if wanted else 0.0
        return CacheMisses(no_states, no_logps, kept, without_room)

    def _states(self, below: int) -> tuple[frozenset[str], float]:
        """Keys of the pairs whose states are on disk, and bytes of room for others."""
        if below == 0 or self.location == "off":
            return frozenset(), 0.0
        if self.location == "memory":
            return frozenset(), KEEP_SHARE * self._free
        what = states_behind(below)
        if not any(entry.about.get("what") == what for entry in self._entries):
            return frozenset(), self._room_for_new
        policy: Any = self._models.engine.policy
        key = trunk_key(policy, below, self._settings, self._kernels)
        folder = cache.entry_folder("trunk", key)
        width, dtype = policy.config.hidden_size, self._models.facts.dtype
        store = DiskStore(folder, width, dtype, 0, {}, _ignore, looking=True)
        return frozenset(store.keys()), disk_room(folder, self._settings)

    @functools.cached_property
    def _room_for_new(self) -> float:
        """Bytes that a store may take that does not exist yet."""
        return disk_room(cache.entry_folder("trunk", "none"), self._settings)

    def _logps(self, below: int) -> frozenset[str] | None:
        """Keys of the pairs that the reference has scored."""
        if not self._settings.needs_reference:
            return None
        if self.location != "disk":
            return frozenset()
        engine: Any = self._models.engine
        own = self._config.reference is not None
        model, at = (engine.reference, 0) if own else (engine.policy, below)
        sha256 = self._models.facts.hashes["reference"]
        return self._kept_logps(reference_key(model, at, sha256, self._settings, self._kernels))

    def _read_logps(self, key: str) -> frozenset[str]:
        folder = cache.entry_folder("reference", key)
        return frozenset(ReferenceStore(folder, {}, _ignore, looking=True).keys())


def _writable(folder: Path) -> bool:
    """Whether the folder, or the one in which it would be made, may be written to."""
    while not folder.exists():
        folder = folder.parent
    return os.access(folder, os.W_OK)


def _ignore(_: str) -> None:
    """Instead of a warning about unreadable entries."""
