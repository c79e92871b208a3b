"""`smoldpo data`: preference data looked at, row by row and as a whole, or written anew."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from smoldpo.cli.support import names, verb, writable
from smoldpo.cli.template_options import takes_template_options
from smoldpo.utils.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from smoldpo.data.audit import CheckReport


app = typer.Typer(
    help="Check, show and convert preference data.", no_args_is_help=True, rich_markup_mode=None
)

Data = Annotated[
    str, typer.Argument(help="builtin, a file, a folder, or a hub id.", show_default=False)
]
Subset = Annotated[str | None, typer.Option(help="Subset of a hub dataset.")]
Format = Annotated[str | None, typer.Option(help="The rows' schema; found by looking by default.")]
Columns = Annotated[
    str | None, typer.Option(help="Names of columns: prompt=question,chosen=better")
]
MaxLength = Annotated[int, typer.Option(min=2, help="Tokens of prompt and completion together.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command()
@verb
@takes_template_options()
def check(
    data: Data,
    eval_data: Annotated[
        str | None, typer.Option(help="Held-out pairs, whose prompts must not stand in DATA.")
    ] = None,
    off: Annotated[
        list[str] | None, typer.Option(help="Rules to leave out: near_identical,refusal")
    ] = None,
    on: Annotated[
        list[str] | None, typer.Option(help="Rules that are off by default: mixed_language")
    ] = None,
    near_identical: Annotated[
        float, typer.Option(help="Likeness from which two answers are nearly identical, 0 to 1.")
    ] = 0.95,
    subset: Subset = None,
    split: Annotated[str | None, typer.Option(help="Check this split; by default all.")] = None,
    format: Format = None,
    columns: Columns = None,
    max_length: MaxLength = 1024,
    model: Annotated[
        str, typer.Option(help="Whose tokenizer counts; none: count words instead.")
    ] = "builtin",
    as_json: Json = False,
    html: Annotated[Path | None, typer.Option(help="Write a report page to this file.")] = None,
    write: Annotated[
        Path | None, typer.Option(help="Write the cleaned pairs to this .jsonl file.")
    ] = None,
    *,
    template: dict[str, Any],
) -> None:
    """Say what is wrong with which row, and what the set is like."""
    writable("--html", html)
    writable("--write", write, ".jsonl")
    from smoldpo.data.audit import CheckOptions, check_data
    from smoldpo.data.cleaning.cleaner import choose_rules

    off_names, on_names = names(off), names(on)
    choose_rules(off_names, on_names, near_identical=near_identical)
    from smoldpo.utils.progress import spinner

    with spinner("starting"):
        counter, tokens = _counter(model, max_length, template)
    rules = choose_rules(off_names, on_names, near_identical=near_identical, control_tokens=tokens)
    mapped = parse_columns(columns)
    options = CheckOptions(subset, split, eval_data, format, mapped, max_length, rules)
    with spinner(f"checking {data}"):
        report = check_data(data, options, counter)
    _save(report, html, write, mapped)
    if as_json:
        _print_json(report)
    else:
        from smoldpo.reports.data_audit import print_report

        print_report(report, _stdout())


@app.command()
@verb
@takes_template_options()
def show(
    data: Data,
    row: Annotated[int, typer.Option(min=1, help="Number of the row, from 1.")],
    model: Annotated[str, typer.Option(help="Whose tokenizer and chat template.")] = "builtin",
    max_length: MaxLength = 1024,
    subset: Subset = None,
    split: Annotated[str | None, typer.Option(help="By default train, or the only one.")] = None,
    format: Format = None,
    columns: Columns = None,
    as_json: Json = False,
    *,
    template: dict[str, Any],
) -> None:
    """Show one row as the model sees it: tokens, which are scored, what truncation cuts."""
    from smoldpo.utils.progress import spinner

    with spinner("starting"):
        from smoldpo.data.token_view import find_row, print_shown, show_pair
        from smoldpo.models.load import find_model, load_tokenizer

        tokenizer = load_tokenizer(find_model(model))
        how = _tokenization(tokenizer, max_length, template)
    mapped = parse_columns(columns)
    pairs, schema = find_row(data, row, subset=subset, split=split, format=format, columns=mapped)
    shown = [show_pair(pair, schema, tokenizer, how) for pair in pairs]
    if as_json:
        print(json.dumps(shown[0].as_dict() if len(shown) == 1 else [s.as_dict() for s in shown]))
        return
    console = _stdout()
    for number, pair in enumerate(shown, 1):
        if len(shown) > 1:
            console.print(f"pair {number} of {len(shown)} from this row")
        print_shown(pair, console)


@app.command()
@verb
def convert(
    data: Data,
    out: Annotated[Path, typer.Argument(help="A .jsonl, .json, .csv, .tsv or .parquet file.")],
    to: Annotated[
        str,
        typer.Option(help="conversational, text, implicit, transcripts, conversations or orca."),
    ] = "conversational",
    subset: Subset = None,
    split: Annotated[str | None, typer.Option(help="By default train, or the only one.")] = None,
    format: Format = None,
    columns: Columns = None,
) -> None:
    """Write the pairs of DATA to OUT in another schema. Nothing is cleaned.

    Columns of the pair's own numbers that --columns names (weight, margin, beta) go along, under
    these names.
    """
    from smoldpo.data.convert import convert as write_pairs
    from smoldpo.data.schemas import SplitReader
    from smoldpo.data.sources import open_source
    from smoldpo.utils.progress import say, spinner

    part = open_source(data, subset).split(split)
    mapped = parse_columns(columns)
    reader = SplitReader(part, format, mapped)
    with spinner(f"converting {data}"):
        converted = write_pairs(reader, out, to, own_numbers(mapped))
    say(
        f"{out}: {converted.rows:,} pairs as {to}, from {reader.rows_read:,} rows "
        f"in the {reader.format} format"
    )
    if converted.escaped:
        say(f"{converted.escaped:,} cells that a spreadsheet would run got a ' before them")
    for item in reader.findings[:10]:
        say(f"left out: {item.file}, row {item.row}: {item.detail} ({item.rule})")
    if len(reader.findings) > 10:
        say(f"left out: {len(reader.findings) - 10:,} more; smoldpo data check {data} lists them")


def _tokenization(tokenizer: Any, max_length: int, template: dict[str, Any]) -> Any:
    """How pairs become tokens; the tokenizer gets the template that was asked for."""
    from smoldpo.config.evaluate_options import evaluate_options
    from smoldpo.data.template_settings import replace_template, tokenization

    options = evaluate_options(template)
    replace_template(tokenizer, options.chat_template)
    return tokenization(max_length, vars(options))


def _counter(model: str, max_length: int, template: dict[str, Any]) -> tuple[Any, tuple[str, ...]]:
    """What counts, and the model's control tokens."""
    from smoldpo.data.length_stats import TokenCounter, WordCounter, control_tokens

    if model == "none":
        if template:
            given = ", ".join(f"--{name.replace('_', '-')}" for name in template)
            raise UsageError(f"{given}: --model none counts words and reads no chat template")
        return WordCounter(), ()
    from smoldpo.models.load import find_model, load_tokenizer

    tokenizer = load_tokenizer(find_model(model))
    how = _tokenization(tokenizer, max_length, template)
    return TokenCounter(tokenizer, how), control_tokens(tokenizer)


def _save(
    report: CheckReport, html: Path | None, write: Path | None, columns: dict[str, str] | None
) -> None:
    from smoldpo.utils.progress import say, spinner

    if html is not None:
        from smoldpo.reports.data_audit import html_report
        from smoldpo.utils.files import write_text

        write_text(html, html_report(report))
        say(f"report: {html}")
    if write is not None:
        from smoldpo.data.audit import kept_pairs
        from smoldpo.data.convert import convert as write_pairs

        with spinner(f"writing {write}"):
            written = write_pairs(kept_pairs(report), write, numbers=own_numbers(columns))
        say(f"{write}: {written.rows:,} cleaned pairs")


def _print_json(report: CheckReport) -> None:
    """One object; each finding in `touched` has a line of its own: there can be very many."""
    head = report.as_dict()
    sys.stdout.write(json.dumps(head, indent=2).removesuffix("\n}"))
    sys.stdout.write(',\n  "touched": [')
    for number, item in enumerate(report.findings):
        sys.stdout.write((",\n    " if number else "\n    ") + json.dumps(item.as_dict()))
    sys.stdout.write("\n  ]\n}\n")


def _stdout() -> Console:
    """Standard output; where it is no terminal, as wide as a table needs to be read."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def parse_columns(given: str | None) -> dict[str, str] | None:
    """prompt=question,chosen=better as a mapping."""
    if given is None:
        return None
    from smoldpo.config.field_types import split_columns

    columns: dict[str, str] = {}
    for part in split_columns(given):
        name, _, column = (piece.strip() for piece in part.partition("="))
        if not (name and column):
            raise UsageError(f"--columns {part!r}: write name=column, such as prompt=question")
        columns[name] = column
    return columns


def own_numbers(columns: dict[str, str] | None) -> list[str]:
    """Those of a pair's own numbers for which --columns names a column."""
    from smoldpo.data.schemas.fields import NUMBERS

    return [name for name in NUMBERS if name in (columns or {})]
