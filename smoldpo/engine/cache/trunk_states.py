"""The frozen trunk's output for each pair, stored for every epoch and for later runs.

Three stores with one interface: none, in memory, on disk under the cache folder.

    trunk/<key>/about.json            what this is, for people
    trunk/<key>/<name>.states         the states of some pairs, one after another
    trunk/<key>/<name>.json           which pairs: {"pairs": {pair key: [offset, tokens, checksum]}}

<key> is a SHA-256 over everything that a state depends on besides its pair's tokens
(cache/keys.py), so a stale store is never looked at. A .json is written by rename after its .states
is whole, so what a crash leaves has none and is removed. The first read of a pair in a process is
checked against its checksum; what fails is computed anew. Nothing is mapped into memory: a read
fills a fresh tensor, so memory does not grow with pairs.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from smoldpo.utils.files import write_json

FORMAT = 1
"""The format of a states file; part of <key> (engine/build.py), so others never match."""
MEMORY_SHARE = 0.5
"""States in memory may take this share of what is free at the start; others are recomputed."""
SHARD_BYTES = 256 << 20
"""A shard is closed, and safe from a crash, at this size."""
LEFTOVER_SECONDS = 24 * 3600
"""A shard without its .json that nobody has touched for this long was left by a crash."""


class TrunkStore:
    """States of pairs at the freeze boundary, [n, D] each, by pair_key (engine/cache/keys.py).

    This class keeps nothing, so that the trunk runs each time; the others keep some.
    """

    folder: Path | None = None
    """Where the states are on disk."""
    room: float = 0
    """Bytes that further states may take."""

    def keys(self) -> Collection[str]:
        """Keys of the pairs whose states are stored."""
        return ()

    def __contains__(self, key: str) -> bool:
        return key in self.keys()

    def __len__(self) -> int:
        return len(self.keys())

    def get(self, key: str) -> torch.Tensor | None:
        """The pair's states, or None where they are not stored (or no longer readable)."""
        return None

    def put(self, key: str, states: torch.Tensor) -> None:
        """Store the pair's states, where there is room."""

    def commit(self) -> None:
        """Make what was put so far last."""

    def refresh(self) -> None:
        """Find what other processes have made last since."""

    def disk_bytes(self, tokens: int) -> int:
        """Bytes on disk that so many more tokens' states will take."""
        return 0


class MemoryStore(TrunkStore):
    """Stores states in memory until `room` bytes are taken; others are computed each time."""

    def __init__(self, room: float):
        self.room = room
        self._states: dict[str, torch.Tensor] = {}

    def keys(self) -> Collection[str]:
        return self._states.keys()

    def get(self, key: str) -> torch.Tensor | None:
        return self._states.get(key)

    def put(self, key: str, states: torch.Tensor) -> None:
        if key not in self._states and states.nbytes <= self.room:
            # A copy, so that one pair does not keep the whole stream alive.
            self._states[key] = states.clone()
            self.room -= states.nbytes


class DiskStore(TrunkStore):
    """Stores states in `folder` until `room` bytes are taken there by this store.

    Args:
        folder: trunk/<key>; made when something is written.
        width, dtype: of a state.
        about: for people, written to about.json.
        warn: called with a sentence about what is unreadable.
        read_only: nothing in the folder is touched, its time of last use included.
    """

    def __init__(
        self,
        folder: Path,
        width: int,
        dtype: torch.dtype,
        room: float,
        about: dict[str, Any],
        warn: Callable[[str], None],
        read_only: bool = False,
    ):
        self.folder = self._folder = folder
        self.room = room
        self._width, self._dtype, self._about, self._warn = width, dtype, about, warn
        self._index: dict[str, _StoredStates] = {}
        self._checked: set[str] = set()
        self._unreadable: set[Path] = set()
        self._shard: _Shard | None = None
        self._indices: set[Path] = set()
        if not read_only:
            self._sweep()
        self.refresh()
        if self._index and not read_only:
            with contextlib.suppress(OSError):  # a cache that may only be read
                os.utime(folder)  # the least recently used goes first when room is needed

    def refresh(self) -> None:
        found = {path for path in self._folder.glob("*.json") if path.name != "about.json"}
        for index in sorted(found - self._indices, key=_age):
            self._read_index(index)
        self._indices |= found

    def keys(self) -> Collection[str]:
        return self._index.keys()

    def get(self, key: str) -> torch.Tensor | None:
        stored = self._index.get(key)
        if stored is None:
            return None
        states = torch.empty(stored.tokens, self._width, dtype=self._dtype)
        raw = _raw(states)
        if _read(stored, raw) and (key in self._checked or _checksum(raw) == stored.checksum):
            self._checked.add(key)
            return states
        del self._index[key]
        if stored.file not in self._unreadable:
            self._unreadable.add(stored.file)
            self._warn(f"trunk store: {stored.file} is damaged; what it holds is computed anew")
        return None

    def put(self, key: str, states: torch.Tensor) -> None:
        if key in self._index or states.nbytes > self.room:
            return
        raw = _raw(states.detach().cpu().contiguous())
        try:
            shard = self._shard or self._start_shard()
            if os.pwrite(shard.file, raw, shard.size) != len(raw):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:  # no space, say: what is not kept is computed each time
            self.room = 0
            self._warn(f"trunk store: {error.strerror}; the other pairs are not kept")
            return
        stored = _StoredStates(shard.path, shard.size, len(states), _checksum(raw))
        self.room -= len(raw)
        shard.size += len(raw)
        shard.pairs[key] = [stored.offset, stored.tokens, stored.checksum]
        self._index[key] = stored
        if shard.size >= SHARD_BYTES:
            self.commit()

    def disk_bytes(self, tokens: int) -> int:
        return int(min(self.room, tokens * self._width * self._dtype.itemsize))

    def commit(self) -> None:
        shard, self._shard = self._shard, None
        if shard is None:
            return
        try:
            os.fsync(shard.file)
            write_json(shard.path.with_suffix(".json"), {"pairs": shard.pairs})
        except OSError as error:  # this run may still read its states; later ones compute anew
            self._warn(f"trunk store: {self.folder}: {error.strerror}; nothing is kept there")
        finally:
            os.close(shard.file)

    def _start_shard(self) -> _Shard:
        self._folder.mkdir(parents=True, exist_ok=True)
        if not (self._folder / "about.json").exists():
            write_json(self._folder / "about.json", self._about)
        path = self._folder / f"{uuid.uuid4().hex[:12]}.states"
        self._shard = _Shard(path, os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644))
        return self._shard

    def _read_index(self, index: Path) -> None:
        states = index.with_suffix(".states")
        try:
            pairs = json.loads(index.read_text(encoding="utf-8"))["pairs"]
            places = {
                str(k): _StoredStates(states, int(o), int(n), str(c))
                for k, (o, n, c) in pairs.items()
            }
            row = self._width * self._dtype.itemsize
            size = states.stat().st_size
            if any(p.offset < 0 or p.tokens < 1 or p.tokens * row > size for p in places.values()):
                raise ValueError("it speaks of what its file cannot hold")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
            self._warn(f"trunk store: {index} cannot be read; its pairs are computed anew")
            return
        self._index |= places
        self._checked.difference_update(places)

    def _sweep(self) -> None:
        """Remove what crashes left: shards without a .json, and halves of a .json."""
        for path in [*self._folder.glob("*.states"), *self._folder.glob(".*")]:
            with contextlib.suppress(OSError):  # another process may be at it too
                left = path.name.startswith(".") or not path.with_suffix(".json").exists()
                if left and time.time() - path.stat().st_mtime > LEFTOVER_SECONDS:
                    path.unlink()

    def __del__(self) -> None:
        shard = getattr(self, "_shard", None)
        if shard is not None:
            os.close(shard.file)


def damage(folder: Path) -> list[str]:
    """What is wrong with an entry's files, in words: everything in it is read."""
    found = []
    for index in folder.glob("*.json"):
        if index.name == "about.json":
            continue
        states = index.with_suffix(".states")
        try:
            raw = memoryview(states.read_bytes())
            places = sorted(json.loads(index.read_text(encoding="utf-8"))["pairs"].values())
            following = places[1][0] - places[0][0] if len(places) > 1 else len(raw)
            row = following // places[0][1]  # bytes of a token's state
            for start, tokens, checksum in places:
                if _checksum(raw[start : start + tokens * row]) != checksum:
                    raise ValueError("its checksum does not fit")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
            found.append(f"trunk store: {states} is damaged ({error})")
    return found


@dataclass(frozen=True)
class _StoredStates:
    """Where a pair's states lie: file, first byte, how many tokens; and their checksum."""

    file: Path
    offset: int
    tokens: int
    checksum: str


class _Shard:
    def __init__(self, path: Path, file: int):
        self.path, self.file = path, file
        self.size = 0
        self.pairs: dict[str, list[Any]] = {}


def _read(stored: _StoredStates, raw: memoryview) -> bool:
    """Fill `raw` from the file; whether all of it was there."""
    try:
        with stored.file.open("rb", buffering=0) as file:
            return os.preadv(file.fileno(), [raw], stored.offset) == len(raw)
    except OSError:
        return False


def _raw(states: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU."""
    return states.view(torch.uint8).numpy().reshape(-1).data


def _age(path: Path) -> float:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def _checksum(raw: memoryview) -> str:
    return hashlib.sha256(raw).hexdigest()[:16]
