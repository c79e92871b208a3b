"""`smoldpo export`: a model as other programs take it, proven by reading it back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from smoldpo.cli.support import one_of, verb, writable
from smoldpo.utils.errors import UsageError

TARGETS = ("gguf", "lmstudio", "ollama", "mlx", "hub")


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
    to: Annotated[
        str,
        typer.Option(
            help="gguf: one file for llama.cpp; lmstudio: that file where LM Studio looks for it; "
            "ollama: a folder with it and a Modelfile; mlx: a folder for mlx-lm; "
            "hub: a repository on the Hugging Face hub, with card and report.",
            show_default=False,
        ),
    ],
    quantize: Annotated[
        str | None,
        typer.Option(
            help="Type of the matrices; f32, bf16, f16 (the default); of GGUF files also q8_0 and, "
            "where llama-quantize is found, q4_k_m and other smaller ones; of mlx q8, q6, q4.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="The file or folder (of lmstudio, its folder of models); by default in the run's "
            "folder export/, else here.",
            show_default=False,
        ),
    ] = None,
    adapter: Annotated[
        bool,
        typer.Option("--adapter", help="Write an adapter by itself, not merged; --to gguf or mlx."),
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace what is there.")] = False,
    data: Annotated[
        str | None,
        typer.Option(
            help="Pairs to prove the export on; by default those that the run held out, else the "
            "built-in ones."
        ),
    ] = None,
    pairs: Annotated[int, typer.Option(min=1, help="How many pairs prove it.")] = 32,
    repo: Annotated[
        str | None, typer.Option(help="hub: the repository, OWNER/NAME.", show_default=False)
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="hub: for all to see, if it is new.")
    ] = False,
    with_texts: Annotated[
        bool, typer.Option("--with-texts", help="hub: texts of the data and samples, too.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="hub: say what would go, and send nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write a model for other programs, read it back, and hold it against the model."""
    one_of("to", to, TARGETS)
    if to == "hub":
        _to_hub(model, repo, public, with_texts, dry_run, as_json)
        return
    if repo or public or with_texts or dry_run:
        raise UsageError(f"--repo, --public, --with-texts, --dry-run: are for --to hub, not {to}")
    if output is not None and to == "gguf":
        if output.suffix != ".gguf":
            raise UsageError(f"--output {output}: the name must end with .gguf")
        writable("--output", output)
    elif output is not None and not output.absolute().parent.is_dir():
        raise UsageError(f"--output {output}: its folder does not exist")
    from smoldpo.utils.progress import say, spinner

    with spinner("starting"):
        from smoldpo.export.export import export_model

    found = export_model(model, to, quantize, output, overwrite, data, pairs, adapter)
    if as_json:
        print(json.dumps(found.as_json(), indent=2))
        return
    say(str(found))
    print(found.path)


def _to_hub(
    model: str, repo: str | None, public: bool, texts: bool, dry_run: bool, as_json: bool
) -> None:
    if repo is None:
        raise UsageError("--repo: give the repository, OWNER/NAME")
    from smoldpo.utils.progress import say, spinner

    with spinner("starting"):
        from smoldpo.export.hub import upload_run

    found = upload_run(model, repo, public=public, texts=texts, dry_run=dry_run)
    if as_json:
        print(json.dumps(found.as_json(), indent=2))
        return
    say(str(found))
    if found.url:
        print(found.url)
