"""Manners inside somebody else's program: progress silenced if asked, random generators put back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from smoldpo import progress, rng


@contextlib.contextmanager
def as_guest(verbose: bool) -> Iterator[None]:
    """A block after which the program's random generators are as they were before it.

    Args:
        verbose: whether messages and progress go to standard error meanwhile.
    """
    tensors, numbers = rng.capture()
    try:
        with contextlib.nullcontext() if verbose else progress.silenced():
            yield
    finally:
        rng.restore(tensors, numbers)
