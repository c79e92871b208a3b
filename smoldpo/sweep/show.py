"""What a sweep says at its end, on standard output."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from smoldpo.evaluation.metrics import METRICS
from smoldpo.pages import p_value, percent
from smoldpo.redact import redact
from smoldpo.sweep.conduct import SweepResult
from smoldpo.sweep.wording import value_in_words

STANDING = {"winner": "the winner", "as good": "as good", "worse": "worse"}


def print_sweep(result: SweepResult) -> None:
    """The answer, the table of trials, what it rests on, and where everything is."""
    console = Console(file=sys.stdout, highlight=False)
    results = result.results
    console.print(Text(redact(results["headline"]), style="bold"))
    console.print()
    console.print(_table(results))
    for line in results["explanations"]:
        console.print(Text(redact(line), style="dim"))
    console.print()
    console.print(Text(f"Sweep folder: {result.folder}"), soft_wrap=True)
    if results["winner"] is not None:
        console.print(Text(f"Best run:     {result.folder / 'best'}"), soft_wrap=True)
    console.print(Text(f"Report:       {result.folder / 'report.html'}"), soft_wrap=True)


def _table(results: dict[str, Any]) -> Table:
    metric = METRICS[results["metric"]]
    title = f"Accuracy by {metric} on {results['validation']['pairs']:,} validation pairs, with 95% intervals"
    table = Table(title=title)
    trials = results["trials"]
    names = list(trials[0]["settings"]) if trials else []
    table.add_column("trial", justify="right")
    for name in names:
        table.add_column(name)
    table.add_column("accuracy", justify="right", no_wrap=True)
    table.add_column("p, corrected", justify="right")
    table.add_column("beside the winner")
    for trial in trials:
        values = [Text(redact(value_in_words(trial["settings"][name]))) for name in names]
        table.add_row(str(trial["number"]), *values, *_figures(trial))
    return table


def _figures(trial: dict[str, Any]) -> tuple[str, str, str]:
    accuracy = trial["accuracy"]
    if not accuracy:
        return "–", "", "failed"
    said = percent(accuracy["value"])
    if accuracy["low"] is not None:
        said += f" [{100 * accuracy['low']:.1f}, {100 * accuracy['high']:.1f}]"
    standing = trial["standing"]
    p = "" if standing == "winner" else p_value(trial["p_corrected"])
    return Text(said), p, STANDING[standing]
