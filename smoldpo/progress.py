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
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from smoldpo.types import Advance

QUIET_SECONDS = 15.0
"""Off a terminal, a line of progress at most this often."""


def console() -> Console:
    """Where messages and bars go: standard error, as it is now."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def say(message: str) -> None:
    """One line for a person, on standard error."""
    console().print(message, markup=False)


@contextlib.contextmanager
def bar(title: str, total: int) -> Iterator[Advance]:
    """A bar over `total` units with the time left; yields the function that advances it."""
    if sys.stderr.isatty():
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=console()) as progress:
            task = progress.add_task(title, total=total, note="")
            yield lambda units, note="": progress.update(task, advance=units, note=note)
    else:
        yield _QuietBar(title, total).advance


@contextlib.contextmanager
def spinner(title: str) -> Iterator[None]:
    """For work whose length is not known; silent off a terminal."""
    if sys.stderr.isatty():
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=console(), transient=True) as progress:
            progress.add_task(title)
            yield
    else:
        yield


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
