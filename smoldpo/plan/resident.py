"""How much memory this process has resident: now, and at the height of a block."""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Iterator

import psutil
import torch

SECONDS = 0.005
"""Between looks. What lasts shorter is missed."""


def resident() -> int:
    """Bytes resident now."""
    return psutil.Process().memory_info().rss


def bytes_of(model: torch.nn.Module) -> int:
    """Bytes of all weights, each in the precision that it has."""
    return sum(weight.nbytes for weight in model.parameters())


def read_in(*models: torch.nn.Module | None) -> None:
    """Read all weights once, so that no step takes the pages of a mapped file, which come when first read."""
    for model in models:
        for weight in model.parameters() if model is not None else ():
            weight.detach().flatten()[:: mmap.PAGESIZE // weight.element_size()].sum()


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
