"""What a training step will need, measured before it is allocated; and how much at once fits.

Linux ends a process that takes more memory than there is, without a word. So before the first step one
pair goes forward, what autograd keeps of it is counted, and the budget is halved until a step fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch

from smoldpo import progress
from smoldpo.engine.base import Engine
from smoldpo.errors import SmoldpoError
from smoldpo.types import TokenizedPair

MARGIN = 1.5
"""What a backward pass holds at its height, temporaries included, is at most this times what it keeps."""

ASIDE = 100 << 20
"""Bytes left for what is no tensor: threads, the libraries' scratch space, holes between allocations."""


def kept_for_backward(work: Callable[[], Any], weights: Iterable[torch.Tensor]) -> int:
    """Bytes that autograd keeps of what `work` computes, each storage once, but for the weights."""
    known = {weight.untyped_storage().data_ptr() for weight in weights}
    kept: dict[int, torch.Tensor] = {}  # holding them, so that no address is used twice

    def pack(tensor: torch.Tensor) -> None:
        address = tensor.untyped_storage().data_ptr()
        if address not in known:
            kept[address] = tensor

    def unpack(_: None) -> torch.Tensor:
        raise RuntimeError("this graph is counted, and has no backward pass")

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        work()
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    kept.clear()  # the graph holds `pack`: both would stay for ever
    return total


class Halving(Protocol):
    """An engine, or what stands for one in a forecast; both methods as engine/base.py has them."""

    def backward_bytes(
        self, pairs: Sequence[TokenizedPair], pairs_per_step: int
    ) -> tuple[int, int]: ...

    def halve_budget(self, pairs: Sequence[TokenizedPair]) -> bool: ...


def halve_until_it_fits(
    engine: Halving, pairs: Sequence[TokenizedPair], pairs_per_step: int, room: float
) -> tuple[bool, int]:
    """Halve the engine's budget until a step over the longest of `pairs` fits into `room` bytes.

    Returns whether one pair at once does at least, and the bytes that it keeps.
    """
    while True:
        one, most = engine.backward_bytes(pairs, pairs_per_step)
        if one > room:
            return False, one
        if MARGIN * most <= room or not engine.halve_budget(pairs):
            return True, one


def fit_budget(
    engine: Engine,
    pairs: Sequence[TokenizedPair],
    pairs_per_step: int,
    state_bytes: int,
    free: int,
) -> int:
    """Halve the engine's budget until a step over the longest of `pairs` fits into `free` bytes.

    Returns the bytes that autograd keeps of the longest pair alone.

    Args:
        state_bytes: of gradients and the optimizer's state, which come with the first step.

    Raises:
        SmoldpoError: gradients and optimizer state, or one pair at once beside them, do not fit.
    """
    room, before = free - state_bytes - ASIDE, engine.budget
    what = f"gradients and the optimizer's state take {state_bytes:,} bytes"
    fits, one = halve_until_it_fits(engine, pairs, pairs_per_step, room)
    if not fits:
        raise SmoldpoError(
            f"not enough memory to train: {what}, the longest pair {one:,}, and {free:,} are free; "
            "try more --freeze-layers, a smaller --max-length, or a smaller model"
        )
    if engine.budget != before:
        progress.say(
            f"memory: {free:,} bytes are free, and {what}; so {engine.budget:,} instead of {before:,} "
            f"{engine.budget_unit} at once"
        )
    return one
