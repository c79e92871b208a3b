"""Peak memory of a run, part by part, at any depth, from what it was at the depths tried."""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import psutil
import torch

from smoldpo.engine.batch_budget import RESERVE, halve_until_it_fits
from smoldpo.plan.workload import Depth, Packing
from smoldpo.types import TokenizedPair


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


# How much memory this process has resident: now, and at the height of a block.


SECONDS = 0.005
"""Between looks. What lasts shorter is missed."""


def resident() -> int:
    """Bytes resident now."""
    return psutil.Process().memory_info().rss


def bytes_of(model: torch.nn.Module) -> int:
    """Bytes of all weights, each in the precision that it has."""
    return sum(weight.nbytes for weight in model.parameters())


def read_in(*models: torch.nn.Module | None) -> None:
    """Read all weights once, so that no step takes the pages of a mapped file, which come when first read."""
    for model in models:
        for weight in model.parameters() if model is not None else ():
            weight.detach().flatten()[:: mmap.PAGESIZE // weight.element_size()].sum()


class Height:
    """The most bytes resident that were seen."""

    def __init__(self) -> None:
        self.bytes = resident()

    def look(self) -> None:
        self.bytes = max(self.bytes, resident())


@contextlib.contextmanager
def height() -> Iterator[Height]:
    """Looks at the memory until the block ends."""
    seen, ended = Height(), threading.Event()

    def watch() -> None:
        while not ended.wait(SECONDS):
            seen.look()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield seen
    finally:
        ended.set()
        watcher.join()
        seen.look()


# How much goes through at once at a depth, by the rule of the run itself (engine/memory_budget.py).


class Foreseen:
    """Stands for an engine that is to be built at some depth.

    Args:
        packing: as it would lay out pairs if memory were no matter; halved below.
        longest: of the pairs, the one that needs the most memory.
        row_bytes: kept of a row for the backward pass.
    """

    def __init__(self, packing: Packing, longest: TokenizedPair, row_bytes: float):
        self.packing, self._longest = packing, longest
        self._one = round(packing.held([longest]) * row_bytes)

    def backward_bytes(self, pairs: Sequence[TokenizedPair], per_step: int) -> tuple[int, int]:
        return self._one, self.packing.at_once_bytes(self._one, self._longest, per_step)

    def halve_budget(self, pairs: Sequence[TokenizedPair]) -> bool:
        fewer = self.packing.halved(self._longest, len(pairs))
        self.packing = fewer or self.packing
        return fewer is not None


def fitting(
    packing: Packing,
    pairs: Sequence[TokenizedPair],
    pairs_per_step: int,
    row_bytes: float,
    taken: float,
    free: float,
) -> Packing | None:
    """The packing with which a step fits; None: not even one pair at once does.

    Args:
        packing: that of a run for which memory is no matter.
        row_bytes: kept of a row for the backward pass.
        taken: bytes of gradients, the optimizer's state and its temporaries.
        free: bytes free when training begins.
    """
    run = Foreseen(packing, packing.longest(pairs), row_bytes)
    fits, _ = halve_until_it_fits(run, pairs, pairs_per_step, free - taken - RESERVE)
    return run.packing if fits else None
