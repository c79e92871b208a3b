"""What a training step will need, measured before it is allocated; and how much at once fits.

Linux ends a process that takes more memory than there is, without a word. So before the first step one
pair goes forward, what autograd keeps of it is counted, and the budget is halved until a step fits.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeVar

import torch

from smoldpo.engine.base import Engine
from smoldpo.types import TokenizedPair
from smoldpo.utils import progress
from smoldpo.utils.errors import SmoldpoError
from smoldpo.utils.memory import trim_memory

MARGIN = 1.5
"""What a backward pass holds at its height, temporaries included, is at most this times what it keeps."""

RESERVE = 100 << 20
"""Bytes left for what is no tensor: threads, the libraries' scratch space, holes between allocations."""


def saved_for_backward(work: Callable[[], Any], weights: Iterable[torch.Tensor]) -> int:
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
    room, before = free - state_bytes - RESERVE, engine.budget
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


# Out of memory: which errors mean it, and doing the work again with less at once.


WORDS = (
    "not enough memory",
    "can't allocate memory",
    "could not create a memory",
    "out of memory",
)
"""What torch and oneDNN say on a CPU, and torch on MPS, in a plain RuntimeError."""
T = TypeVar("T")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine, or the GPU, had no memory left."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in WORDS)


def retry_with_smaller_budget(
    work: Callable[[], T], engine: Engine, pairs: Sequence[TokenizedPair], what: str
) -> T:
    """Do `work`, which goes through `pairs`; each time memory runs out, again with half the budget.

    `work` must begin anew each time it is called.

    Raises:
        SmoldpoError: memory runs out with one pair at once.
    """
    while True:
        try:
            return work()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else "no memory"
        # Outside the handler, whose traceback holds every tensor of the failed attempt.
        gc.collect()
        trim_memory()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        before = engine.budget
        if not engine.halve_budget(pairs):
            raise SmoldpoError(
                f"out of memory in {what}, with one pair at once ({reason}); try a smaller --max-length, "
                "more --freeze-layers, or a smaller model"
            )
        progress.say(
            f"out of memory in {what}: done again with the same pairs, {engine.budget:,} at once instead of "
            f"{before:,} {engine.budget_unit}"
        )
