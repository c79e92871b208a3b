"""What earlier runs left in the cache for this one, read without touching it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from smoldpo.config.schema import TrainConfig
from smoldpo.engine.autotune import KernelChoice
from smoldpo.engine.batching import TokenBatching
from smoldpo.engine.build import EngineStores
from smoldpo.engine.packing import pair_length
from smoldpo.training.policy_and_reference import PolicyAndReference
from smoldpo.training.setup import engine_settings
from smoldpo.types import TokenizedPair


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
        pairs, batching: all pairs of the run, and how it batches them.
    """

    def __init__(
        self,
        config: TrainConfig,
        models: PolicyAndReference,
        free: float,
        pairs: Sequence[TokenizedPair],
        batching: TokenBatching,
    ):
        policy, own, facts = models.engine.policy, config.reference is not None, models.facts
        self._keyed = {batching.key(pair): pair for pair in pairs}
        self._token_bytes: int = policy.config.hidden_size * facts.dtype.itemsize
        settings = engine_settings(config, facts.dtype, models.computing.compiled)
        self._stores = EngineStores(
            policy,
            models.engine.reference if own else None,
            replace(settings, kernels=KernelChoice.of(models.computing.kernels)),
            facts.hashes["reference"],
            read_only=True,
            free=free,
        )
        self.location = self._stores.settings.cache
        self._misses = functools.cache(self._find_misses)

    def misses(self, below: int) -> CacheMisses:
        """What is not cached, with so many layers below the boundary."""
        states, logps = self._stores.trunk(below), self._stores.reference(below)
        return self._misses(
            frozenset(states.keys()) if below else None, states.room, frozenset(logps.keys())
        )

    def _find_misses(
        self, states: frozenset[str] | None, room: float, logps: frozenset[str]
    ) -> CacheMisses:
        """None for `states`: there is no trunk."""
        keyed, scores = self._keyed.items(), self._stores.settings.needs_reference
        no_states = [pair for key, pair in keyed if states is not None and key not in states]
        no_logps = [pair for key, pair in keyed if scores and key not in logps]
        wanted = self._token_bytes * sum(map(pair_length, no_states))
        written = min(room, wanted)
        without_room = (1 - written / wanted) * len(no_states) / len(keyed) if wanted else 0.0
        return CacheMisses(no_states, no_logps, written, without_room)
