"""The reference's log-probabilities, once a pair, for every epoch and for later runs.

    reference/<key>/about.json    what this is, for people
    reference/<key>/logps.json    {"format", "logps": {pair key: [chosen, rejected, their tails]},
                                  "sha256": of the former}

<key> fixes the reference's weights and everything else that the numbers depend on
(engine/cache/keys.py). The file is written by rename and checked when read; one that does not fit
is left aside with a warning. The tails (types.PairLogps) are always kept, so that one store serves
every `ld_alpha`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from smoldpo.utils.files import locked, write_json, write_text

FORMAT = 2
"""Part of <key> too (engine/build.py), so files of another format are never met."""
Sides = tuple[float, float, float, float]
"""log π_ref of chosen and rejected, and of their tails, in nats."""


def damage(folder: Path) -> list[str]:
    """What is wrong with an entry's file, in words."""
    found: list[str] = []
    ReferenceStore(folder, warn=found.append, read_only=True)
    return [problem.partition(";")[0] for problem in found]


class ReferenceStore:
    """Log-probabilities by pair_key. Without a folder they are kept for this process alone.

    Args:
        folder: reference/<key>; made when something is written.
        about: for people, written to about.json.
        warn: called with a sentence about what is unreadable.
        read_only: the folder's time of last use stays what it was.
    """

    def __init__(
        self,
        folder: Path | None = None,
        about: dict[str, Any] | None = None,
        warn: Callable[[str], None] = print,
        read_only: bool = False,
    ):
        self.folder, self._about, self._warn = folder, about or {}, warn
        self._read_only = read_only
        self._logps: dict[str, Sides] = self._read()
        self._changed = False

    def __contains__(self, key: str) -> bool:
        return key in self._logps

    def __len__(self) -> int:
        return len(self._logps)

    def __getitem__(self, key: str) -> Sides:
        return self._logps[key]

    def keys(self) -> Collection[str]:
        """Keys of the pairs whose log-probabilities are stored."""
        return self._logps.keys()

    def put(
        self, key: str, chosen: float, rejected: float, chosen_tail: float, rejected_tail: float
    ) -> None:
        """Remember a pair's log-probabilities."""
        self._logps[key] = (chosen, rejected, chosen_tail, rejected_tail)
        self._changed = True

    def commit(self) -> None:
        """Write what is new, together with what another process may have written meanwhile."""
        if self.folder is None or not self._changed:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with locked(self.folder):
                self._write(self.folder)
        except OSError as error:
            self._warn(f"reference store: {self.folder}: {error.strerror}; nothing is kept there")
        self._changed = False

    def _write(self, folder: Path) -> None:
        self._logps = self._read() | self._logps
        body = json.dumps(self._logps)
        digest = hashlib.sha256(body.encode()).hexdigest()
        write_json(folder / "about.json", self._about)
        write_text(
            folder / "logps.json",
            f'{{"format": {FORMAT}, "logps": {body},\n"sha256": "{digest}"}}\n',
        )

    def _read(self) -> dict[str, Sides]:
        if self.folder is None or not (self.folder / "logps.json").exists():
            return {}
        path = self.folder / "logps.json"
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["format"] != FORMAT:
                raise ValueError(f"its form is {stored['format']!r}, this smoldpo reads {FORMAT}")
            body = json.dumps(stored["logps"])
            if hashlib.sha256(body.encode()).hexdigest() != stored["sha256"]:
                raise ValueError("its checksum does not fit")
            if not self._read_only:
                with contextlib.suppress(OSError):  # a cache that may only be read
                    os.utime(self.folder)
            return {key: _sides(*numbers) for key, numbers in stored["logps"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self._warn(f"reference store: {path} is damaged ({error}); its pairs are computed anew")
            return {}


def _sides(chosen: float, rejected: float, chosen_tail: float, rejected_tail: float) -> Sides:
    return float(chosen), float(rejected), float(chosen_tail), float(rejected_tail)
