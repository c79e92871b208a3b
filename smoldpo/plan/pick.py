"""`freeze_layers: auto`: the fewest frozen layers whose forecast fits the budget and the memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from typing import Any

from smoldpo import progress
from smoldpo.config import TrainConfig
from smoldpo.durations import parse_duration, words
from smoldpo.engine.memory import give_back_freed_memory
from smoldpo.errors import UsageError
from smoldpo.plan.planner import Plan, Row, make_plan


def settle_depth(
    config: TrainConfig, started: float = 0.0
) -> tuple[TrainConfig, dict[str, Any] | None]:
    """The configuration with a number in place of auto, and how that was found, for the run's records.

    What planning took is part of the budget, and so are the seconds before, `started`.

    Raises:
        UsageError: no depth fits.
    """
    if config.freeze_layers != "auto":
        return config, None
    begun = time.perf_counter()
    plan = make_plan(config, started)
    gc.collect()
    give_back_freed_memory()
    spent = time.perf_counter() - begun
    assert config.budget is not None
    row = pick_and_say(plan, config.budget, spent)
    chosen = {
        "budget": config.budget,
        "freeze_layers": row.depth.frozen,
        "planning_seconds": round(spent, 1),
        "forecast_seconds": round(row.times.total, 1),
        "forecast_peak_bytes": int(row.need.peak),
    }
    settled = config.model_copy(update={"freeze_layers": row.depth.frozen, "budget": None})
    return settled, chosen


def pick_and_say(plan: Plan, budget: str, spent: float) -> Row:
    """What auto picks after so many seconds of planning; raises as `pick`."""
    row = pick(plan.rows, parse_duration(budget) - spent, budget, spent)
    progress.say(why(row, budget, spent))
    return row


def pick(rows: Sequence[Row], seconds: float, budget: str, spent: float = 0.0) -> Row:
    """The row with the fewest frozen layers that takes at most so many seconds, and fits into memory.

    Raises:
        UsageError: there is none; it names the shortest forecast.
    """
    there = [row for row in rows if row.fits]
    if not there:
        least = min(rows, key=lambda row: row.need.peak)
        raise UsageError(
            f"freeze_layers auto: no depth fits into memory: freezing {least.depth.frozen} layers needs "
            f"{least.need.peak:,.0f} bytes, {least.free:,.0f} are free; try a smaller max_length or model"
        )
    fitting = [row for row in there if row.times.total <= seconds]
    if not fitting:
        best = min(there, key=lambda row: row.times.total)
        planned = f" after {words(spent)} of planning" if spent else ""
        raise UsageError(
            f"freeze_layers auto: no depth fits the budget of {budget}: the shortest forecast is "
            f"{words(best.times.total)} with {best.depth.frozen} layers frozen{planned}; give a larger "
            "budget, fewer pairs (max_train_samples) or epochs, or a smaller max_length"
        )
    return min(fitting, key=lambda row: row.depth.frozen)


def why(row: Row, budget: str, spent: float = 0.0) -> str:
    """What was picked, in words."""
    planned = f" and {words(spent)} went into planning" if spent else ""
    return (
        f"freeze_layers auto: {row.depth.frozen} of {row.depth.layers} layers frozen, the fewest that fit "
        f"{budget}: the run is forecast to take {words(row.times.total)}{planned}, with "
        f"{row.depth.trainable:,} parameters that train and {row.need.peak / 1e9:.1f} GB at its peak"
    )
