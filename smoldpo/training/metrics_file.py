"""metrics.jsonl: one line a step, on disk as soon as it is known."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, Protocol

from smoldpo.utils.files import write_text


class RowListener(Protocol):
    """What is told each row of the file, such as loggers.Reporting."""

    def log(self, row: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class MetricsFile:
    """Appends one JSON object a line. A number that is not finite is written as text, never lost.

    Args:
        reporting: told each row once it is written; by default nobody is.
    """

    def __init__(self, path: Path, reporting: RowListener | None = None):
        self._reporting = reporting
        self.rows = len(_rows(path))
        self._file = path.open("a", encoding="utf-8")

    def log(self, row: dict[str, Any]) -> None:
        """Write one row and flush it."""
        plain = {key: _plain(value) for key, value in row.items()}
        self._file.write(json.dumps(plain, allow_nan=False) + "\n")
        self._file.flush()
        self.rows += 1
        if self._reporting is not None:
            self._reporting.log(row)

    def sync(self) -> int:
        """Bring what was logged to the disk itself; returns the number of rows in the file."""
        os.fsync(self._file.fileno())
        return self.rows

    def close(self) -> None:
        """Close the file and the loggers; a second time does nothing."""
        self._file.close()
        if self._reporting is not None:
            self._reporting.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a metrics file; none where there is no file."""
    return [json.loads(row) for row in _rows(path)]


def cut_back(path: Path, rows: int) -> None:
    """Leave the first `rows` rows of a metrics file; a kill leaves the old file or the new one."""
    rows_left = _rows(path)[:rows]
    write_text(path, "".join(row + "\n" for row in rows_left))


def _rows(path: Path) -> list[str]:
    """Whole lines; what a kill left of one does not count."""
    if not path.exists():
        return []
    return path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
