"""`smoldpo plan` held against the run that it forecasts: seconds of each phase, and peak memory."""

from __future__ import annotations

from typing import Any

from dpo_bench.running import Finished

EPOCHS = "training"
ANSWERS = "answers of both models"


def forecast_lines(
    name: str, planned: tuple[Finished, dict[str, Any]], timings: dict[str, Any], run: Finished
) -> list[str]:
    """A table of one workload, as Markdown."""
    process, plan = planned
    row = plan["run"]
    expected = {EPOCHS: 0.0}
    for phase in row["phases"]:
        title = EPOCHS if phase["name"].startswith("epoch ") else phase["name"]
        expected[title] = expected.get(title, 0.0) + phase["seconds"]
    lines = [
        f"\n{name}, planned in {process.seconds:.1f} s:\n",
        "| | forecast | run | forecast / run |",
        "|---|--:|--:|--:|",
    ]
    for title, there in timings.items():
        known = ANSWERS if title.startswith("reference and policy") else title
        if known in expected:
            lines.append(_line(f"{title}, s", expected[known], there["seconds"]))
    lines.append(_line("**whole, s**", row["seconds"], run.seconds))
    lines.append(_line("**peak memory, MB**", row["peak_bytes"] / 1e6, run.peak / 1e6))
    phases = ", ".join(f"{k} {v / 1e6:,.0f}" for k, v in row["memory_by_phase"].items())
    peaks = ", ".join(f"{title} {there['peak_mb']:,.0f}" for title, there in timings.items())
    pace = plan["pace"]
    speed = f"{pace['gflops']:,.0f} GFLOP/s, {pace['slowest']:,.0f} to {pace['fastest']:,.0f}"
    return [
        *lines,
        "",
        f"Products while planning: {speed}. Forecast peaks, MB: {phases}. Peaks up to the end of "
        f"each phase: {peaks}.",
    ]


def _line(title: str, forecast: float, run: float) -> str:
    ratio = f"{forecast / run:.2f}" if run else "–"
    return f"| {title} | {forecast:,.1f} | {run:,.1f} | {ratio} |"
