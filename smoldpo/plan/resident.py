"""How much memory this process has resident: now, and at the height of a block."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import psutil

SECONDS = 0.005
"""Between looks. What lasts shorter is missed."""


def resident() -> int:
    """Bytes resident now."""
    return psutil.Process().memory_info().rss


class Height:
    """The most bytes resident that were seen."""

    def __init__(self) -> None:
        self.bytes = resident()

    def look(self) -> None:
        self.bytes = max(self.bytes, resident())


@contextlib.contextmanager
def height() -> Iterator[Height]:
    """Looks at the memory until the block ends."""
    seen, ended = Height(), threading.Event()

    def watch() -> None:
        while not ended.wait(SECONDS):
            seen.look()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield seen
    finally:
        ended.set()
        watcher.join()
        seen.look()
