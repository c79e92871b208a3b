"""Where rows come from: the built-in set, a file, a folder of files, or a hub id.

A source is a list of splits, each a name ("train", "test", ...) and the files or hub split that
hold it. Rows are dictionaries with their file and row number (from 1), for error messages.

    a file                one split: the split name in the file's name, else "train"
    a folder of files     a split for each split name in the files' names
    folders in a folder   data/train-0.parquet, or train/0.parquet: read as the above
    datasets.save_to_disk its Arrow files, with the splits it was saved with
    a hub id              its splits, through the `datasets` library
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from smoldpo.data.arrow_rows import rows_of
from smoldpo.data.files import BATCH, KINDS, kind_of, kinds, read_file
from smoldpo.utils.errors import DataError, UsageError, nearest, whole_reason
from smoldpo.utils.hub import cached_only, hub_is_unreachable

T = TypeVar("T")

BUILTIN = "builtin"
BUILTIN_NOTES = ("rejected_by", "flaw")
"""Columns of the built-in pairs that say how each was made; see their README."""
TRAIN_NAMES = ("train", "training")
EVAL_NAMES = ("test", "eval", "evaluation", "dev", "valid", "validation", "val")
HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
NOT_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files that `datasets` and the hub put beside the rows."""


LARGEST_CARD = 16 * 2**20
"""Bytes of a JSON object beside the rows; a larger one is read as rows."""


@dataclass(frozen=True)
class Row:
    """One row as it stands in the source."""

    file: str
    row: int
    values: dict[str, Any]


@dataclass(frozen=True)
class Split:
    """A named part of a source: its files in their order, each read from the start when called."""

    name: str
    files: tuple[Callable[[], Iterator[Row]], ...]
    published: str | None = None
    """The hub's name, where it differs: train_prefs is read as train."""
    left_out: tuple[str, ...] = ()
    """Files beside these that hold no list of rows."""

    def rows(self) -> Iterator[Row]:
        """Every row, file after file."""
        return chain.from_iterable(rows() for rows in self.files)


@dataclass(frozen=True)
class Source:
    """A data source that exists, and its splits."""

    name: str
    splits: tuple[Split, ...]

    def split(self, name: str | None) -> Split:
        """The split of that name, or published under it; by default the training split.

        Raises:
            UsageError: there is none; the message lists those there are.
        """
        if not name:
            return self.train
        have = [split.name for split in self.splits]
        for split in self.splits:
            if name in (split.name, split.published):
                return split
        raise UsageError(
            f"{self.name}: has no split {name!r}{nearest(name, have)}; it has: {', '.join(have)}"
        )

    @property
    def train(self) -> Split:
        """The training split: by its name, or the only one.

        Raises:
            UsageError: there are several, and none is called train.
        """
        named = self._first(TRAIN_NAMES)
        if named is None and len(self.splits) > 1:
            have = ", ".join(split.name for split in self.splits)
            raise UsageError(
                f"{self.name}: no split is called train; choose one with --data-split: {have}"
            )
        return named or self.splits[0]

    @property
    def test(self) -> Split | None:
        """The split that the source itself holds out, or None."""
        return self._first(EVAL_NAMES)

    @property
    def evaluation(self) -> Split:
        """The split to evaluate on: the one held out, else the training split."""
        return self.test or self.train

    def label(self, split: Split) -> str:
        """The source's name, with the split's where there are several."""
        return f"{self.name} ({split.name})" if len(self.splits) > 1 else self.name

    def _first(self, names: tuple[str, ...]) -> Split | None:
        return next((s for name in names for s in self.splits if s.name == name), None)


def open_source(name: str, subset: str | None = None) -> Source:
    """Find a source by name; nothing but file names is read yet.

    Raises:
        UsageError: there is no such file, folder or hub dataset, it is of no readable kind, or a
            subset was asked of something that has none.
        DataError: a hub that cannot be reached, a folder that cannot be listed.
    """
    _require_utf8(Path(name))
    path = Path(__file__).parent / BUILTIN if name == BUILTIN else Path(name)
    try:
        path = path.expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError):  # a name too long for the file system; ~nobody
        is_folder = is_file = False
    if (is_folder or is_file) and subset is not None:
        raise UsageError(f"{name}: a subset ({subset}) belongs to a hub id; local data has none")
    if is_folder:
        source = _folder_source(name, path)
        return _without(source, BUILTIN_NOTES) if name == BUILTIN else source
    if is_file:
        if not kind_of(path):
            raise UsageError(f"{name}: files of this kind cannot be read; give {kinds()}")
        return Source(name, (Split(_split_name(path) or "train", (_file_rows(path),)),))
    if HUB_ID.match(name) and not kind_of(path):
        return hub_source(name, subset)
    raise UsageError(
        f"{name}: no such file or folder; give a file ({', '.join(KINDS)}), a folder of them, "
        f"a hub id such as owner/name, or {BUILTIN}"
    )


def _folder_source(name: str, folder: Path) -> Source:
    left_out: list[Path] = []
    try:
        splits = _saved_splits(folder) or _named_splits(folder, left_out)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", file=name) from None
    if not splits:
        raise UsageError(f"{name}: the folder holds no {kinds()} file")
    for path in (path for paths in splits.values() for path in paths):
        _require_utf8(path)
    strays = tuple(map(str, left_out))
    return Source(
        name,
        tuple(
            Split(split, tuple(map(_file_rows, paths)), left_out=strays)
            for split, paths in splits.items()
        ),
    )


def _without(source: Source, columns: Sequence[str]) -> Source:
    """The source as if its rows had not these columns."""

    def narrowed(rows: Callable[[], Iterator[Row]]) -> Callable[[], Iterator[Row]]:
        def read() -> Iterator[Row]:
            for row in rows():
                kept = {name: value for name, value in row.values.items() if name not in columns}
                yield replace(row, values=kept)

        return read

    splits = (replace(split, files=tuple(map(narrowed, split.files))) for split in source.splits)
    return replace(source, splits=tuple(splits))


def _require_utf8(path: Path) -> None:
    """Refuse a name that no run file could hold.

    Raises:
        UsageError: the name, with its bytes escaped.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        shown = os.fsencode(path).decode("utf-8", "backslashreplace")
        raise UsageError(f"{shown}: the name holds bytes that are not UTF-8; rename it") from None


def _named_splits(folder: Path, left_out: list[Path]) -> dict[str, list[Path]]:
    """Files by split name; all of them are "train" where no name is that of a split.

    Files in the folder's folders count where it holds none itself, or nothing but JSON objects
    without a list of rows (a card, settings): those go to `left_out`.
    """
    files = _row_files(folder)
    if all(map(_is_lone_object, files)):
        inner = sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
        if inside := [path for each in inner for path in _row_files(each)]:
            left_out += files
            files = inside
    names = [_split_name(path, folder) for path in files]
    if files and not any(names):
        return {"train": files}
    splits: dict[str, list[Path]] = {}
    for path, name in zip(files, names, strict=True):
        splits.setdefault(name or _stem(path), []).append(path)
    return splits


def _row_files(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if kind_of(path) and path.name not in NOT_ROWS and path.name[0] != "." and path.is_file()
    )


def _is_lone_object(path: Path) -> bool:
    """Whether a file is one JSON object that holds no list of rows."""
    if kind_of(path) != ".json" or path.stat().st_size > LARGEST_CARD:
        return False
    try:
        value = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError):  # JSONL, or broken: whoever reads it tells
        return False
    held = [*value.values()] if isinstance(value, dict) else []
    return isinstance(value, dict) and not (len(held) == 1 and isinstance(held[0], list))


def _saved_splits(folder: Path) -> dict[str, list[Path]]:
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


def _file_rows(path: Path) -> Callable[[], Iterator[Row]]:
    def rows() -> Iterator[Row]:
        empty = True
        for number, values in read_file(path):
            empty = False
            yield Row(str(path), number, values)
        if empty:
            raise DataError("the file holds no rows", file=str(path))

    return rows


def hub_source(name: str, subset: str | None) -> Source:
    """A hub dataset and its splits.

    `datasets` answers an unreachable network only after retrying for half a minute, so one short
    request asks first. Without a network, cached data still loads.

    Raises:
        DataError: the hub cannot be reached and nothing is cached, or it has no such dataset,
            subset, or access for this user.
    """
    import datasets

    datasets.disable_progress_bars()
    unreachable = hub_is_unreachable("dataset", name)
    try:
        with _cached_only(datasets) if unreachable else contextlib.nullcontext():
            loaded = datasets.load_dataset(name, subset)
    except Exception as error:  # the hub's client raises many kinds, without a common base
        why = "the hub does not answer, and the cache has none" if unreachable else _reason(error)
        raise DataError(
            f"{name}: is no local file or folder, and cannot be loaded from the hub: {why}. Check "
            f"the name, the subset and the network, or give a local file or {BUILTIN}"
        ) from None
    splits = []
    for split in loaded:  # UltraFeedback calls its preference splits train_prefs and test_prefs
        plain = split.removesuffix("_prefs")
        read_as = split if plain in loaded else plain
        rows = _hub_rows(name, split, loaded[split])
        splits.append(Split(read_as, (rows,), published=split))
    return Source(name, tuple(splits))


@contextlib.contextmanager
def _cached_only(datasets: Any) -> Iterator[None]:
    """`datasets` keeps a copy of the setting that `cached_only` changes."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        with cached_only():
            yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _reason(error: Exception) -> str:
    """What an error says, without tokens: neither the user's own nor one in a URL."""
    line = whole_reason(error, causes=True)
    token = os.environ.get("HF_TOKEN")
    line = line.replace(token, "***") if token else line
    return re.sub(r"//[^/@\s]+@", "//***@", re.sub(r"hf_\w{8,}", "***", line))


def _hub_rows(name: str, split: str, dataset: Any) -> Callable[[], Iterator[Row]]:
    """Rows straight from the cached Arrow tables: nothing is decoded that no reader looks at."""

    def rows() -> Iterator[Row]:
        tables = dataset.with_format("arrow").iter(batch_size=BATCH)
        every = (values for table in tables for values in rows_of(table))
        for number, values in enumerate(every, 1):
            yield Row(f"{name}:{split}", number, values)

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

    def interleaved() -> Iterator[T]:
        rng = random.Random(seed)
        offsets = [rng.random() for _ in weights]
        taken = [0] * len(weights)
        iterators = [iter(source) for source in sources]
        while True:
            times = [(k + u) / w for k, u, w in zip(taken, offsets, weights, strict=True)]
            turn = times.index(min(times))
            try:
                item = next(iterators[turn])
            except StopIteration:
                return
            taken[turn] += 1
            yield item

    return interleaved()
