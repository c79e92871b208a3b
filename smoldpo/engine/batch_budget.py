"""How much goes through a model at once: as much as fits into memory, halved where it does not.

Linux ends a process that takes more memory than there is, without a word. So before the first step
one pair goes forward, what autograd keeps of it is counted, and it is asked whether a step fits.
Where it does not, fewer streams are computed at once, which changes no result; where one alone does
not, the budget of a stream is halved. Where memory runs out all the same, the work is done again
with less, in the same order.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from smoldpo.engine.base import Engine
from smoldpo.engine.batching import Batching
from smoldpo.types import TokenizedPair
from smoldpo.utils import progress
from smoldpo.utils.errors import OutOfMemoryError, whole_reason
from smoldpo.utils.memory import ran_out_of_memory, trim_memory

MARGIN = 1.5
"""A backward pass takes at most this times what it keeps, temporaries included."""

RESERVE = 100 << 20
"""Bytes left for what is no tensor: threads, scratch space of libraries, fragmentation."""

T = TypeVar("T")


def fitting_batching(
    batching: Batching, one: int, pairs: Sequence[TokenizedPair], pairs_per_step: int, room: float
) -> Batching | None:
    """The batching, halved until a step over the longest of `pairs` fits into `room` bytes.

    None where not even one pair fits. One pair at once may take what MARGIN would keep free.

    Args:
        one: bytes that the longest pair keeps for its backward pass.
    """
    longest = batching.longest(pairs)
    while one <= room:
        smaller = batching.halved(pairs)
        fits = MARGIN * batching.backward_bytes(one, longest, pairs_per_step) <= room
        if fits or smaller is None:
            return batching
        batching = smaller
    return None


def batches_at_once(
    batching: Batching,
    one: int,
    pairs: Sequence[TokenizedPair],
    pairs_per_step: int,
    room: float,
    workers: int,
) -> int:
    """So many of a step's batches may be computed at once; the arguments of `fitting_batching`."""
    longest = batching.longest(pairs)
    while (
        workers > 1
        and MARGIN * batching.backward_bytes(one, longest, pairs_per_step, workers) > room
    ):
        workers //= 2
    return workers


def fit_budget(
    engine: Engine,
    pairs: Sequence[TokenizedPair],
    pairs_per_step: int,
    state_bytes: int,
    free: int,
) -> int:
    """Let a step over the longest of `pairs` fit into `free` bytes: fewer streams at once, then a
    smaller budget.

    Returns the bytes that autograd keeps of the longest pair alone. To be called after `prepare`.

    Args:
        state_bytes: of gradients and the optimizer's state, which come with the first step.

    Raises:
        OutOfMemoryError: gradients, optimizer state and one pair at once do not fit.
    """
    room, before = free - state_bytes - RESERVE, engine.budget
    what = f"gradients and the optimizer's state take {state_bytes:,} bytes"
    one, _ = engine.backward_bytes(pairs, pairs_per_step)
    workers = engine.workers.count
    told = (engine.batching, one, pairs, pairs_per_step, room)
    engine.workers.lower(batches_at_once(*told, workers))
    if engine.workers.count < workers:
        progress.say(
            f"memory: {free:,} bytes are free, and {what}; so streams at once: "
            f"{engine.workers.count} instead of {workers}, which changes no result"
        )
    batching = fitting_batching(*told)
    if batching is None:
        raise OutOfMemoryError(
            f"not enough memory to train: {what}, the longest pair {one:,}, and {free:,} are free; "
            "try more --freeze-layers, a smaller --max-length, or a smaller model"
        )
    if batching.budget != before:
        engine.drop_gradients()
        engine.batching = batching
        progress.say(
            f"memory: {free:,} bytes are free, and {what}; so {engine.budget:,} instead of "
            f"{before:,} {batching.unit} at once"
        )
    return one


def with_memory_errors(work: Callable[[], T]) -> T:
    """Do `work`; the libraries' errors of allocation become an OutOfMemoryError.

    It has no traceback of the failed attempt, which would hold all its tensors.

    Raises:
        OutOfMemoryError: memory ran out.
    """
    try:
        return work()
    except (MemoryError, RuntimeError) as error:
        if not ran_out_of_memory(error):
            raise
        reason = whole_reason(error)
    raise OutOfMemoryError(reason)


def retry_with_smaller_budget(
    work: Callable[[], T], engine: Engine, pairs: Sequence[TokenizedPair], what: str
) -> T:
    """Do `work`, which goes through `pairs`; each time memory runs out, again with half the budget.

    `work` must begin anew each time it is called.

    Raises:
        OutOfMemoryError: memory runs out with one pair at once.
    """
    while True:
        try:
            return with_memory_errors(work)
        except OutOfMemoryError as error:
            reason = str(error)
        gc.collect()
        trim_memory()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        before = engine.workers.count
        if engine.compute_fewer_at_once(pairs):
            progress.say(
                f"out of memory in {what}: done again with the same pairs, "
                f"streams at once: {engine.workers.count} instead of {before}"
            )
            continue
        before = engine.budget
        if not engine.halve_budget(pairs):
            raise OutOfMemoryError(
                f"out of memory in {what}, with one pair at once ({reason}); try a smaller "
                "--max-length, more --freeze-layers, or a smaller model"
            )
        progress.say(
            f"out of memory in {what}: done again with the same pairs, {engine.budget:,} at once "
            f"instead of {before:,} {engine.batching.unit}"
        )
