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

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from smoldpo.data.files import KINDS, kind_of, kinds, read_file
from smoldpo.data.rows import BUILTIN, EVAL_NAMES, TRAIN_NAMES, Row, Source, Split
from smoldpo.utils.errors import DataError, UsageError
from smoldpo.utils.hub import cached_only, hub_is_unreachable

HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
NOT_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""What `datasets` and the hub put beside the rows."""


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
        pass

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


# Datasets of the Hugging Face hub, with subset and splits, through the `datasets` library.
#
# The library answers an unreachable network only after retrying for half a minute, so one short
# request asks first; without a network what is cached still loads.


def hub_source(name: str, subset: str | None) -> Source:
    """A hub dataset and its splits.

    Raises:
        DataError: the hub cannot be reached and nothing is cached, or it has no such dataset,
            subset, or access for this user.
    """
    import datasets

    datasets.disable_progress_bars()
    unreachable = _is_unreachable(name)
    try:
        with _cached_only(datasets) if unreachable else contextlib.nullcontext():
            loaded = datasets.load_dataset(name, subset)
    except Exception as error:  # the hub's client raises many kinds, without a common base
        why = "the hub does not answer, and the cache has none" if unreachable else _reason(error)
        raise DataError(
            f"{name}: is no local file or folder, and cannot be loaded from the hub: {why}. Check "
            f"the name, the subset and the network, or give a local file or {BUILTIN}"
        ) from None
    names = list(loaded)
    splits = tuple(
        Split(_bare(split, names), _rows(name, split, loaded[split]), published=split)
        for split in names
    )
    return Source(name, splits)


def _is_unreachable(name: str) -> bool:
    return hub_is_unreachable("dataset", name)


@contextlib.contextmanager
def _cached_only(datasets: Any) -> Iterator[None]:
    """`datasets` too keeps the setting for itself."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        with cached_only():
            yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _reason(error: Exception) -> str:
    """The first line of an error, without tokens: neither the user's own nor one in a URL."""
    line = (str(error).splitlines() or [""])[0].strip().rstrip(".") or type(error).__name__
    token = os.environ.get("HF_TOKEN")
    line = line.replace(token, "***") if token else line
    return re.sub(r"//[^/@\s]+@", "//***@", re.sub(r"hf_\w{8,}", "***", line))


def _rows(name: str, split: str, dataset: Any) -> Callable[[], Iterator[Row]]:
    """Rows straight from the cached Arrow tables: nothing is decoded that no reader looks at."""

    def rows() -> Iterator[Row]:
        number = 0
        for table in dataset.with_format("arrow").iter(batch_size=64):
            for values in table.to_pylist():
                number += 1
                yield Row(f"{name}:{split}", number, values)

    return rows


def _bare(split: str, others: list[str]) -> str:
    """UltraFeedback calls its preference splits train_prefs and test_prefs; read those as such."""
    bare = split.removesuffix("_prefs")
    return bare if split.endswith("_prefs") and bare not in others else split
