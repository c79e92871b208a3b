"""Where rows come from: the built-in set, a file, a folder of files, or a hub id.

A source is a list of *splits*, each a name ("train", "test", ...) and the files or hub split that
hold it. Rows come out one by one as plain dictionaries with their file and row number (from 1), so
that every later complaint can say where to look.

    a file                one split: the split name in the file's name, else "train"
    a folder of files     a split for each split name in the files' names
    folders in a folder   data/train-0.parquet, or train/0.parquet: read as the above
    datasets.save_to_disk its Arrow files, with the splits it was saved with
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from smoldpo.data.rowfiles import KINDS, kind_of, kinds, read_file
from smoldpo.errors import DataError, UsageError, nearest

BUILTIN = "builtin"
TRAIN_NAMES = ("train", "training")
EVAL_NAMES = ("test", "eval", "evaluation", "dev", "valid", "validation", "val")
HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
NOT_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""What `datasets` and the hub put beside the rows."""

T = TypeVar("T")


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


def open_source(name: str, subset: str | None = None) -> Source:
    """Find a source by name; nothing but file names is read yet.

    Raises:
        UsageError: there is no such file, folder or hub dataset, it is of no readable kind, or a
            subset was asked of something that has none.
        DataError: a hub that cannot be reached, a folder that cannot be listed.
    """
    path = Path(__file__).parent / BUILTIN if name == BUILTIN else Path(name)
    try:
        path = path.expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError):  # a name too long for the file system; ~nobody
        is_folder = is_file = False
    if (is_folder or is_file) and subset is not None:
        raise UsageError(f"{name}: a subset ({subset}) belongs to a hub id; local data has none")
    if is_folder:
        return _folder_source(name, path)
    if is_file:
        if not kind_of(path):
            raise UsageError(f"{name}: files of this kind cannot be read; give {kinds()}")
        return Source(name, (Split(_split_name(path) or "train", _file_rows(path)),))
    if HUB_ID.match(name) and not kind_of(path):
        from smoldpo.data.hub import hub_source

        return hub_source(name, subset)
    raise UsageError(
        f"{name}: no such file or folder; give a file ({', '.join(KINDS)}), a folder of them, "
        f"a hub id such as owner/name, or {BUILTIN}"
    )


def _folder_source(name: str, folder: Path) -> Source:
    try:
        saved = _saved_parts(folder)
        parts = saved or _named_parts(folder)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", file=name) from None
    if not parts:
        raise UsageError(f"{name}: the folder holds no {kinds()} file")
    return Source(name, tuple(Split(part, _file_rows(*paths)) for part, paths in parts.items()))


def _named_parts(folder: Path) -> dict[str, list[Path]]:
    """Files by split name; all of them are "train" where no name is that of a split."""
    files = _row_files(folder)
    if not files:
        inner = sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
        files = [path for each in inner for path in _row_files(each)]
    parts: dict[str, list[Path]] = {}
    for path in files:
        parts.setdefault(_split_name(path, folder) or _stem(path), []).append(path)
    if files and not any(_split_name(path, folder) for path in files):
        return {"train": files}
    return parts


def _row_files(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if kind_of(path) and path.name not in NOT_ROWS and path.name[0] != "." and path.is_file()
    )


def _saved_parts(folder: Path) -> dict[str, list[Path]]:
    """The Arrow files of datasets.save_to_disk: of one set, or of a dictionary of splits."""
    splits = _json_file(folder / "dataset_dict.json").get("splits")
    if isinstance(splits, list):
        names = [Path(str(split)).name for split in splits]
        return {name: _saved_files(folder / name) for name in names if (folder / name).is_dir()}
    files = _saved_files(folder) if (folder / "state.json").is_file() else []
    return {"train": files} if files else {}


def _saved_files(folder: Path) -> list[Path]:
    """In the order in which state.json lists them; never outside the folder."""
    listed = _json_file(folder / "state.json").get("_data_files")
    items = [item for item in listed if isinstance(item, dict)] if isinstance(listed, list) else []
    names = [Path(str(item.get("filename"))).name for item in items]
    return [folder / name for name in names] or sorted(folder.glob("*.arrow"))


def _json_file(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError):
        raise DataError("is broken; save the dataset again", file=str(path)) from None
    return value if isinstance(value, dict) else {}


def _stem(path: Path) -> str:
    return path.name[: -len(kind_of(path))] or path.name


def _split_name(path: Path, top: Path | None = None) -> str | None:
    """The known split name that a file's name contains as a word: "hh_dev-00001" is "dev".

    Failing that, the name of its folder, where that is below `top`.
    """
    named = [_stem(path)] + ([path.parent.name] if top is not None and path.parent != top else [])
    words = [word for name in named for word in re.split(r"[^a-z]+", name.lower())]
    return next((word for word in words if word in TRAIN_NAMES + EVAL_NAMES), None)


def _file_rows(*paths: Path) -> Callable[[], Iterator[Row]]:
    def rows() -> Iterator[Row]:
        for path in paths:
            empty = True
            for number, values in read_file(path):
                empty = False
                yield Row(str(path), number, values)
            if empty:
                raise DataError("the file holds no rows", file=str(path))

    return rows


def mix(sources: Sequence[Iterable[T]], weights: Sequence[float], seed: int) -> Iterator[T]:
    """Several sources interleaved by weight, each read at most once; for rows or for pairs.

    Item k of a source of weight w comes at the time (k + u) / w, u drawn once a source from `seed`
    between 0 and 1; the items come in the order of their times. So any beginning of the mix holds
    every source's share to within one item, and the same seed gives the same order. The mix ends
    when a source has nothing left for its turn: from there on the weights could not be kept.

    Raises:
        UsageError: not one positive, finite weight for each source.
    """
    if len(sources) != len(weights) or not sources:
        raise UsageError(f"{len(sources)} sources need as many weights, not {len(weights)}")
    wrong = next((weight for weight in weights if not (math.isfinite(weight) and weight > 0)), None)
    if wrong is not None:
        raise UsageError(f"a weight must be a positive number, not {wrong}")
    return _interleave([iter(source) for source in sources], weights, random.Random(seed))


def _interleave(
    sources: list[Iterator[T]], weights: Sequence[float], chance: random.Random
) -> Iterator[T]:
    starts = [chance.random() for _ in weights]
    taken = [0] * len(weights)
    while True:
        times = [(k + u) / w for k, u, w in zip(taken, starts, weights, strict=True)]
        turn = times.index(min(times))
        try:
            item = next(sources[turn])
        except StopIteration:
            return
        taken[turn] += 1
        yield item
