"""What a run or an evaluation says at its end, on standard output."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.markup import escape as _safe
from rich.table import Table
from rich.text import Text

from smoldpo.engine.cache.folder import Entry
from smoldpo.evaluation.metrics import METRICS
from smoldpo.evaluation.schema import Estimate, Evaluation, ModelEvaluation, all_alarms
from smoldpo.sweep.space import value_text
from smoldpo.utils.text import p_value, redact

if TYPE_CHECKING:
    from pathlib import Path

    from smoldpo.config.importers import Imported
    from smoldpo.evaluation.evaluate import EvaluationResult
    from smoldpo.sweep.results import RankedTrial, SweepResults
    from smoldpo.sweep.run import SweepResult
    from smoldpo.training.run import RunResult


def print_result(result: RunResult) -> None:
    """What a run found: the answer, the table, a sample from both models, and where the run is."""
    console = _console()
    if result.record is not None:
        print_comparison(result.record, console)
    if result.sample is not None:
        console.print()
        console.print(f"[bold]Prompt:[/bold] {_safe(result.sample['prompt'])}")
        for who in ("reference", "policy"):
            console.print(f"[bold]{who.capitalize()}:[/bold] {_safe(result.sample[who])}")
    console.print()
    console.print(f"Run folder: {_safe(str(result.folder))}", soft_wrap=True)
    if result.report is not None:
        console.print(f"Report:     {_safe(str(result.report))}", soft_wrap=True)


def print_comparison(evaluation: Evaluation, console: Console | None = None) -> None:
    """The answer in one sentence, the table of before and after, notes, and any alarm."""
    console = console or _console()
    console.print(f"[bold]{_safe(evaluation.headline)}[/bold]")
    console.print()
    console.print(_before_after(evaluation))
    lines = [_corrected(evaluation), *evaluation.explanations, *_answers_line(evaluation)]
    for line in lines:
        console.print(_safe(line), style="dim")
    _print_alarms(evaluation, console)


def _print_alarms(evaluation: Evaluation | ModelEvaluation, console: Console) -> None:
    for alarm in all_alarms(evaluation):
        console.print()
        console.print(f"[bold red]Alarm:[/bold red] {_safe(alarm.text)}")
        console.print("What helps:")
        for advice in alarm.advice:
            console.print(f"  - {_safe(advice)}")


def _before_after(evaluation: Evaluation) -> Table:
    names = evaluation.names
    table = Table(
        title=f"Preference accuracy on {evaluation.n:,} pairs, "
        f"with {evaluation.level:.0%} intervals"
    )
    table.add_column("chosen preferred by")
    for column in (names.before, names.after, "change", "p"):
        table.add_column(_safe(column), justify="right")
    for name, row in evaluation.accuracy.items():
        if row is not None:
            table.add_row(
                METRICS[name],
                _safe(_with_interval(row.before)),
                _safe(_with_interval(row.after)),
                _safe(_with_interval(row.change, sign="+", unit="")),
                p_value(row.p_corrected),
            )
    return table


def _corrected(evaluation: Evaluation) -> str:
    count = evaluation.comparisons
    made = "1 comparison was" if count == 1 else f"{count} comparisons were"
    return f"{made} made; p is corrected for that ({evaluation.correction})."


def _with_interval(estimate: Estimate, sign: str = "", unit: str = "%") -> str:
    low, high = estimate.low, estimate.high
    text = f"{100 * estimate.value:{sign}.1f}{unit}"
    return (
        text
        if low is None or high is None
        else (f"{text} [{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]")
    )


def _answers_line(evaluation: Evaluation | ModelEvaluation) -> list[str]:
    """Answers of both models, in one line; none where there are no answers."""
    generation = evaluation.generation
    if generation is None:
        return []
    before, after = generation.reference, generation.policy
    other, against = "reference", "the reference"
    if isinstance(evaluation, Evaluation) and evaluation.kind == "compare":
        other = against = evaluation.names.before
    line = (
        f"Answers to {generation.prompts} prompts: {after.tokens:.0f} tokens on average "
        f"({other} {before.tokens:.0f}), {after.ended:.0%} ended by themselves ({before.ended:.0%})"
    )
    if generation.kl_per_token:
        line += f"; KL to {against} {generation.kl_per_token.value:.3f} nats a token"
    for judge in evaluation.judges:
        rate = judge.win_rate.value
        line += f"; judge {judge.judge}: policy wins {rate:.0%}" if rate is not None else ""
    return [line + "."]


def print_evaluation(result: EvaluationResult) -> None:
    """One model's accuracies, or two models compared."""
    if isinstance(result.record, Evaluation):
        print_comparison(result.record)
    else:
        _print_one(result.record)
    for rule, count in result.data.account.dropped.items():
        print(f"dropped: {count} {rule}")


def _print_one(evaluation: ModelEvaluation) -> None:
    table = Table(title=f"Preference accuracy on {evaluation.n:,} pairs")
    table.add_column("chosen preferred by")
    table.add_column("accuracy", justify="right")
    table.add_column(f"{evaluation.level:.0%} interval", justify="right")
    for name, title in METRICS.items():
        estimate = evaluation.intervals[name]
        if estimate is None:
            table.add_row(title, "needs --reference", "")
            continue
        low, high = estimate.low, estimate.high
        interval = "every pair ties" if low is None else f"{low:.1%} to {high:.1%}"
        table.add_row(title, f"{estimate.value:.1%}", interval)
    console = _console()
    console.print(table)
    longer = evaluation.baselines["longer"]
    console.print(
        f"Picking the longer answer (in tokens) would be right in {longer:.1%}.", style="dim"
    )
    for line in _answers_line(evaluation):
        console.print(_safe(line), style="dim")
    _print_alarms(evaluation, console)


def print_cache(entries: list[Entry], folder: str) -> None:
    """What is kept between runs."""
    if not entries:
        print(f"nothing is kept in {folder}")
        return
    table = Table(title=f"Kept in {_safe(folder)}")
    table.add_column("key", no_wrap=True)
    table.add_column("MB", justify="right", no_wrap=True)
    table.add_column("last used", no_wrap=True)
    table.add_column("what", overflow="fold")
    for entry in entries:
        about = [entry.about.get(key, "") for key in ("what", "model", "dtype")]
        table.add_row(
            entry.folder.name[:8],
            f"{entry.bytes / 1e6:,.1f}",
            time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used)),
            _safe(", ".join(str(part) for part in about if part) or entry.kind),
        )
    Console(highlight=False).print(table)
    print(f"{sum(entry.bytes for entry in entries) / 1e6:,.1f} MB in all")


def print_imported(imported: Imported, out: Path | None) -> None:
    """What became of each key of a recipe; the configuration itself where no file holds it.

    It goes to standard output then, and the account to standard error: `> mine.yaml` works.
    """
    from smoldpo.config.importers import one_line

    console = _console(sys.stdout if out is not None else sys.stderr)
    table = Table(
        title=f"{_safe(one_line(imported.source))}, a recipe for {_safe(imported.dialect)}"
    )
    table.add_column("key", overflow="fold", max_width=34)
    table.add_column("value", overflow="fold", max_width=24)
    table.add_column("", no_wrap=True)
    table.add_column("becomes", overflow="fold")
    for entry in imported.entries:
        becomes = ", ".join(f"{name}: {_listed(value)}" for name, value in entry.becomes.items())
        text = " - ".join(part for part in (becomes, entry.reason) if part)
        style = STATUS_STYLES.get(entry.status)
        cells = (_safe(one_line(cell)) for cell in (entry.key, entry.value, entry.status, text))
        table.add_row(*cells, style=style)
    console.print(table)
    console.print(", ".join(f"{count} {status}" for status, count in imported.counts.items()))
    if imported.commands:
        console.print("\n[bold]Run first:[/bold]")
    for line in imported.commands:  # whole, to be copied
        console.print(_safe(one_line(f"  {line}")), soft_wrap=True)
    if imported.differences:
        console.print("\n[bold]What differs from the recipe's run:[/bold]")
    for line in imported.differences:
        console.print(_safe(one_line(f"- {line}")))
    if out is None:
        print(imported.as_yaml(), end="")
    else:
        console.print(f"\n{_safe(str(out))}: smoldpo train {_safe(str(out))}")


STATUS_STYLES = {"unsupported": "yellow", "dropped": "dim", "default": "cyan"}


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _console(stream: TextIO | None = None) -> Console:
    """Standard output, or `stream`; as wide as a table needs where it is no terminal."""
    stream = stream or sys.stdout
    return Console(highlight=False, width=None if stream.isatty() else 110, file=stream)


def print_sweep(result: SweepResult) -> None:
    """The answer, the table of trials, what it rests on, and where everything is."""
    console = Console(file=sys.stdout, highlight=False)
    results = result.results
    console.print(Text(redact(results.headline), style="bold"))
    console.print()
    console.print(_trials_table(results))
    for line in results.explanations:
        console.print(Text(redact(line), style="dim"))
    console.print()
    console.print(Text(f"Sweep folder: {result.folder}"), soft_wrap=True)
    if results.winner is not None:
        console.print(Text(f"Best run:     {result.folder / 'best'}"), soft_wrap=True)
    console.print(Text(f"Report:       {result.folder / 'report.html'}"), soft_wrap=True)


def _trials_table(results: SweepResults) -> Table:
    metric = METRICS[results.metric]
    title = (
        f"Accuracy by {metric} on {results.validation.pairs:,} validation pairs, with 95% intervals"
    )
    table = Table(title=title)
    table.add_column("trial", justify="right")
    for name in results.names:
        table.add_column(name)
    table.add_column("accuracy", justify="right", no_wrap=True)
    table.add_column("p, corrected", justify="right")
    table.add_column("beside the winner")
    for trial in results.trials:
        values = [Text(redact(value_text(trial.settings[name]))) for name in results.names]
        table.add_row(str(trial.number), *values, *_trial_cells(trial))
    return table


def _trial_cells(trial: RankedTrial) -> tuple[Text | str, str, str]:
    accuracy, standing = trial.accuracy, trial.standing
    if accuracy is None or standing is None:
        return "–", "", "failed"
    if standing == "winner":
        return Text(_with_interval(accuracy)), "", "the winner"
    return Text(_with_interval(accuracy)), p_value(trial.p_corrected), standing
