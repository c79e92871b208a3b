"""The sweep's report: one HTML file that runs no script and asks for nothing. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smoldpo.evaluation.metrics import METRICS
from smoldpo.files import write_text
from smoldpo.pages import render
from smoldpo.sweep import figures
from smoldpo.sweep.space import Space
from smoldpo.sweep.wording import value_in_words


def html_page(results: Mapping[str, Any], space: Space, sweep_yaml: str) -> str:
    """The page of what `results.collect` gives."""
    trials = results["trials"]
    ranked = sorted(trials, key=lambda trial: _rank(trial, results["winner"]))
    plots = []
    if results["done"]:
        plots = [
            figures.parallel_coordinates(results, space),
            figures.settings_map(results, space),
        ]
    return render(
        "sweep.html",
        results=results,
        trials=ranked,
        names=list(space),
        words=value_in_words,
        metric=METRICS[results["metric"]],
        plots=[plot for plot in plots if plot],
        final=results["final"],
        accuracy=results["final"]["accuracy"] if results["final"] else {},
        metric_names=METRICS,
        sweep_yaml=sweep_yaml,
    )


def write_page(folder: Path, results: Mapping[str, Any], space: Space) -> None:
    """Write report.html."""
    text = (folder / "sweep.yaml").read_text(encoding="utf-8")
    write_text(folder / "report.html", html_page(results, space, text))


def _rank(trial: Mapping[str, Any], winner: int | None) -> tuple[bool, bool, float, int]:
    """The winner first, then by accuracy; failed ones last."""
    accuracy = trial["accuracy"]
    return (
        accuracy is None,
        trial["number"] != winner,
        -accuracy["value"] if accuracy else 0.0,
        trial["number"],
    )
