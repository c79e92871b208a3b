"""From a configuration to its forecast: a trial at a few depths, arithmetic for all of them."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

from smoldpo.config import TrainConfig
from smoldpo.engine.precision import pick_device
from smoldpo.errors import UsageError
from smoldpo.loss_facts import needs_reference
from smoldpo.plan.counting import Packing
from smoldpo.plan.disk import disk_bytes
from smoldpo.plan.fitting import fitting
from smoldpo.plan.forecast import Depth, Fixed, Times, forecast
from smoldpo.plan.loads import answers_work, load_at
from smoldpo.plan.memory import Need, Sizes, kept_row, need
from smoldpo.plan.pace import Pace
from smoldpo.plan.rates import Rates
from smoldpo.plan.trial import Trial
from smoldpo.plan.unforeseen import require_forecastable, unforeseen
from smoldpo.plan.work import Work
from smoldpo.preflight import preflight
from smoldpo.trainer import Schedule

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
        "engine": models.decided["engine"],
        "dtype": str(models.dtype).removeprefix("torch."),
        "free_bytes": trial.free,
    }
