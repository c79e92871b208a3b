"""Progress for people: a bar with time left on a terminal, a quiet line now and then elsewhere.

Everything here goes to standard error; standard output belongs to data.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from smoldpo.redact import redact
from smoldpo.types import Advance

QUIET_SECONDS = 15.0
"""Off a terminal, a line of progress at most this often."""


_live: Progress | None = None
"""The display that is on the terminal now; bars within bars become further lines of it."""


def console() -> Console:
    """Where messages and bars go: standard error, as it is now."""
    return _live.console if _live else Console(stderr=True, highlight=False, soft_wrap=True)


_hushed = False


@contextlib.contextmanager
def hushed(quiet: bool = True) -> Iterator[None]:
    """Within the block nothing is said: what a sweep's first trial has said of all of them."""
    global _hushed
    before, _hushed = _hushed, quiet or _hushed
    try:
        yield
    finally:
        _hushed = before


def say(message: str) -> None:
    """One line for a person, on standard error."""
    if _hushed:
        return
    console().print(redact(message), markup=False)


@contextlib.contextmanager
def bar(title: str, total: int) -> Iterator[Advance]:
    """A bar over `total` units with the time left; yields the function that advances it."""
    if not sys.stderr.isatty():
        yield _QuietBar(title, total).advance
        return
    with _line(title, total) as (progress, task):
        done = 0

        def advance(units: int, note: str = "") -> None:
            nonlocal done
            done += units
            progress.update(task, completed=done, count=f"{done:,}/{total:,}", note=note)

        yield advance


@contextlib.contextmanager
def spinner(title: str) -> Iterator[None]:
    """For work whose length is not known; silent off a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    with _line(title, None):
        yield


@contextlib.contextmanager
def _line(title: str, total: int | None) -> Iterator[tuple[Progress, TaskID]]:
    """A line on the terminal for the length of a block; it is gone afterwards."""
    global _live
    outermost = _live is None
    progress = _live or Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[count]}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console(),
        transient=True,
    )
    left = "left" if total else ""
    if outermost:
        progress.start()
        _live = progress
    task = progress.add_task(title, total=total, count="", note="", left=left)
    try:
        yield progress, task
    finally:
        progress.remove_task(task)
        if outermost:
            _live = None
            progress.stop()


class _QuietBar:
    def __init__(self, title: str, total: int):
        self.title, self.total, self.done = title, total, 0
        self.start = self.said = time.monotonic()

    def advance(self, units: int, note: str = "") -> None:
        self.done += units
        now = time.monotonic()
        if now - self.said >= QUIET_SECONDS and self.done < self.total:
            self.said = now
            left = (now - self.start) / self.done * (self.total - self.done)
            say(
                f"{self.title}: {self.done} of {self.total}, about {left:.0f} s left {note}".rstrip()
            )
