"""Progress for people: a bar with time left on a terminal, a quiet line now and then elsewhere.

Everything here goes to standard error; standard output belongs to data.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from smoldpo.types import Advance
from smoldpo.utils.text import redact

QUIET_SECONDS = 15.0
"""Off a terminal, a line of progress at most this often."""


_silent = False
_framed = False
_notice = ""
_live: Progress | None = None
"""The display that is on the terminal now; bars within bars become further lines of it."""


def console() -> Console:
    """Where messages and bars go: standard error, as it is now."""
    return _live.console if _live else Console(stderr=True, highlight=False, soft_wrap=True)


def say(message: str) -> None:
    """One line for a person, on standard error."""
    if _silent:
        return
    console().print(redact(message), markup=False)


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Within the block nothing is said and nothing drawn."""
    global _silent
    before, _silent = _silent, True
    try:
        yield
    finally:
        _silent = before


def on_terminal() -> bool:
    """Whether there is a terminal to draw on, and drawing is wanted."""
    return not _silent and sys.stderr.isatty()


def is_drawing() -> bool:
    """Whether a display is on the terminal now; what is drawn within it becomes a line of it."""
    return _live is not None


@contextlib.contextmanager
def bar(title: str, total: int) -> Iterator[Advance]:
    """A bar over `total` units with the time left; yields the function that advances it."""
    if not on_terminal():
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
def framed(bars: Progress, frame: RenderableType) -> Iterator[None]:
    """Draw `frame`, which holds `bars`, within a block; bars become lines of `bars`.

    For the outermost display alone, on a terminal. `bars` must write to `console()`.
    """
    global _live, _framed, _notice
    assert _live is None
    try:
        with Live(frame, console=bars.console, transient=True, refresh_per_second=4):
            _live, _framed, _notice = bars, True, ""
            try:
                yield
            finally:
                _live, _framed = None, False
    finally:
        if _notice:
            say(_notice)


def notice() -> str:
    """What `urgent` had to say during this frame, for the frame to show."""
    return _notice


def urgent(message: str) -> None:
    """Say something from within a signal handler, which may have come in the middle of anything.

    Past the streams' buffers; within a frame it is remembered, and the frame shows it when it is
    next drawn.
    """
    global _notice
    if _silent:
        return
    if _framed:
        _notice = message
        return
    with contextlib.suppress(OSError):
        os.write(2, f"{message}\n".encode())


@contextlib.contextmanager
def spinner(title: str) -> Iterator[None]:
    """For work whose length is not known; silent off a terminal."""
    if not on_terminal():
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
            done = f"{self.title}: {self.done} of {self.total}"
            say(f"{done}, about {left:.0f} s left {note}".rstrip())
