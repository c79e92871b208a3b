"""Stores in memory that outlive one engine, while several trainings share a process (a sweep's trials)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

Store = TypeVar("Store")
_kept: dict[str, Any] | None = None


@contextlib.contextmanager
def sharing() -> Iterator[None]:
    """Within the block, engines over the same contents get the same stores."""
    global _kept
    before, _kept = _kept, {}
    try:
        yield
    finally:
        _kept = before


def store(key: str, make: Callable[[], Store]) -> Store:
    """The store of that key; made, where there is none or nothing is shared.

    Args:
        key: fixes everything that the store's contents depend on (engine/identity.py).
    """
    if _kept is None:
        return make()
    if key not in _kept:
        _kept[key] = make()
    return _kept[key]
