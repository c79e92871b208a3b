"""Datasets of the Hugging Face hub, with subset and splits, through the `datasets` library.

The library answers an unreachable network only after retrying for half a minute, so one short
request asks first; without a network what is cached still loads.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

from smoldpo.data.sources import BUILTIN, Row, Source, Split
from smoldpo.errors import DataError
from smoldpo.reach import cached_only, hub_is_unreachable


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
