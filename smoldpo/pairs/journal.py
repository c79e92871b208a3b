"""Answers and verdicts on the disk as they come: what is in the journal is not made again.

    {"request": {...}}                                    first line: what is asked of whom
    {"model": 0, "prompt": 3, "number": 1, "text": ...}   an answer
    {"judge": "length", "prompt": 3, "verdicts": [...]}   what a judge made of a prompt's answers

Each line is appended and synced at once. A line that a kill cut off is taken away on the next
opening. The file stays when the pairs are written: other judges, checks or margins then need no new
answers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smoldpo.utils.errors import DataError, UsageError
from smoldpo.utils.files import not_saved

FORMAT = 1


def journal_path(output: Path) -> Path:
    """Where the answers of an output lie: beside it, under a name that is read as no data."""
    return output.with_name(f"{output.name}.answers")


class Journal:
    """An append-only file of one request's answers and verdicts."""

    def __init__(self, path: Path):
        """Read what is there, if anything.

        Raises:
            DataError: the file is none of these.
        """
        self.path = path
        self.request: dict[str, Any] | None = None
        self.rows: list[dict[str, Any]] = []
        if path.is_file():
            self._read()

    def begin(self, request: dict[str, Any], overwrite: bool = False) -> None:
        """Go on with `request`, or begin it.

        Args:
            overwrite: whether answers to another request are thrown away.

        Raises:
            UsageError: the file holds answers to another request; says what differs.
        """
        before = self.request or {}
        differing = [
            f"{name}: {before.get(name)!r} then, {request.get(name)!r} now"
            for name in sorted({*before, *request})
            if before.get(name) != request.get(name)
        ]
        if self.request is None or (differing and overwrite):
            self.path.unlink(missing_ok=True)
            self.append([{"format": FORMAT, "request": request}])
            self.request, self.rows = request, []
        elif differing:
            lines = "\n".join(f"  - {line[:300]}" for line in differing)
            raise UsageError(
                f"{self.path}: holds answers that were drawn otherwise:\n{lines}\n"
                "ask as before, give another --output, or draw anew with --overwrite"
            )

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append lines, and have them on the disk.

        Raises:
            DiskError: the disk is full.
        """
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        try:
            with self.path.open("ab") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise not_saved(self.path, "an answer", len(data), error) from None
        self.rows += rows

    def _read(self) -> None:
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        lines = whole.splitlines()
        try:
            first, *self.rows = (json.loads(line) for line in lines) if lines else ({},)
            known = isinstance(first, dict) and all(isinstance(row, dict) for row in self.rows)
        except ValueError:
            known = False
        if not known or (lines and (first.get("format") != FORMAT or "request" not in first)):
            raise DataError("holds no answers of smoldpo pairs make", file=str(self.path))
        self.request = first.get("request")
        if len(whole) < len(data):  # cut off by a kill or a full disk
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
