"""A forecast for people, and as JSON."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from smoldpo.utils.text import words

if TYPE_CHECKING:
    from smoldpo.plan.planner import Plan, Row


def as_dict(plan: Plan, picked: Row | None = None) -> dict[str, Any]:
    """One JSON object: counts, the run as configured, every depth, the rates."""
    return {
        "counts": plan.counts,
        "run": _row(picked or plan.row),
        "depths": [_row(row) for row in plan.rows],
        "rates": vars(plan.rates),
        "pace": plan.pace.as_dict(),
        "notes": _notes(plan, picked or plan.row),
        "planning_seconds": round(plan.seconds, 2),
    }


def _notes(plan: Plan, row: Row) -> list[str]:
    return [*plan.notes, *plan.pace.remarks(row.times)]


def _row(row: Row) -> dict[str, Any]:
    return {
        "freeze_layers": row.depth.frozen,
        "layers": row.depth.layers,
        "trainable_parameters": row.depth.trainable,
        "seconds": round(row.times.total, 3),
        "phases": [{"name": p.name, "seconds": round(p.seconds, 3)} for p in row.times.phases],
        "peak_bytes": int(row.need.peak),
        "memory": {part: int(size) for part, size in row.need.parts.items()},
        "memory_by_phase": {phase: int(size) for phase, size in row.need.phases.items()},
        "disk": {part: int(size) for part, size in row.disk.items()},
        "checkpoints_saved": row.times.checkpoints,
        "budget": row.budget,
        "fits": row.fits,
        "measured": row.tried,
    }


def print_plan(plan: Plan, picked: Row | None = None) -> None:
    """The run as configured, part by part, then one line a depth."""
    width = None if sys.stdout.isatty() else 100
    console = Console(width=width, highlight=False)
    row, counts = picked or plan.row, plan.counts
    share = row.depth.trainable / counts["parameters"]
    console.print(
        f"Trains {row.depth.trainable:,} of {counts['parameters']:,} parameters ({share:.1%}): "
        f"{row.depth.frozen} of {row.depth.layers} layers frozen, engine {counts['engine']}, "
        f"{counts['dtype']}"
    )
    console.print(
        f"{counts['train_pairs']:,} training pairs of {counts['tokens']:,} tokens, "
        f"{counts['completion_tokens']:,} of them in answers; {counts['eval_pairs']:,} held out; "
        f"{counts['steps']:,} steps of {counts['pairs_per_step']} pairs"
    )
    console.print()
    console.print(_times(row))
    console.print(_memory(row))
    console.print(_disk(row))
    console.print(_depths(plan, row))
    for note in _notes(plan, row):
        console.print(f"- {note}", markup=False)
    console.print(f"Planned in {words(plan.seconds)}.")


def _times(row: Row) -> Table:
    table = Table(title="Time")
    table.add_column("phase")
    table.add_column("forecast", justify="right")
    epochs = [phase for phase in row.times.phases if phase.name.startswith("epoch ")]
    alike = len(epochs) > 4
    for phase in row.times.phases:
        if not (alike and phase in epochs[1:-1]):
            table.add_row(phase.name, words(phase.seconds))
        elif phase is epochs[1]:
            middle = epochs[1:-1]
            mean = sum(p.seconds for p in middle) / len(middle)
            table.add_row(f"epochs 2 to {len(epochs) - 1}, each", words(mean))
    table.add_section()
    table.add_row("total", words(row.times.total))
    return table


def _memory(row: Row) -> Table:
    highest = max(row.need.phases, key=row.need.phases.__getitem__)
    table = Table(title="Memory while training")
    table.add_column("part")
    table.add_column("MB", justify="right")
    for part, size in row.need.parts.items():
        if size:
            table.add_row(part, _mb(size))
    table.add_section()
    table.add_row("together", _mb(row.need.phases["training"]))
    table.add_row(f"peak of the run ({highest})", _mb(row.need.peak))
    table.add_row("free now", _mb(row.free))
    return table


def _disk(row: Row) -> Table:
    table = Table(title="Disk")
    table.add_column("part")
    table.add_column("MB", justify="right")
    names = {
        "model": "run folder: the model",
        "checkpoints": f"run folder: checkpoints ({row.times.checkpoints} saved on the way)",
        "store": "cache: frozen layers' output",
    }
    for part, size in row.disk.items():
        table.add_row(names[part], _mb(size))
    return table


def _depths(plan: Plan, chosen: Row) -> Table:
    table = Table(title="Every freeze depth (*: measured there; the others are modelled)")
    for column in ("frozen", "trains", "once", "an epoch", "total", "peak MB", ""):
        table.add_column(column, justify="right")
    for row in plan.rows:
        seconds = {phase.name: phase.seconds for phase in row.times.phases}
        once = seconds.get("trunk and reference", seconds.get("trunk", 0.0))
        remark = "" if row.fits else "does not fit into memory"
        remark = "this run" if row.depth == chosen.depth and row.fits else remark
        table.add_row(
            f"{row.depth.frozen}{'*' if row.tried else ''}",
            f"{row.depth.trainable / 1e6:,.1f} M",
            words(once),
            words(seconds["epoch 1"]),
            words(row.times.total),
            _mb(row.need.peak),
            remark,
        )
    return table


def _mb(size: float) -> str:
    return f"{size / 1e6:,.1f}" if size < 1e7 else f"{size / 1e6:,.0f}"
