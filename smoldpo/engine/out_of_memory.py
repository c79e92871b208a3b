"""Out of memory: which errors mean it, and doing the work again with less at once."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from smoldpo import progress
from smoldpo.engine.base import Engine
from smoldpo.engine.memory import give_back_freed_memory
from smoldpo.errors import SmoldpoError
from smoldpo.types import TokenizedPair

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


def with_less_at_once(
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
        give_back_freed_memory()
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
