"""`smoldpo cache`: what is stored between runs, and its removal."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from smoldpo.cli.support import verb
from smoldpo.utils.errors import UsageError

app = typer.Typer(
    help="Look at, or clear, what is kept between runs: trunk states and reference "
    "log-probabilities.",
    no_args_is_help=True,
)
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command("list")
@verb
def list_(as_json: AsJson = False) -> None:
    """List what is kept, most recently used first, with sizes."""
    from smoldpo.engine.cache.folder import entries
    from smoldpo.utils.files import cache_folder

    cached = entries()
    if as_json:
        rows = [entry.as_row() for entry in cached]
        print(json.dumps({"folder": str(cache_folder()), "entries": rows}, indent=2))
        return
    from smoldpo.cli.output import print_cache

    print_cache(cached, str(cache_folder()))


@app.command("clear")
@verb
def clear(
    keys: Annotated[
        list[str] | None,
        typer.Argument(help="Keys (or their beginnings) from cache list; without: everything."),
    ] = None,
) -> None:
    """Remove what is kept; runs compute and measure it anew. Unpacked models stay."""
    from smoldpo.engine.autotune import forget_choices
    from smoldpo.engine.cache import folder as cache

    cached = cache.entries()
    if "" in (keys or []):
        raise UsageError(
            "a key is empty; give keys from smoldpo cache list, or none to remove everything"
        )
    for key in keys or []:
        if not any(entry.folder.name.startswith(key) for entry in cached):
            raise UsageError(f"{key}: no such key; smoldpo cache list shows them")
    chosen = [
        entry
        for entry in cached
        if not keys or any(entry.folder.name.startswith(key) for key in keys)
    ]
    freed = cache.clear(chosen)
    if not keys:
        forget_choices()
    print(f"removed {len(chosen)} of {len(cached)}, {freed:,} bytes")
