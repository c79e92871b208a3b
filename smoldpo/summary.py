"""What a run or an evaluation says at its end, on standard output."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.table import Table

from smoldpo.cache import Entry
from smoldpo.evaluation.metrics import METRICS
from smoldpo.run import RunResult

TIES = "A tie counts one half: before training, policy and reference are equal."


def print_result(result: RunResult) -> None:
    """The table of accuracy before and after, a sample from both models, and where the run is."""
    console = Console(highlight=False)
    if result.evaluation is not None:
        console.print(_before_after(result.evaluation))
        if result.starts_equal:
            console.print(TIES, style="dim")
    if result.sample is not None:
        console.print(f"\n[bold]Prompt:[/bold] {_safe(result.sample['prompt'])}")
        for who in ("reference", "policy"):
            console.print(f"[bold]{who.capitalize()}:[/bold] {_safe(result.sample[who])}")
    console.print(f"\nRun folder: {_safe(str(result.folder))}", soft_wrap=True)


def _before_after(evaluation: dict[str, Any]) -> Table:
    table = Table(title=f"Preference accuracy on {evaluation['n']:,} held-out pairs")
    table.add_column("chosen preferred by")
    for column in ("before", "after", "change"):
        table.add_column(column, justify="right")
    for name, title in METRICS.items():
        before = evaluation["before"]["accuracy"][name]
        after = evaluation["after"]["accuracy"][name]
        change = f"{100 * (after - before):+.1f} points"
        table.add_row(title, f"{before:.1%}", f"{after:.1%}", change)
    return table


def print_evaluation(summary: dict[str, Any]) -> None:
    """The accuracies of one model."""
    table = Table(title=f"Preference accuracy on {summary['n']:,} pairs")
    table.add_column("chosen preferred by")
    table.add_column("accuracy", justify="right")
    for name, title in METRICS.items():
        value = summary["accuracy"][name]
        table.add_row(title, f"{value:.1%}" if value is not None else "needs --reference")
    Console(highlight=False).print(table)
    for rule, count in summary["dropped"].items():
        print(f"dropped: {count} {rule}")


def print_cache(kept: list[Entry], folder: str) -> None:
    """What is kept between runs."""
    if not kept:
        print(f"nothing is kept in {folder}")
        return
    table = Table(title=f"Kept in {_safe(folder)}")
    table.add_column("key", no_wrap=True)
    table.add_column("MB", justify="right", no_wrap=True)
    table.add_column("last used", no_wrap=True)
    table.add_column("what", overflow="fold")
    for entry in kept:
        about = [entry.about.get(key, "") for key in ("what", "model", "dtype")]
        table.add_row(
            entry.folder.name[:8],
            f"{entry.bytes / 1e6:,.1f}",
            time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used)),
            _safe(", ".join(str(part) for part in about if part) or entry.kind),
        )
    Console(highlight=False).print(table)
    print(f"{sum(entry.bytes for entry in kept) / 1e6:,.1f} MB in all")


def _safe(text: str) -> str:
    from rich.markup import escape

    return escape(text)
