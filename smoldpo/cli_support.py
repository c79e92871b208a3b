"""What every verb of the command line shares: errors become messages and exit codes, here alone."""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import typer

from smoldpo.errors import SmoldpoError
from smoldpo.files import NO_SPACE
from smoldpo.interrupts import InterruptedRunError
from smoldpo.redact import redact

INTERRUPTED = 128 + signal.SIGINT


def verb(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run a verb; end it with a message on standard error and the right exit code when it fails."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
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
            _fail("error: out of memory; try a smaller --max-tokens or --max-length", 1)

    return run


def _fail(message: str, code: int) -> None:
    print(redact(message), file=sys.stderr, flush=True)
    raise typer.Exit(code) from None
