"""The cache folder: trunk states and reference log-probabilities between runs.

    <cache>/trunk/<key>/...        smoldpo/engine/cache/trunk_states.py
    <cache>/reference/<key>/...    smoldpo/engine/cache/reference_logps.py
    <cache>/machine.json, ...      smoldpo/engine/autotune.py

Each <key> is one entry. When all entries together exceed the limit, the ones used longest ago go.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from smoldpo.utils.files import cache_folder, existing_parent

KINDS = ("trunk", "reference")


@dataclass(frozen=True)
class Entry:
    """One cached file: path, size in bytes, last use (seconds since 1970), what it holds."""

    kind: str
    folder: Path
    bytes: int
    used: float
    about: dict[str, Any]

    def as_row(self) -> dict[str, Any]:
        """For --json."""
        row = {"kind": self.kind, "key": self.folder.name, "bytes": self.bytes, "used": self.used}
        return row | {"about": self.about}


def entry_folder(kind: str, key: str) -> Path:
    """Where an entry lies."""
    assert kind in KINDS
    return cache_folder() / kind / key


def unusable(read_only: bool = False) -> str | None:
    """Why nothing can be stored on disk, or None; `read_only` makes no folder or file."""
    folder = cache_folder()
    if read_only:
        folder = existing_parent(folder)
        return None if os.access(folder, os.W_OK) else f"{folder} cannot be written"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"{folder} cannot be written ({error.strerror})"


def entries() -> list[Entry]:
    """Everything that is kept, most recently used first."""
    found = []
    for kind in KINDS:
        for folder in (cache_folder() / kind).glob("*"):
            if folder.is_dir() and not folder.is_symlink():
                with contextlib.suppress(FileNotFoundError):  # another process has removed it
                    used = folder.stat().st_mtime
                    found.append(Entry(kind, folder, size_of(folder), used, _about(folder)))
    return sorted(found, key=lambda entry: -entry.used)


def size_of(folder: Path) -> int:
    """Bytes of the files in an entry's folder; 0 where there is none."""
    size = 0
    for path in folder.glob("*"):
        with contextlib.suppress(FileNotFoundError):
            size += path.stat().st_size
    return size


def _about(folder: Path) -> dict[str, Any]:
    try:
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        return about if isinstance(about, dict) else {}
    except (OSError, ValueError):
        return {}


def clear(entries: list[Entry]) -> int:
    """Remove entries; returns the bytes that this frees."""
    freed = 0
    for entry in entries:
        shutil.rmtree(entry.folder, ignore_errors=True)  # another process may be at it too
        freed += entry.bytes - size_of(entry.folder)
    return freed


def trim(limit: float, keep: set[Path]) -> list[Entry]:
    """Remove the least recently used until `limit` bytes are left; never those in `keep`."""
    everything = entries()
    total = sum(entry.bytes for entry in everything)
    removed = []
    for entry in reversed(everything):
        if total <= limit:
            break
        if entry.folder not in keep:
            total -= clear([entry])
            removed.append(entry)
    return removed


Store = TypeVar("Store")
_shared: dict[tuple[str, str], Any] | None = None
"""Stores in memory, by kind and key, while several trainings share a process (a sweep's trials)."""


@contextlib.contextmanager
def sharing() -> Iterator[None]:
    """Within the block, engines over the same contents get the same stores."""
    global _shared
    before, _shared = _shared, {}
    try:
        yield
    finally:
        _shared = before


def store(
    kind: str, key: Callable[[], str], make: Callable[[], Store], *, exclusive: bool = False
) -> Store:
    """The store of that kind and key; made where there is none, or outside of `sharing`.

    Args:
        key: fixes everything that the store's contents depend on (engine/cache/keys.py); not called
            outside of `sharing`, since it may take a hash over weights.
        exclusive: the others of its kind are dropped before one is made, since each takes a share
            of the memory.
    """
    if _shared is None:
        return make()
    name = kind, key()
    if name not in _shared:
        for other in [each for each in _shared if exclusive and each[0] == kind]:
            del _shared[other]
        _shared[name] = make()
    found: Store = _shared[name]
    return found
