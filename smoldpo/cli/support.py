"""What every verb of the command line shares: errors become messages and exit codes, here alone."""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer

from smoldpo.utils.distributed import first_speaks, own_rank, require_one_rank
from smoldpo.utils.errors import SmoldpoError, UsageError, nearest
from smoldpo.utils.files import NO_SPACE
from smoldpo.utils.signals import InterruptedRunError
from smoldpo.utils.text import redact

INTERRUPTED = 128 + signal.SIGINT
ON_RANKS = "train", "resume", "evaluate"
"""Verbs that several ranks can run together."""


def verb(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run a verb; end it with a message on standard error and the right exit code when it fails."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            if function.__name__ not in ON_RANKS:
                require_one_rank(f"smoldpo {function.__name__}")
            function(*args, **kwargs)
        except InterruptedRunError as stop:
            _fail(str(stop), stop.exit_code)
        except SmoldpoError as error:
            _fail(f"error: {error}", error.exit_code)
        except KeyboardInterrupt:
            _fail("interrupted; what was finished stays where it is", INTERRUPTED)
        except BrokenPipeError:
            # The reader of our output (head, less) has gone: nothing is wrong, and nobody listens.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            advice = "; free some space and run again" if error.errno in NO_SPACE else ""
            _fail(f"error: {where}{error.strerror or error}{advice}", 1)
        except (MemoryError, RuntimeError) as error:
            # torch has an error of its own for GPUs, and a plain RuntimeError for the CPU.
            if isinstance(error, RuntimeError) and "memory" not in str(error):
                raise
            _fail("error: out of memory; try a smaller --stream-tokens or --max-length", 1)

    return run


def fail_gates(sentences: Sequence[str]) -> None:
    """End with 1 where a figure is lower than --fail-under allows, after the results."""
    fail_sweep([], 0, sentences)


def fail_sweep(failed: Sequence[str], of: int, missed: Sequence[str]) -> None:
    """End with 1 where trials of a sweep failed, or its winner misses a gate; after the results."""
    lines = [f"  - {sentence}" for sentence in failed]
    if failed:
        lines.insert(0, f"{len(failed)} of {of} trials failed:")
    lines += [f"fail_under: {sentence}" for sentence in missed]
    if lines:
        _fail("\n".join(lines), 1)


def one_of(option: str, value: Any, known: tuple[str, ...]) -> None:
    """Refuse a value that an option does not know.

    Raises:
        UsageError: naming the values that there are.
    """
    if value not in known:
        raise UsageError(
            f"--{option} is {value!r}{nearest(value, known)}; give one of {', '.join(known)}"
        )


def names(given: list[str] | None) -> list[str]:
    """An option that may be repeated or comma-separated, as one list."""
    return [name.strip() for text in given or () for name in text.split(",") if name.strip()]


def number(option: str, text: str) -> float:
    """An option's number.

    Raises:
        UsageError: it is none.
    """
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"{option} is {text or 'missing'}; give a number") from None


def writable(option: str, path: Path | None, suffix: str | None = None) -> None:
    """Refuse early what could not be written in the end.

    Raises:
        UsageError: no such folder, a folder in place of a file, or another suffix.
    """
    if path is None:
        return
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{option} {path}: its folder does not exist")
    if path.is_dir():
        raise UsageError(f"{option} {path}: is a folder; give a file")
    if suffix is not None and path.suffix != suffix:
        raise UsageError(f"{option} {path}: the name must end with {suffix}")


def _fail(message: str, code: int) -> None:
    if not first_speaks():
        who = f"rank {own_rank()}: " if own_rank() else ""
        print(redact(who + message), file=sys.stderr, flush=True)
    raise typer.Exit(code) from None
