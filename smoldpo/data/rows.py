"""Rows, splits and sources: what a reader of files or of the hub hands on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from smoldpo.utils.errors import UsageError, nearest

BUILTIN = "builtin"
TRAIN_NAMES = ("train", "training")
EVAL_NAMES = ("test", "eval", "evaluation", "dev", "valid", "validation", "val")


@dataclass(frozen=True)
class Row:
    """One row as it stands in the source."""

    file: str
    row: int
    values: dict[str, Any]


@dataclass(frozen=True)
class Split:
    """A named part of a source; `rows` reads it from the start each time it is called."""

    name: str
    rows: Callable[[], Iterator[Row]]
    published: str | None = None
    """What the hub calls it, where that is another name: train_prefs is read as train."""


@dataclass(frozen=True)
class Source:
    """A data source that exists. `train` is what to learn from, `test` what it holds out itself."""

    name: str
    splits: tuple[Split, ...]

    def split(self, name: str) -> Split:
        """The split of that name, or published under it.

        Raises:
            UsageError: there is none; the message lists those there are.
        """
        for split in self.splits:
            if name in (split.name, split.published):
                return split
        have = [split.name for split in self.splits]
        raise UsageError(
            f"{self.name}: has no split {name!r}{nearest(name, have)}; it has: {', '.join(have)}"
        )

    @property
    def train(self) -> Split:
        """The training split: by its name, or the only one.

        Raises:
            UsageError: there are several, and none is called train.
        """
        named = _first(self.splits, TRAIN_NAMES)
        if named is None and len(self.splits) > 1:
            have = ", ".join(split.name for split in self.splits)
            raise UsageError(
                f"{self.name}: no split is called train; choose one with --data-split: {have}"
            )
        return named or self.splits[0]

    @property
    def test(self) -> Split | None:
        """The split that the source itself holds out, or None."""
        return _first(self.splits, EVAL_NAMES)


def _first(splits: tuple[Split, ...], names: tuple[str, ...]) -> Split | None:
    return next((split for name in names for split in splits if split.name == name), None)
