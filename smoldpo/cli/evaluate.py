"""`smoldpo evaluate`, `show` and `report`: what models and runs are worth, on pairs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from smoldpo.cli.data import Columns, Format, parse_columns
from smoldpo.cli.launch import Nproc, run_on_ranks, take_nproc
from smoldpo.cli.support import fail_gates, names, verb, writable
from smoldpo.cli.template_options import takes_template_options
from smoldpo.utils.distributed import own_rank
from smoldpo.utils.errors import UsageError

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@verb
@takes_template_options()
def evaluate(
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL [SECOND] DATA",
            help="One or two models (builtin, a folder, a run, a .gguf file, or a hub id), and "
            "preference pairs as train reads them. Two models are compared pair by pair.",
            show_default=False,
        ),
    ],
    reference: Annotated[
        str | None,
        typer.Option(help="Reference of the implicit reward; of two models, the first by default."),
    ] = None,
    beta: Annotated[float, typer.Option(help="β, for the calibration of two models.")] = 0.1,
    generate: Annotated[
        int, typer.Option(min=0, help="Prompts that both models answer, side by side.")
    ] = 0,
    temperature: Annotated[
        float, typer.Option(min=0, help="Of the answers; the KL estimate needs 1.")
    ] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length limit of an answer.")] = 128,
    judge: Annotated[
        list[str] | None,
        typer.Option(
            help="Who compares the answers: length, reward:MODEL, implicit:MODEL, or an "
            "endpoint's URL."
        ),
    ] = None,
    fail_under: Annotated[
        list[str] | None,
        typer.Option(help="Exit with 1 when a figure is lower: reward=0.55, change/reward=0.02."),
    ] = None,
    as_json: Json = False,
    rows: Annotated[
        Path | None, typer.Option(help="Write one row a pair to this .jsonl file.")
    ] = None,
    subset: Annotated[str | None, typer.Option(help="Subset of a hub dataset.")] = None,
    split: Annotated[
        str | None, typer.Option(help="Split to evaluate on; by default test, else the only one.")
    ] = None,
    max_samples: Annotated[int | None, typer.Option(min=1, help="The first N pairs only.")] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of prompt and completion.")] = 1024,
    batch_size: Annotated[int, typer.Option(min=1, help="Pairs at once.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap and the answers.")] = 42,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float64, or auto (the faster of the first two).")
    ] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    engine: Annotated[str, typer.Option(help="auto, fast or plain.")] = "auto",
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Streams of pairs computed at once; the usable cores."),
    ] = None,
    nproc: Nproc = None,
    format: Format = None,
    columns: Columns = None,
    *,
    template: dict[str, Any],
) -> None:
    """Measure preference accuracy of a model on pairs, or compare two models on them."""
    from smoldpo.config.evaluate_options import evaluate_options

    models, data = _models_and_data(what)
    options = evaluate_options(
        {
            "reference": reference,
            "beta": beta,
            "seed": seed,
            "subset": subset,
            "split": split,
            "max_samples": max_samples,
            "max_length": max_length,
            "batch_size": batch_size,
            "dtype": dtype,
            "device": device,
            "engine": engine,
            "threads": threads,
            "format": format,
            "columns": parse_columns(columns),
            "generate_prompts": generate,
            "temperature": temperature,
            "max_new_tokens": max_new_tokens,
            "judges": judge or [],
            "fail_under": names(fail_under),
        }
        | template
    )
    writable("--rows", rows)
    if nproc is not None:
        run_on_ranks(nproc, take_nproc(sys.argv[1:])[0])
        return
    from smoldpo.utils.progress import spinner

    with spinner("starting"):
        from smoldpo.evaluation.evaluate import evaluate_models

    found = evaluate_models(models, data, options)
    if own_rank():
        return
    if rows is not None:
        from smoldpo.utils.files import write_jsonl

        write_jsonl(rows, found.rows())
    if as_json:
        print(json.dumps(found.summary(), indent=2))
    else:
        from smoldpo.cli.output import print_evaluation

        print_evaluation(found)
    fail_gates(found.failed_gates)


def _models_and_data(what: list[str]) -> tuple[list[str], str]:
    if len(what) not in (2, 3):
        raise UsageError(
            f"evaluate takes one or two models and then the data, not {len(what)} names: smoldpo "
            "evaluate runs/mine pairs.jsonl, or smoldpo evaluate builtin runs/mine pairs.jsonl"
        )
    return what[:-1], what[-1]


Run = Annotated[Path, typer.Argument(help="A run folder, such as runs/mine.", show_default=False)]


@verb
def show(run: Run, as_json: Json = False) -> None:
    """Print what a finished run found: the answer, the table, and what they rest on."""
    from smoldpo.reports.run_files import read_run

    files = read_run(run)
    if files.evaluation is None:
        raise UsageError(f"{run}: {files.absent['evaluation.json']}")
    if as_json:
        print(json.dumps(files.evaluation.model_dump(mode="json", exclude={"pairs"}), indent=2))
        return
    from smoldpo.cli.output import print_comparison

    print_comparison(files.evaluation)


@verb
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Run folders; several stand side by side.", show_default=False),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="The page; by default report.html in the run, or here for several."),
    ] = None,
) -> None:
    """Write the report of one run or several as one page that opens anywhere."""
    writable("--out", out, ".html")
    from smoldpo.utils.progress import spinner

    with spinner("drawing"):
        from smoldpo.reports.html import write_report
        from smoldpo.reports.run_files import read_run

        path = out or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
        write_report([read_run(run) for run in runs], path)
    print(path)
