"""SIGINT and SIGTERM during a run: noticed at once, answered where nothing is half done.

A handler that raises could do so in the middle of an optimizer step or of a save. So while a run
trains, the signal is only remembered, and the run asks (`check`) between streams and steps. A
second SIGINT does not wait for that. Of several ranks, one that was told to stop tells the others
when they next meet, and all stop there (utils/distributed.py).
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from smoldpo.utils import progress
from smoldpo.utils.distributed import world

SIGNALS = (signal.SIGINT, signal.SIGTERM)
DEFAULT_HANDLERS = (signal.SIG_DFL, signal.default_int_handler)
"""Handlers that a program has which set none."""


class InterruptedRunError(KeyboardInterrupt):
    """The run was told to stop; its exit code is 128 + the signal's number.

    A KeyboardInterrupt, so that what catches every Exception does not take it for a failure of its
    own.
    """

    def __init__(self, number: int, text: str = "interrupted; what was finished stays where it is"):
        super().__init__(text)
        self.number = number
        self.exit_code = 128 + number


class Interruption:
    """A context in which SIGINT and SIGTERM raise InterruptedRunError: at once, or where asked.

    Args:
        embedded: in another program: handlers that it set stay in force, and a second SIGINT raises
            KeyboardInterrupt instead of ending the process.
    """

    def __init__(self, embedded: bool = False) -> None:
        self._embedded = embedded
        self._received: int | None = None
        self._deferring = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            for number in SIGNALS:
                if not self._embedded or signal.getsignal(number) in DEFAULT_HANDLERS:
                    self._before[number] = signal.signal(number, self._receive)
        world().stopped_by(self._raise_received)
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Within the block a signal waits for the next `check`."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def check(self) -> None:
        """Raise if a signal has come, and no other rank waits for this one.

        Raises:
            InterruptedRunError: it has.
        """
        if world().apart:
            self._raise_received()

    def _raise_received(self) -> None:
        if self._received is not None:
            raise InterruptedRunError(self._received)

    def checking(self, advance: Callable[..., None]) -> Callable[..., None]:
        """`advance`, and then `check`."""

        def advance_and_check(*args: Any, **kwargs: Any) -> None:
            advance(*args, **kwargs)
            self.check()

        return advance_and_check

    def _receive(self, number: int, _frame: Any) -> None:
        if self._received is not None and number == signal.SIGINT:
            if self._embedded:
                raise KeyboardInterrupt
            _write_now("stopped at once; smoldpo resume goes on from the last checkpoint\n")
            os._exit(128 + number)
        self._received = number
        if not self._deferring:
            self.check()
        progress.urgent("stopping: what is finished is saved first; Ctrl-C (again) stops at once")


def _write_now(text: str) -> None:
    """To standard error, unbuffered; and show a terminal's cursor, which displays hide."""
    with contextlib.suppress(OSError):
        os.write(2, (f"\x1b[?25h\n{text}" if os.isatty(2) else text).encode())
