"""`--nproc N`: the same command as N ranks on this machine, started by torchrun's own launcher."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Annotated

import typer

from smoldpo.utils.errors import UsageError

Nproc = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Compute as N processes on this machine (ranks)."),
]
PATIENCE = 300
"""Seconds that ranks have to save and end where one has failed or is told to stop; torchrun's own
default is 30."""


def take_nproc(words: Sequence[str]) -> tuple[list[str], int | None]:
    """`--nproc N` (or --nproc=N) out of a command's words; the others, and N.

    Raises:
        UsageError: no number, or none from 1.
    """
    left, text = take_option(words, "--nproc")
    if text is None:
        return left, None
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"--nproc is {text or 'missing'}; give the number of processes")
    return left, int(text)


def take_option(words: Sequence[str], option: str) -> tuple[list[str], str | None]:
    """An option's value, "" where it has none, out of a command's words; None where it is not
    there.
    """
    for place, word in enumerate(words):
        name, equals, text = word.partition("=")
        if name == option:
            end = place + (1 if equals else 2)
            value = text if equals else " ".join(words[place + 1 : end])
            return [*words[:place], *words[end:]], value
    return list(words), None


def run_on_ranks(count: int, words: Sequence[str]) -> None:
    """Run `smoldpo <words>` as so many ranks, and end with their exit code.

    Raises:
        UsageError: this process is a rank itself.
    """
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from smoldpo.utils.distributed import started_ranks
    from smoldpo.utils.threads import usable_cores

    if started_ranks() > 1:
        raise UsageError("--nproc starts ranks, and torchrun has started these; leave it out")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // count)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(PATIENCE))
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # ranks say what is wrong
    launcher = ["--standalone", "--local-addr=127.0.0.1", "--max-restarts=0"]
    try:
        torchrun.main([*launcher, f"--nproc-per-node={count}", "-m", "smoldpo", *words])
    except SignalException as stop:
        raise typer.Exit(128 + stop.sigval) from None
    except ChildFailedError as failed:
        codes = [failure.exitcode for _, failure in sorted(failed.failures.items())]
        # Of those that ended by themselves, else of one that was killed, as a shell has it.
        raise typer.Exit(next((c for c in codes if c > 0), 128 - codes[0])) from None
