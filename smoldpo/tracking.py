"""metrics.jsonl: one line a step, on disk as soon as it is known."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


class MetricsFile:
    """Appends one JSON object a line. A number that is not finite is written as text, never lost."""

    def __init__(self, path: Path):
        self._file = path.open("a", encoding="utf-8")

    def log(self, row: dict[str, Any]) -> None:
        """Write one row and flush it."""
        plain = {key: _plain(value) for key, value in row.items()}
        self._file.write(json.dumps(plain, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
