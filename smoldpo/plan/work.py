"""How much work some passes are: counts alone, without torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Work:
    """What goes through one layer, and through the head, in some passes over some pairs."""

    rows: float = 0.0
    """Of the products in a layer above the boundary, with what fills up."""
    trunk_rows: float = 0.0
    """The same below the boundary, where the blocks are larger."""
    scores: float = 0.0
    """Of attention: the squares of the slots' lengths, added up."""
    scored: float = 0.0
    """Rows of the head."""
    streams: int = 0
    pairs: int = 0

    def __add__(self, other: Work) -> Work:
        mine, theirs = ([getattr(w, f.name) for f in fields(self)] for w in (self, other))
        return Work(*(a + b for a, b in zip(mine, theirs, strict=True)))


NONE = Work()


def total(parts: Iterable[Work]) -> Work:
    """All of them together."""
    return sum(parts, Work())
