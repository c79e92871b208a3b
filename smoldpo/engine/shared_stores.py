"""Stores in memory that outlive one engine, while several trainings share a process (a sweep's trials)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

Store = TypeVar("Store")
_kept: dict[tuple[str, str], Any] | None = None


@contextlib.contextmanager
def sharing() -> Iterator[None]:
    """Within the block, engines over the same contents get the same stores."""
    global _kept
    before, _kept = _kept, {}
    try:
        yield
    finally:
        _kept = before


def store(
    kind: str, key: Callable[[], str], make: Callable[[], Store], *, alone: bool = False
) -> Store:
    """The store of that kind and key; made, where there is none or nothing is shared.

    Args:
        key: fixes everything that the store's contents depend on (engine/identity.py); not asked for where
            nothing is shared, since it may take a hash over weights.
        alone: the others of its kind are let go before one is made, since each takes a share of the memory.
    """
    if _kept is None:
        return make()
    name = kind, key()
    if name not in _kept:
        for other in [each for each in _kept if alone and each[0] == kind]:
            del _kept[other]
        _kept[name] = make()
    return _kept[name]
