"""`smoldpo export`: a model as other programs take it, proven by reading it back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from smoldpo.cli.support import one_of, verb, writable
from smoldpo.utils.errors import UsageError

TARGETS = ("gguf",)


@verb
def export(
    model: Annotated[
        str,
        typer.Argument(
            help="A run, a model or adapter folder (which is merged), builtin, a .gguf file, or a "
            "hub id.",
            show_default=False,
        ),
    ],
    to: Annotated[str, typer.Option(help="gguf: one file for llama.cpp, Ollama, LM Studio.")],
    quantize: Annotated[
        str, typer.Option(help="Type of the file's matrices: f32, bf16, f16 or q8_0.")
    ] = "f16",
    output: Annotated[
        Path | None,
        typer.Option(
            help="The file; by default in the run's folder export/, else here.", show_default=False
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a file that is there.")] = False,
    data: Annotated[
        str | None,
        typer.Option(
            help="Pairs to prove the file on; by default those that the run held out, else the "
            "built-in ones."
        ),
    ] = None,
    pairs: Annotated[int, typer.Option(min=1, help="How many pairs prove it.")] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write a model for other programs, read it back, and hold it against the model."""
    one_of("to", to, TARGETS)
    if output is not None:
        if output.suffix != ".gguf":
            raise UsageError(f"--output {output}: the name must end with .gguf")
        writable("--output", output)
    from smoldpo.utils.progress import say, spinner

    with spinner("starting"):
        from smoldpo.export.export import export_gguf

    found = export_gguf(model, quantize, output, overwrite, data, pairs)
    if as_json:
        print(json.dumps(found.as_json(), indent=2))
        return
    say(str(found))
    print(found.file)
