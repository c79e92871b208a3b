"""A CheckReport for people: as a table on a terminal, and as one self-contained HTML page.

The page runs no script and asks for nothing: plots are SVG inside it, every text is escaped.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from smoldpo.data.account import Finding
from smoldpo.data.audit import CheckReport
from smoldpo.data.cleaning.cleaner import RULES
from smoldpo.data.length_stats import SIDES
from smoldpo.reports.plots import BLUE, GREY, INK, ORANGE, svg
from smoldpo.reports.templating import render

MAX_EXAMPLES = 5
"""Rows of each rule that the page shows."""


def print_report(report: CheckReport, console: Console) -> None:
    """Write the account of the rows, then the set in numbers."""
    for part in report.parts:
        name = f"{report.data} ({part.split.name})" if len(report.parts) > 1 else report.data
        console.print(
            f"{name}: {part.format} format, {part.rows_read:,} rows read, {part.rows_kept:,} kept",
            markup=False,
        )
        for line in part.losses:
            console.print(f"  {line}", markup=False)
    if report.evaluation:
        sources = ", ".join(report.evaluation["sources"])
        console.print(f"evaluation prompts: {sources}", markup=False)
    console.print()
    if report.findings:
        console.print(_rule_table(report))
    else:
        console.print("no rule touched a row")
    console.print()
    for line in summary_lines(report):
        console.print(line, markup=False)


def _rule_table(report: CheckReport) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("rule", no_wrap=True)
    table.add_column("rows", justify="right", no_wrap=True)
    table.add_column("action", no_wrap=True)
    table.add_column("an example", overflow="fold")
    for rule, action, rows, example in report.by_rule():
        table.add_row(rule, f"{rows:,}", action, _plain(_in_words(example)))
    return table


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(text)


def _in_words(item: Finding) -> str:
    after = "" if item.after is None else f"  →  {item.after}"
    return f"row {item.row}: {item.detail}" + (f": {item.before}{after}" if item.before else "")


def summary_lines(report: CheckReport) -> list[str]:
    """The statistics, one fact a line."""
    numbers, unit = report.statistics, report.statistics["unit"]
    if not numbers["pairs"]:
        return ["no pair is left"]
    lines = [f"{'length in ' + unit:<18}{'median':>9}{'90%':>9}{'99%':>9}{'longest':>9}"]
    for side in SIDES:
        row = numbers["lengths"][side]
        values = (row["median"], row["p90"], row["p99"], row["max"])
        lines.append(f"  {side:<16}" + "".join(f"{value:>9,.0f}" for value in values))
    return [*lines, "", *facts(report)]


def facts(report: CheckReport) -> list[str]:
    """The set in sentences."""
    numbers = report.statistics
    cut, length, words = numbers["truncation"], numbers["length_baseline"], numbers["vocabulary"]
    what = f"prompt {cut['prompts']:,}, chosen {cut['chosen']:,}, rejected {cut['rejected']:,}"
    lines = [
        f"{numbers['pairs']:,} pairs over {numbers['distinct_prompts']:,} distinct prompts",
        f"truncated at max_length {cut['max_length']:,} {numbers['unit']}: {cut['share']:.1%} of "
        f"the pairs ({cut['pairs']:,}: {what})",
        f"chosen is the longer one in {length['chosen_longer']:.1%} of the pairs (in characters); "
        f"picking the longer would be right in {length['accuracy_of_picking_the_longer']:.1%}",
        f"vocabulary: {words['chosen_words']:,} words in chosen, {words['rejected_words']:,} in "
        f"rejected, {words['overlap']:.1%} of all in both",
    ]
    if numbers["pairs_counted"] < numbers["pairs"]:
        lines.append(
            f"lengths and vocabulary: of an even sample of {numbers['pairs_counted']:,} pairs; "
            f"every pair that could exceed max_length was counted as well"
        )
    if numbers["unit"] == "words":
        lines.append("words were counted, not tokens: more pairs will be truncated than said here")
    return lines


def html_report(report: CheckReport) -> str:
    """The page."""
    rules = [
        {
            "name": rule,
            "action": action,
            "rows": rows,
            "about": RULES[rule].about if rule in RULES else "the row holds no pair",
            "worst": [item for item in report.findings if item.rule == rule][:MAX_EXAMPLES],
        }
        for rule, action, rows, _ in report.by_rule()
    ]
    return render(
        "data_check.html",
        report=report,
        numbers=report.statistics,
        rules=rules,
        facts=facts(report) if report.statistics["pairs"] else ["no pair is left"],
        several_files=len({item.file for item in report.findings}) > 1,
        sides=SIDES,
        plots=_plots(report) if len(report.lengths) else [],
    )


def _plots(report: CheckReport) -> list[dict[str, str]]:
    drawn = {
        f"Lengths in {report.statistics['unit']}": _draw_lengths,
        "Is the chosen answer the longer one?": _draw_difference,
        "What each max_length would cut": _draw_truncation,
    }
    return [
        {"title": title, "svg": svg(partial(draw, report=report), title)}
        for title, draw in drawn.items()
    ]


COLOURS = {"prompt": GREY, "chosen": BLUE, "rejected": ORANGE}


def _draw_lengths(axes: Any, report: CheckReport) -> None:
    edges = np.linspace(0, max(1, np.percentile(report.lengths, 99.5)), 41)
    for number, side in enumerate(SIDES):
        values = report.lengths[:, number].clip(max=edges[-1])
        axes.hist(values, edges, histtype="step", linewidth=1.8, color=COLOURS[side], label=side)
    axes.set_xlabel(f"{report.statistics['unit']} (last bar: this or longer)")
    axes.set_ylabel("pairs")
    axes.legend()


def _draw_difference(axes: Any, report: CheckReport) -> None:
    difference = report.lengths[:, 1] - report.lengths[:, 2]
    reach = max(1, np.percentile(abs(difference), 99))
    axes.hist(difference.clip(-reach, reach), np.linspace(-reach, reach, 42), color=BLUE)
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_xlabel(f"chosen minus rejected, {report.statistics['unit']}")
    axes.set_ylabel("pairs")


def _draw_truncation(axes: Any, report: CheckReport) -> None:
    needed = np.sort(report.lengths[:, 0] + report.lengths[:, 1:].max(axis=1))
    share = 100 * (1 - np.arange(1, len(needed) + 1) / len(needed))
    limit = report.options.max_length
    axes.step(needed, share, where="post", color=BLUE, linewidth=1.8)
    axes.axvline(limit, color=INK, linewidth=1, linestyle="--", label=f"max_length {limit}")
    axes.set_xlim(0, max(1.15 * limit, np.percentile(needed, 99.5)))
    axes.set_ylim(0, 100)
    axes.set_xlabel(f"max_length, {report.statistics['unit']}")
    axes.set_ylabel("pairs cut, %")
    axes.legend()
