"""Peak memory of a run, part by part, at any depth, from what it was at the depths tried. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from smoldpo.plan.forecast import Depth


@dataclass(frozen=True)
class Sizes:
    """Bytes that are the same at every depth."""

    libraries: float
    """The process before the models: the interpreter, libraries, the pairs."""
    loaded: float
    """The model in the precision in which it is loaded."""
    loaded_item: int
    """Bytes of a number in that precision."""
    shard: float
    """What saving converts at a time; 0 where the model was loaded as it is saved."""
    weights: float
    """Policy and, where it is a model of its own, reference, as they compute."""
    compute_item: int
    """Bytes of a number in the compute dtype."""
    master: int
    """Bytes of a number in the masters' precision."""
    masters_apart: bool
    """Whether masters lie beside the computing weights."""
    states: float = 0.0
    """Trunk states kept in memory."""
    released: float = 0.0
    """Of the weights, those of the reference that are let go once it has scored all pairs."""
    answers: bool = True
    answering_model: float = 0.0
    """The reference as it answers."""
    answering: float = 0.0
    """What drawing answers takes beside the models."""
    shares: bool = True
    """Whether reference and policy, as they answer, have all but what trained in common."""
    merges: bool = False
    """Whether adapters are added into the weights to be saved, which takes these in full precision."""

    def whole(self, item: int) -> float:
        """One model with so many bytes a number."""
        return self.loaded / self.loaded_item * item


@dataclass(frozen=True)
class Tried:
    """What was seen at one depth."""

    depth: Depth
    kept_row: float
    """Bytes that a backward pass keeps of each row of a stream."""
    other: float
    """What a step took at its height beyond the parts that are counted."""
    rest: float
    """What of that stayed after freed memory was given back."""
    passing: float = 0.0
    """What the pass through trunk and reference took at its height beyond the models."""


@dataclass(frozen=True)
class Need:
    """Bytes by part while training, and the peak of each phase."""

    parts: dict[str, float]
    phases: dict[str, float]

    @property
    def peak(self) -> float:
        return max(self.phases.values())


def kept_row(tried: Sequence[Tried], depth: Depth) -> float:
    """Bytes that a backward pass keeps of a row: in proportion to the layers it goes through."""
    return along(tried, _top, lambda t: t.kept_row, depth, proportional=True)


def need(
    sizes: Sizes, tried: Sequence[Tried], depth: Depth, rows: float, released: float = 0.0
) -> Need:
    """Memory at a depth.

    Args:
        rows: those of the longest stream of a step.
        released: bytes of the weights that are let go after the first pass.
    """
    trainable = depth.trainable * sizes.master
    other = max(0.0, along(tried, _top, lambda t: t.other, depth))
    rest = max(0.0, along(tried, _top, lambda t: t.rest, depth))
    passing = max(0.0, along(tried, _top, lambda t: t.passing, depth))
    parts = {
        "libraries": sizes.libraries,
        "weights": sizes.weights - depth.unconverted - released,
        "masters": trainable * sizes.masters_apart,
        "optimizer": depth.optimizer,
        "gradients": float(trainable),
        "trunk states": sizes.states,
        "backward": rows * kept_row(tried, depth),
        "other": other,
    }
    # The model as loaded, and what trained in full precision.
    together = sizes.loaded + depth.trainable * (sizes.master - sizes.loaded_item)
    first = ("libraries", "weights", "masters", "trunk states")
    staying = ("libraries", "masters", "optimizer", "trunk states")
    weights = sizes.weights - depth.unconverted - sizes.released - depth.resting
    stays = rest + weights + sum(parts[name] for name in staying)
    phases = {
        "loading": sizes.libraries + sizes.loaded + parts["masters"],
        "first pass": sum(parts[name] for name in first) + released + passing,
        "training": sum(parts.values()),
        "saving": stays + (sizes.whole(sizes.master) if sizes.merges else together) + sizes.shard,
    }
    if sizes.answers:
        phases["answers"] = stays + _answers(sizes, depth, together)
    return Need(parts, phases)


def _answers(sizes: Sizes, depth: Depth, together: float) -> float:
    """Both models while they answer, or while the policy is put together beside the reference."""
    if sizes.shares:  # where masters compute, those that trained are the masters themselves
        copied = depth.trainable * sizes.compute_item * (sizes.compute_item != sizes.master)
        return sizes.answering_model + copied + sizes.answering
    policy = sizes.whole(sizes.compute_item) - depth.unconverted
    return sizes.answering_model + max(together, policy + sizes.answering)


def along(
    tried: Sequence[Tried],
    x_of: Callable[[Depth], float],
    y_of: Callable[[Tried], float],
    depth: Depth,
    *,
    proportional: bool = False,
) -> float:
    """A quantity at `depth`, on straight lines through what was seen at the depths tried."""
    points = sorted({x_of(t.depth): y_of(t) for t in tried}.items())
    x = x_of(depth)
    if len(points) == 1:
        ((x0, y0),) = points
        return y0 * x / x0 if proportional and x0 else y0
    after = next((i for i, (at, _) in enumerate(points) if at >= x), len(points) - 1)
    (x0, y0), (x1, y1) = points[max(0, after - 1)], points[max(1, after)]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def _top(depth: Depth) -> float:
    return depth.top
