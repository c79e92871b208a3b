"""Peak memory of a run, part by part, at any depth, from what was observed at the depths tried."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from smoldpo.plan.depths import FreezeDepth


@dataclass(frozen=True)
class ModelSizes:
    """Bytes that are the same at every depth."""

    libraries: float  # The process before the models: the interpreter, libraries, the pairs
    loaded: float  # The model in the precision in which it is loaded
    loaded_item: int  # Bytes of a number in that precision
    shard: float  # Converted at a time while saving; 0 where the model is saved as it was loaded
    weights: float  # Policy and, where it is a model of its own, reference, as they compute
    compute_item: int  # Bytes of a number in the compute dtype
    master: int  # Bytes of a number of the master weights
    separate_masters: bool  # Whether master weights are kept beside the computing ones
    states: float = 0.0  # Trunk states kept in memory
    released: float = 0.0
    """Of `weights`, those of the reference that are released once it has scored all pairs."""
    answers: bool = True
    answering_model: float = 0.0  # The reference while it answers
    answering: float = 0.0  # Taken by generation beside the models
    shares: bool = True
    """Whether reference and policy, while they answer, share all but what trained."""
    merges: bool = False
    """Whether adapters are merged into the saved weights, which takes these in full precision."""


@dataclass(frozen=True)
class ObservedMemory:
    """Bytes observed in a dry run at one depth."""

    depth: FreezeDepth
    row: float  # Kept of each row of a batch for the backward pass
    other: float  # Taken by a step at its peak beyond the parts that are counted
    rest: float  # Of `other`, what stayed after freed memory was returned
    first_pass: float = 0.0  # Taken by the first pass at its peak beyond the models


@dataclass(frozen=True)
class MemoryForecast:
    """Bytes by part during training, and the peak of each phase."""

    parts: dict[str, float]
    phases: dict[str, float]

    @property
    def peak(self) -> float:
        return max(self.phases.values())


def forecast_memory(
    sizes: ModelSizes,
    observed: Sequence[ObservedMemory],
    depth: FreezeDepth,
    rows: float,
    released: float = 0.0,
) -> MemoryForecast:
    """Memory of a run at a depth.

    Args:
        rows: rows of the longest batch of a step.
        released: bytes of the weights that are released after the first pass.
    """
    other, rest, first_pass = (
        max(0.0, interpolate(observed, depth, value))
        for value in (lambda o: o.other, lambda o: o.rest, lambda o: o.first_pass)
    )
    trainable = depth.trainable * sizes.master
    masters = trainable * sizes.separate_masters
    weights = sizes.weights - depth.unconverted_bytes
    parts = {
        "libraries": sizes.libraries,
        "weights": weights - released,
        "masters": masters,
        "optimizer": float(depth.optimizer_bytes),
        "gradients": float(trainable),
        "trunk states": sizes.states,
        "backward": rows * row_bytes(observed, depth),
        "other": other,
    }
    # The model as loaded, with what trained in full precision.
    trained = sizes.loaded + depth.trainable * (sizes.master - sizes.loaded_item)
    saved = sizes.loaded / sizes.loaded_item * sizes.master if sizes.merges else trained
    base = sizes.libraries + masters + sizes.states
    idle = base + depth.optimizer_bytes + rest + weights - sizes.released - depth.idle_bytes
    phases = {
        "loading": sizes.libraries + sizes.loaded + masters,
        "first pass": base + weights + first_pass,
        "training": sum(parts.values()),
        "saving": idle + saved + sizes.shard,
    }
    if sizes.answers and sizes.shares:  # where masters compute, the policy's own part are these
        own = depth.trainable * sizes.compute_item * (sizes.compute_item != sizes.master)
        phases["answers"] = idle + sizes.answering_model + own + sizes.answering
    elif sizes.answers:  # the policy is assembled beside the reference, and then cast
        policy = sizes.loaded / sizes.loaded_item * sizes.compute_item - depth.unconverted_bytes
        more = max(trained, policy + sizes.answering)
        phases["answers"] = idle + sizes.answering_model + more
    return MemoryForecast(parts, phases)


def row_bytes(observed: Sequence[ObservedMemory], depth: FreezeDepth) -> float:
    """Bytes kept of a row for the backward pass, in proportion to the layers above the boundary."""
    return interpolate(observed, depth, lambda o: o.row, proportional=True)


def interpolate(
    observed: Sequence[ObservedMemory],
    depth: FreezeDepth,
    value: Callable[[ObservedMemory], float],
    *,
    proportional: bool = False,
) -> float:
    """A value at `depth`, on straight lines through those observed, by layers above the boundary.

    Args:
        proportional: whether one observation is scaled to the depth, and not taken as it is.
    """
    points = sorted({o.depth.top: value(o) for o in observed}.items())
    x = depth.top
    if len(points) == 1:
        ((x0, y0),) = points
        return y0 * x / x0 if proportional and x0 else y0
    after = next((i for i, (at, _) in enumerate(points) if at >= x), len(points) - 1)
    (x0, y0), (x1, y1) = points[max(0, after - 1)], points[max(1, after)]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
