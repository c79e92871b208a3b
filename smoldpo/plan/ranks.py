"""What a run costs on several ranks, beyond what one process of this machine tells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from smoldpo.config.schema import TrainConfig
from smoldpo.plan.cost_model import Phase, Times
from smoldpo.plan.depths import FreezeDepth
from smoldpo.plan.memory import MemoryForecast
from smoldpo.utils.errors import UsageError

SHARED_OUT = "weights", "masters", "optimizer", "gradients"
"""Parts of the memory of which each rank keeps a share with fsdp."""


@dataclass(frozen=True)
class PlannedRanks:
    """So many ranks, each of them like this machine's process, and the network between them.

    Attributes:
        bandwidth: bytes that a rank sends in a second, while it receives as many.
    """

    count: int = 1
    bandwidth: float = 1.25e9

    def streams_at_once(self, config: TrainConfig, workers: int) -> int:
        """Of one step, on all ranks together; in an ordered sum each rank computes one."""
        return self.count * (1 if self.count > 1 and config.ordered_sum else workers)

    def bytes_sent(
        self,
        config: TrainConfig,
        trainable: int,
        parameters: int,
        item: int,
        compute_item: int,
        rounds: float,
    ) -> float:
        """Bytes that a rank sends in one optimizer step: docs/scale.md derives them.

        Args:
            trainable, parameters: numbers that train, and all.
            item, compute_item: bytes of a gradient's number, and of a weight's that computes.
            rounds: streams of the step, over the ranks.
        """
        share = (self.count - 1) / self.count
        if config.fsdp:  # weights before each pass forward (also the reference's) and back
            return share * rounds * (3 * compute_item * parameters + item * trainable)
        passes = rounds if config.ordered_sum else 1.0
        return share * item * trainable * (passes + 1)

    def with_sums(self, times: Times, seconds: Sequence[float]) -> Times:
        """The phases of a run, each epoch longer by what its ranks send."""
        left = iter(seconds)
        phases = [
            Phase(phase.name, phase.seconds + next(left))
            if phase.name.startswith("epoch ")
            else phase
            for phase in times.phases
        ]
        return replace(times, phases=phases)

    def memory(
        self, config: TrainConfig, depth: FreezeDepth, whole: MemoryForecast
    ) -> MemoryForecast:
        """Of one rank: as one process, but for what fsdp shares out; a layer at a time is whole."""
        if self.count == 1 or not config.fsdp:
            return whole
        saved = sum(whole.parts[name] for name in SHARED_OUT) * (1 - 1 / self.count)
        layer = whole.parts["weights"] / max(1, depth.layers)
        parts = {
            name: size / self.count if name in SHARED_OUT else size
            for name, size in whole.parts.items()
        }
        parts["other"] += layer
        training = whole.phases["training"] - saved + layer
        return MemoryForecast(parts, whole.phases | {"training": training})


def planned_ranks(count: int | None, gigabits: float | None) -> PlannedRanks:
    """From `--nproc` and `--network-gbit`.

    Raises:
        UsageError: a network without ranks, or none at all.
    """
    if gigabits is not None and (count is None or not 0 < gigabits < float("inf")):
        raise UsageError("--network-gbit is the network's speed between --nproc ranks, such as 10")
    speed = PlannedRanks.bandwidth if gigabits is None else gigabits / 8 * 1e9
    return PlannedRanks(count or 1, speed)
