"""Pairs that are handed over in memory become a file: a run reads it, and can read it again on resume."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from smoldpo.data.convert import convert
from smoldpo.data.formats.numbers import NUMBERS
from smoldpo.errors import UsageError
from smoldpo.files import write_text
from smoldpo.types import PLAIN, PreferencePair

Row = Mapping[str, Any]
Source = str | Path | Iterable[str | Path] | Iterable[Row] | Iterable[PreferencePair]
"""Names of sources, or the pairs themselves: rows of any schema that smoldpo reads, or PreferencePairs."""


def names_of(data: Source) -> list[str] | None:
    """The names of sources, or None where `data` holds the pairs themselves."""
    if isinstance(data, str | Path):
        return [str(data)]
    items = data if isinstance(data, Sequence) else None
    if items and all(isinstance(item, str | Path) for item in items):
        return [str(item) for item in items]
    return None


def write_given(data: Iterable[Any], path: Path, setting: str = "data") -> list[str]:
    """Write rows or pairs as JSONL, and return which of weight, margin and beta its rows have.

    Raises:
        UsageError: nothing was given, things of several kinds, or a value that JSON cannot hold.
        DataError: a pair that would not be read back as it is.
    """
    items = list(data)
    if not items:
        raise UsageError(f"{setting}: the list is empty; give pairs, or the name of a source")
    path.parent.mkdir(parents=True, exist_ok=True)
    if all(isinstance(item, PreferencePair) for item in items):
        return _write_pairs(items, path)
    for number, item in enumerate(items, 1):
        if not isinstance(item, Mapping):
            raise UsageError(
                f"{setting}: item {number} is {type(item).__name__}; give a list of dictionaries, or of "
                "PreferencePairs, or of names, and of one kind alone"
            )
    write_text(path, "".join(_line(item, number, setting) for number, item in enumerate(items, 1)))
    return []


def _line(row: Row, number: int, setting: str) -> str:
    try:
        return json.dumps(dict(row), ensure_ascii=True, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise UsageError(f"{setting}: row {number} cannot be written as JSON: {error}") from None


def _write_pairs(pairs: list[PreferencePair], path: Path) -> list[str]:
    numbers = [name for name in NUMBERS if any(_own(pair, name) for pair in pairs)]
    convert(pairs, path)
    if not numbers:
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    written = []
    for number, (pair, line) in enumerate(zip(pairs, lines, strict=True), 1):
        own = {name: getattr(pair.numbers, name) for name in numbers}
        if None in own.values():
            raise UsageError(f"pair {number} has no beta of its own, and others have: give all one")
        written.append(json.dumps(json.loads(line) | own) + "\n")
    write_text(path, "".join(written))
    return numbers


def _own(pair: PreferencePair, name: str) -> bool:
    return getattr(pair.numbers, name) != getattr(PLAIN, name)
