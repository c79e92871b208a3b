"""From a configuration to its forecast: a trial at a few depths, arithmetic for all of them."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from smoldpo.config.losses import needs_reference
from smoldpo.config.schema import TrainConfig
from smoldpo.plan.cost_model import Fixed, Pace, Rates, Times, forecast
from smoldpo.plan.memory import Need, Sizes, fitting, kept_row, need
from smoldpo.plan.trial import Trial
from smoldpo.plan.workload import Depth, Packing, Work, answers_work, load_at
from smoldpo.training.sampler import Schedule
from smoldpo.training.setup import preflight
from smoldpo.utils import progress
from smoldpo.utils.devices import pick_device
from smoldpo.utils.errors import UsageError
from smoldpo.utils.memory import trim_memory
from smoldpo.utils.text import parse_duration, words

CLOSING = 2.0
"""Seconds for statistics and the report, about; they are not measured here."""


@dataclass(frozen=True)
class Row:
    """The forecast at one depth."""

    depth: Depth
    times: Times
    need: Need
    disk: dict[str, float]
    budget: int | None
    """What goes through at once; None where not even one pair fits into memory."""
    free: float
    """Bytes of memory free before a model is loaded."""
    tried: bool
    """Whether the dry run was at this depth too; the others are modelled."""

    @property
    def fits(self) -> bool:
        """Into the memory that is free; the libraries are there already."""
        return (
            self.budget is not None and self.need.peak - self.need.parts["libraries"] <= self.free
        )


@dataclass(frozen=True)
class Plan:
    """The forecast of a run: `row` as it is configured, `rows` at every depth."""

    row: Row
    rows: list[Row]
    counts: dict[str, Any]
    rates: Rates
    pace: Pace
    """The machine's speed meanwhile."""
    notes: list[str]
    seconds: float
    """What planning itself took."""


def make_plan(config: TrainConfig, imports: float = 0.0) -> Plan:
    """Forecast a run by a timed dry run. Nothing is left behind: no run folder, nothing in the cache.

    Args:
        config: where freeze_layers is auto, `row` is that of the default depth.
        imports: seconds that the process took before this call, which the run will take too.

    Raises:
        UsageError: on a GPU, or with settings that cannot be forecast.
        SmoldpoError: as the run itself: whatever is wrong with settings, data, or model.
    """
    if pick_device(config.device) != "cpu":
        raise UsageError(
            "plan forecasts runs on a CPU only; give --device cpu, or time a few steps with --max-steps 20"
        )
    require_forecastable(config)
    preflight(config)
    begun = time.perf_counter()
    if config.freeze_layers == "auto":
        config = config.model_copy(update={"freeze_layers": None, "budget": None})
    trial = Trial(config, imports)
    trial.go()
    answers = answers_work(
        trial.ends.prompts, config.max_new_tokens, trial.data.eval, config.generate_prompts > 0
    )
    rows = [_row(trial, depth, answers) for depth in trial.depths]
    row = next(row for row in rows if row.depth.frozen == trial.models.frozen_layers)
    seconds = time.perf_counter() - begun
    notes = unforeseen(config)
    return Plan(row, rows, _counts(trial), trial.rates, trial.pace, notes, seconds)


def _row(trial: Trial, depth: Depth, answers: Work) -> Row:
    config, kept = trial.config, trial.kept[depth.frozen]
    sizes = replace(trial.sizes, states=kept.states_bytes if trial.where == "memory" else 0.0)
    # The frozen layers' weights go only where no step has to run them again.
    states_kept = trial.where != "off" and not kept.missing
    released = sizes.released + depth.released * states_kept
    fits = _packing(trial, depth, sizes, released)
    packing = fits or trial.packing
    load = load_at(config, depth, packing, trial.counts, kept, answers)
    saved, best = depth.checkpoint, config.load_best_model_at_end
    saves = (config.save_steps, config.save_minutes, best)
    compares = needs_reference(config.loss_type)
    evaluated = config.eval_steps if trial.data.eval else None
    times = forecast(trial.rates, load, depth, _fixed(trial), saved, *saves, compares, evaluated)
    store = load.states_bytes if trial.where == "disk" else 0.0
    keep = config.keep_checkpoints
    disk = disk_bytes(trial.models.saved_bytes, saved, times.checkpoints, keep, best, store)
    memory = need(sizes, trial.tried, depth, trial.counts.steps(packing).longest, released)
    tried = any(t.depth == depth for t in trial.tried)
    return Row(depth, times, memory, disk, fits and fits.budget, trial.free, tried)


def _packing(trial: Trial, depth: Depth, sizes: Sizes, released: float) -> Packing | None:
    """How the run will lay out its pairs at this depth, by the memory that it will find; None: not at all."""
    if trial.refused(depth):
        return None
    trainable = depth.trainable * sizes.master
    return fitting(
        trial.packing,
        trial.data.train,
        Schedule.of(trial.config, len(trial.data.train)).pairs_per_step,
        kept_row(trial.tried, depth),
        depth.step,
        trial.free
        - (sizes.weights - depth.unconverted - released)
        - sizes.states
        - trainable * sizes.masters_apart,
    )


def _fixed(trial: Trial) -> Fixed:
    disk, ends = trial.disk, trial.ends
    durable = disk.written + disk.synced + disk.hashed
    return Fixed(
        start=trial.start,
        saving=ends.loading + trial.models.saved_bytes * disk.written,
        answering=ends.answering,
        closing=CLOSING,
        checkpoint_byte=durable,
        store_byte=durable if trial.where == "disk" else 0.0,
    )


def _counts(trial: Trial) -> dict[str, Any]:
    """What the run goes through, at every depth alike."""
    train, models = trial.data.train, trial.models
    schedule = Schedule.of(trial.config, len(train))
    prompt = sum(len(pair.prompt_ids) for pair in train)
    scored = sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in train)
    return {
        "train_pairs": len(train),
        "eval_pairs": len(trial.data.eval),
        "steps": schedule.total_steps,
        "steps_per_epoch": schedule.steps_per_epoch,
        "pairs_per_step": schedule.pairs_per_step,
        "tokens": prompt + scored,
        "completion_tokens": scored,
        "parameters": models.bytes // trial.sizes.master,
        "engine": models.computing["engine"],
        "dtype": str(models.dtype).removeprefix("torch."),
        "free_bytes": trial.free,
    }


# `freeze_layers: auto`: the fewest frozen layers whose forecast fits the budget and the memory.


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
    trim_memory()
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


# Disk of a run, part by part.


def disk_bytes(
    model: float, checkpoint: float, saved: int, keep: int, best: bool, store: float
) -> dict[str, float]:
    """Bytes on disk when a run ends: its model, the checkpoints that stay, what is kept for later runs."""
    stay = min(saved, keep + best)
    return {"model": model, "checkpoints": stay * checkpoint, "store": store}


# What a forecast leaves out, in words, and what it refuses.


def require_forecastable(config: TrainConfig) -> None:
    """Refuse what the dry run would tell wrongly.

    Raises:
        UsageError: naming the setting, and what to do.
    """
    if config.sync_ref_model:
        # Its reference stays where it was during the few steps of a dry run, and costs nothing yet.
        raise UsageError(
            "plan cannot forecast a moving reference (sync_ref_model): leave it out, or time some steps of "
            "the run itself with --max-steps"
        )


def unforeseen(config: TrainConfig) -> list[str]:
    """What is not in the figures, or is there as its upper bound."""
    notes = []
    slow = [judge for judge in config.judges if judge != "length"]
    if slow and config.generate_prompts:
        notes.append(f"not counted: what these judges take: {', '.join(slow)}")
    if config.generate_prompts or config.sample_prompt:
        notes.append(
            f"answers are counted as if each had max_new_tokens ({config.max_new_tokens}) tokens"
        )
    if config.load_best_model_at_end:
        notes.append(
            "checkpoints are counted as if every evaluation were the best so far (load_best_model_at_end)"
        )
    if config.early_stopping_patience:
        notes.append("training may stop earlier (early_stopping_patience)")
    return notes
