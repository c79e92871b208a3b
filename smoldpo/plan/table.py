"""A forecast for people, and as JSON."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from smoldpo.utils.text import format_seconds

if TYPE_CHECKING:
    from smoldpo.plan.planner import DepthForecast, Plan


def as_dict(plan: Plan, chosen: DepthForecast | None = None) -> dict[str, Any]:
    """One JSON object: counts, the run as configured or chosen, every depth, the rates."""
    run = chosen or plan.run
    return {
        "counts": plan.counts,
        "run": _as_dict(run),
        "depths": [_as_dict(each) for each in plan.depths],
        "rates": vars(plan.rates),
        "pace": plan.speed.as_dict(),
        "notes": [*plan.notes, *plan.speed.remarks(run.times)],
        "planning_seconds": round(plan.seconds, 2),
    }


def _as_dict(each: DepthForecast) -> dict[str, Any]:
    return {
        "freeze_layers": each.depth.frozen,
        "layers": each.depth.layers,
        "trainable_parameters": each.depth.trainable,
        "seconds": round(each.times.total, 3),
        "phases": [{"name": p.name, "seconds": round(p.seconds, 3)} for p in each.times.phases],
        "peak_bytes": int(each.memory.peak),
        "memory": {part: int(size) for part, size in each.memory.parts.items()},
        "memory_by_phase": {phase: int(size) for phase, size in each.memory.phases.items()},
        "disk": {part: int(size) for part, size in each.disk.items()},
        "checkpoints_saved": each.times.checkpoints,
        "budget": each.budget,
        "fits": each.fits,
        "measured": each.measured,
        "bytes_sent_a_step": round(each.sent),
    }


def print_plan(plan: Plan, chosen: DepthForecast | None = None) -> None:
    """The run as configured or chosen, part by part, then one line for each depth."""
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    run, counts = chosen or plan.run, plan.counts
    depth, scored = run.depth, ""
    if counts["scored_tokens"] < counts["completion_tokens"]:
        scored = f" and {counts['scored_tokens']:,} of these scored"
    console.print(
        f"Trains {depth.trainable:,} of {counts['parameters']:,} parameters "
        f"({depth.trainable / counts['parameters']:.1%}): {depth.frozen} of {depth.layers} layers "
        f"frozen, engine {counts['engine']}, {counts['dtype']}"
    )
    console.print(
        f"{counts['train_pairs']:,} training pairs of {counts['tokens']:,} tokens, "
        f"{counts['completion_tokens']:,} of them in answers{scored}; "
        f"{counts['eval_pairs']:,} held out; "
        f"{counts['steps']:,} steps of {counts['pairs_per_step']} pairs"
    )
    console.print()
    for table in (_times(run), _memory(run), _disk(run), _depths(plan, run)):
        console.print(table)
    for note in [*plan.notes, *plan.speed.remarks(run.times)]:
        console.print(f"- {note}", markup=False)
    console.print(f"Planned in {format_seconds(plan.seconds)}.")


def _two_columns(title: str, name: str, value: str) -> Table:
    table = Table(title=title)
    table.add_column(name)
    table.add_column(value, justify="right")
    return table


def _times(run: DepthForecast) -> Table:
    table = _two_columns("Time", "phase", "forecast")
    epochs = [phase for phase in run.times.phases if phase.name.startswith("epoch ")]
    middle = epochs[1:-1] if len(epochs) > 4 else []  # these share a line
    for phase in run.times.phases:
        if phase not in middle:
            table.add_row(phase.name, format_seconds(phase.seconds))
        elif phase is middle[0]:
            mean = sum(each.seconds for each in middle) / len(middle)
            table.add_row(f"epochs 2 to {len(epochs) - 1}, each", format_seconds(mean))
    table.add_section()
    table.add_row("total", format_seconds(run.times.total))
    return table


def _memory(run: DepthForecast) -> Table:
    table = _two_columns("Memory while training", "part", "MB")
    for part, size in run.memory.parts.items():
        if size:
            table.add_row(part, _mb(size))
    table.add_section()
    highest = max(run.memory.phases, key=run.memory.phases.__getitem__)
    table.add_row("together", _mb(run.memory.phases["training"]))
    table.add_row(f"peak of the run ({highest})", _mb(run.memory.peak))
    table.add_row("free now", _mb(run.free))
    return table


def _disk(run: DepthForecast) -> Table:
    table = _two_columns("Disk", "part", "MB")
    saved = run.times.checkpoints
    table.add_row("run folder: the model", _mb(run.disk["model"]))
    checkpoints = f"run folder: checkpoints ({saved} saved on the way)"
    table.add_row(checkpoints, _mb(run.disk["checkpoints"]))
    table.add_row("cache: frozen layers' output", _mb(run.disk["store"]))
    return table


def _depths(plan: Plan, run: DepthForecast) -> Table:
    table = Table(title="Every freeze depth (*: measured there; the others are modelled)")
    for column in ("frozen", "trains", "once", "an epoch", "total", "peak MB", ""):
        table.add_column(column, justify="right")
    for each in plan.depths:
        seconds = {phase.name: phase.seconds for phase in each.times.phases}
        once = seconds.get("trunk and reference", seconds.get("trunk", 0.0))
        remark = "" if each.fits else "does not fit into memory"
        table.add_row(
            f"{each.depth.frozen}{'*' if each.measured else ''}",
            f"{each.depth.trainable / 1e6:,.1f} M",
            format_seconds(once),
            format_seconds(seconds["epoch 1"]),
            format_seconds(each.times.total),
            _mb(each.memory.peak),
            "this run" if each.fits and each.depth == run.depth else remark,
        )
    return table


def _mb(size: float) -> str:
    return f"{size / 1e6:,.1f}" if size < 1e7 else f"{size / 1e6:,.0f}"
