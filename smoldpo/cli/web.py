"""`smoldpo web`: the local page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from smoldpo.cli.support import verb, writable


@verb
def web(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="[RUN or FILE]",
            help="A run, a folder of runs, or a file with two answers a row (prompt, a, b; or any "
            "pairs).",
        ),
    ] = Path("runs"),
    votes: Annotated[
        Path | None,
        typer.Option(
            help="The file of votes; by default votes.jsonl in the run, or beside the file.",
            show_default=False,
        ),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 0,
) -> None:
    """Vote on answers, blind, and look at runs: a page on this machine alone."""
    writable("--votes", votes, ".jsonl")
    from smoldpo.utils.progress import spinner

    with spinner("starting"):
        from smoldpo.web.server import serve

    serve(source, votes, port)
