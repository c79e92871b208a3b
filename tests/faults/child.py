"""The real command in a child process that can be killed or starved, without a second of imports
each time.

Children are forked from a server process that has imported everything and computed nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conftest import ROOT

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["faults.preload"])


@dataclass
class Child:
    """A running `smoldpo ...`; its output is in a file."""

    process: Any
    log: Path

    def wait(self, seconds: float = 900) -> int:
        """Its exit code; minus the signal's number where that killed it."""
        self.process.join(seconds)
        if self.running:
            self.process.kill()
            raise AssertionError(f"still running after {seconds:.0f} s:\n{self.said}")
        return self.process.exitcode

    @property
    def said(self) -> str:
        text = self.log.read_text()
        assert "Traceback" not in text, text
        return text

    @property
    def peak_bytes(self) -> int:
        """The most memory that it held; of one that was not killed."""
        return int(self.log.with_suffix(".peak").read_text())

    @property
    def running(self) -> bool:
        return self.process.exitcode is None

    def signal(self, number: int) -> None:
        """Send it a signal; nothing happens if it has ended."""
        if self.running:
            os.kill(self.process.pid, number)

    def wait_until(self, condition: Callable[[], bool], seconds: float = 900) -> None:
        """Wait for something that the child does."""
        end = time.monotonic() + seconds
        while not condition():
            assert self.running and time.monotonic() < end, self.said
            time.sleep(0.002)


def start(
    *arguments: object,
    log: Path,
    plant: Callable[..., None] | None = None,
    planted_with: tuple = (),
    environment: dict[str, str] | None = None,
    limits: dict[int, int] | None = None,
    folder: Path | None = None,
    terminal: str | None = None,
) -> Child:
    """Start `smoldpo <arguments>`.

    Args:
        plant: a function of planted.py, called in the child before the command, with
            `planted_with`.
        limits: resource limits by number.
        terminal: the terminal that it writes to, in place of `log`.
    """
    words = [str(argument) for argument in arguments]
    settings = (
        log,
        words,
        plant,
        planted_with,
        environment or {},
        limits or {},
        folder or log.parent,
        terminal,
    )
    process = _context.Process(target=_run, args=settings)
    process.start()
    return Child(process, log)


def run(*arguments: object, log: Path, **options: Any) -> tuple[int, str]:
    """Run `smoldpo <arguments>` to its end: exit code and everything it said."""
    child = start(*arguments, log=log, **options)
    return child.wait(), child.said


def _run(
    log: Path,
    words: list[str],
    plant: Callable[..., None] | None,
    planted_with: tuple,
    environment: dict[str, str],
    limits: dict[int, int],
    folder: Path,
    terminal: str | None,
) -> None:
    descriptor = os.open(terminal or log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update({"OMP_NUM_THREADS": "2"} | environment)  # every fault meets two workers
    os.chdir(folder)
    from faults import planted
    from smoldpo.cli import main

    planted.same_kernels()
    planted.without_pictures()
    if plant is not None:
        plant(*planted_with)
    for number, limit in limits.items():
        resource.setrlimit(number, (limit, resource.getrlimit(number)[1]))
    sys.argv = ["smoldpo", *words]
    try:
        main.main()
    finally:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        log.with_suffix(".peak").write_text(str(peak))


def prepare_server() -> None:
    """What the server and its children inherit; called before the first start."""
    os.environ["OMP_NUM_THREADS"] = "1"
    paths = [str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
