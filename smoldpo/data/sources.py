"""Where rows come from: the built-in set, a file, a folder of files, or a hub id.

A source is a list of *splits*, each a name ("train", "test", ...) and the files or hub split that hold
it. Rows come out one by one as plain dictionaries with their file and row number (from 1), so that
every later complaint can say where to look.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smoldpo.errors import DataError, UsageError

BUILTIN = "builtin"
TRAIN_NAMES = ("train", "training")
EVAL_NAMES = ("test", "eval", "evaluation", "dev", "valid", "validation", "val")
HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")


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


@dataclass(frozen=True)
class Source:
    """A data source that exists. `train` is what to learn from, `test` what it holds out itself."""

    name: str
    splits: tuple[Split, ...]

    def split(self, name: str) -> Split:
        """The split of that name.

        Raises:
            UsageError: there is none; the message lists those there are.
        """
        for split in self.splits:
            if split.name == name:
                return split
        have = ", ".join(split.name for split in self.splits)
        raise UsageError(f"{self.name}: has no split {name!r}; it has: {have}")

    @property
    def train(self) -> Split:
        """The training split: by its name, or the only one."""
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


def open_source(name: str, subset: str | None = None) -> Source:
    """Find a source by name; nothing but file names is read yet.

    Raises:
        UsageError: there is no such file, folder or hub dataset, or it is of no readable kind.
        DataError: a hub that cannot be reached.
    """
    if name == BUILTIN:
        return _folder_source(name, Path(__file__).parent / BUILTIN)
    path = Path(name).expanduser()
    if path.is_dir():
        return _folder_source(name, path)
    if path.is_file():
        return Source(name, (Split(_split_name(path) or "train", _file_rows(path)),))
    if HUB_ID.match(name) and path.suffix not in READERS:
        return _hub_source(name, subset)
    raise UsageError(
        f"{name}: no such file or folder; give a {_suffixes()} file, a folder of them, "
        f"a hub id such as owner/name, or {BUILTIN}"
    )


def _folder_source(name: str, folder: Path) -> Source:
    files = sorted(path for path in folder.iterdir() if path.suffix in READERS)
    if not files:
        raise UsageError(f"{name}: the folder holds no {_suffixes()} file")
    parts: dict[str, list[Path]] = {}
    for path in files:
        parts.setdefault(_split_name(path) or path.stem, []).append(path)
    if not any(_split_name(path) for path in files):
        parts = {"train": files}
    return Source(name, tuple(Split(part, _file_rows(*paths)) for part, paths in parts.items()))


def _split_name(path: Path) -> str | None:
    """The known split name that a file's name contains as a word: "hh_dev-00001" is "dev"."""
    words = re.split(r"[^a-z]+", path.stem.lower())
    return next((word for word in words if word in TRAIN_NAMES + EVAL_NAMES), None)


def _file_rows(*paths: Path) -> Callable[[], Iterator[Row]]:
    def rows() -> Iterator[Row]:
        for path in paths:
            empty = True
            for row in _read_file(path):
                empty = False
                yield row
            if empty:
                raise DataError("the file holds no rows", file=str(path))

    return rows


def _read_file(path: Path) -> Iterator[Row]:
    reader = READERS.get(path.suffix)
    if reader is None:
        raise DataError(f"files of this kind cannot be read; give {_suffixes()}", file=str(path))
    try:
        for number, values in reader(path):
            if not isinstance(values, dict):
                kind = type(values).__name__
                raise DataError(
                    f"holds a {kind}, not an object with keys", file=str(path), row=number
                )
            yield Row(str(path), number, values)
    except UnicodeDecodeError as error:
        raise DataError(f"is not UTF-8 text ({error.reason} at byte {error.start})", str(path)) from None
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", file=str(path)) from None


def _read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, _parse_json(line, path, number)


def _parse_json(text: str, path: Path, row: int | None) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        at = str(error)
        if isinstance(error, json.JSONDecodeError):
            line = "" if row else f"line {error.lineno}, "
            at = f"{error.msg} at {line}column {error.colno}"
        hint = "mend or remove this row" if row else "mend it, or give JSONL (one object a line)"
        raise DataError(f"broken JSON: {at}; {hint}", str(path), row) from None


def _read_json(path: Path) -> Iterator[tuple[int, Any]]:
    text = path.read_text(encoding="utf-8-sig")
    if not text.strip():
        return
    rows = _parse_json(text, path, None)
    if isinstance(rows, dict):
        lists = [value for value in rows.values() if isinstance(value, list)]
        rows = lists[0] if len(lists) == 1 and len(rows) == 1 else [rows]
    if not isinstance(rows, list):
        raise DataError("the top of the file must be a list of rows", file=str(path))
    yield from enumerate(rows, 1)


def _read_csv(path: Path) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        try:
            for number, values in enumerate(reader, 1):
                if None in values or None in values.values():
                    raise DataError(
                        f"has not as many cells as the header ({len(reader.fieldnames or [])}); "
                        "quote cells that contain the delimiter",
                        file=str(path),
                        row=number,
                    )
                yield number, values
        except csv.Error as error:
            raise DataError(f"broken CSV near line {reader.line_num}: {error}", str(path)) from None


def _read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(batch_size=256):
            for values in batch.to_pylist():
                number += 1
                yield number, values
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"is not a readable Parquet file: {reason}", file=str(path)) from None


READERS: dict[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}


def _suffixes() -> str:
    *most, last = READERS
    return f"{', '.join(most)} or {last}"


def _hub_source(name: str, subset: str | None) -> Source:
    import datasets

    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(name, subset, streaming=False)
    except Exception as error:  # the hub's client raises many kinds, without a common base
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{name}: is no local file or folder, and cannot be loaded from the hub: {reason} "
            f"Check the name and the network, or give a local file or {BUILTIN}"
        ) from None

    def reader(split: str) -> Callable[[], Iterator[Row]]:
        def rows() -> Iterator[Row]:
            for number, values in enumerate(loaded[split], 1):
                yield Row(f"{name}:{split}", number, values)

        return rows

    splits = [Split(_hub_split_name(split, list(loaded)), reader(split)) for split in loaded]
    return Source(name, tuple(splits))


def _hub_split_name(split: str, others: list[str]) -> str:
    """UltraFeedback calls its preference splits train_prefs and test_prefs; read those as such."""
    bare = split.removesuffix("_prefs")
    return bare if split.endswith("_prefs") and bare not in others else split
