"""From a configuration to its forecast: a trial at a few freeze depths, arithmetic for all."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from smoldpo.config.schema import TrainConfig
from smoldpo.engine.autotune import dtype_name
from smoldpo.engine.batch_budget import RESERVE, batches_at_once, fitting_batching
from smoldpo.engine.batching import OpCounts
from smoldpo.plan.cost_model import FixedCosts, MachineSpeed, Rates, Times, forecast
from smoldpo.plan.depths import FreezeDepth
from smoldpo.plan.memory import MemoryForecast, forecast_memory, row_bytes
from smoldpo.plan.ranks import PlannedRanks
from smoldpo.plan.trial import Trial
from smoldpo.plan.workload import count_answers
from smoldpo.training.sampler import Schedule
from smoldpo.training.setup import preflight
from smoldpo.utils import progress
from smoldpo.utils.devices import pick_device
from smoldpo.utils.distributed import require_one_rank
from smoldpo.utils.errors import UsageError
from smoldpo.utils.memory import trim_memory
from smoldpo.utils.text import format_seconds, parse_duration
from smoldpo.utils.threads import computing

CLOSING_SECONDS = 2.0
"""Of statistics and the report, about; they are not measured here."""


@dataclass(frozen=True)
class DepthForecast:
    """The forecast at one depth."""

    depth: FreezeDepth
    times: Times
    memory: MemoryForecast
    disk: dict[str, float]  # Bytes, by part, when the run ends
    budget: int | None
    """Tokens, or pairs of the plain engine, at once; None where not even one pair fits."""
    free: float  # Bytes of memory free before a model is loaded
    measured: bool  # Whether there was a dry run at this depth; the others are modelled
    sent: float = 0.0  # Bytes that one of several ranks sends in a step

    @property
    def fits(self) -> bool:
        """Whether the run fits into the free memory; the libraries are loaded already."""
        needed = self.memory.peak - self.memory.parts["libraries"]
        return self.budget is not None and needed <= self.free


@dataclass(frozen=True)
class Plan:
    """The forecast of a run: `run` as it is configured, `depths` at every depth."""

    run: DepthForecast
    depths: list[DepthForecast]
    counts: dict[str, Any]
    rates: Rates
    speed: MachineSpeed  # The machine's while planning
    notes: list[str]
    seconds: float  # What planning itself took


def make_plan(config: TrainConfig, imports: float = 0.0, ranks: PlannedRanks | None = None) -> Plan:
    """Forecast a run by a timed dry run, of which nothing stays on disk.

    Args:
        ranks: on which the run will be; by default on one.
        config: where freeze_layers is auto, `run` is that of the default depth.
        imports: seconds that the process took before this call, which the run will take too.

    Raises:
        UsageError: on a GPU, or with a moving reference, which a dry run would forecast wrongly.
        SmoldpoError: as the run itself, for settings, data or a model that will not do.
    """
    if pick_device(config.device) != "cpu":
        raise UsageError(
            "plan forecasts runs on a CPU only; give --device cpu, or time a few steps with "
            "--max-steps 20"
        )
    if config.sync_ref_model:  # it would not have moved yet in a dry run, and cost nothing
        raise UsageError(
            "plan cannot forecast a moving reference (sync_ref_model): leave it out, or time some "
            "steps of the run itself with --max-steps"
        )
    preflight(config)
    begun = time.perf_counter()
    if config.freeze_layers == "auto":
        config = config.model_copy(update={"freeze_layers": None, "budget": None})
    with computing(config.threads, config.nice):
        trial = Trial(config, imports)
        trial.run()
    notable = trial.data.eval if config.generate_prompts else []
    prompts = trial.run_end.prompts
    answers = count_answers(prompts, config.max_new_tokens, notable, trial.workers)
    ranks = ranks or PlannedRanks()
    depths = [_forecast(trial, depth, answers, ranks) for depth in trial.depths]
    run = next(each for each in depths if each.depth.frozen == trial.models.trainable.frozen_layers)
    seconds = time.perf_counter() - begun
    notes = notes_on(config) + _notes_on_ranks(ranks, run)
    counts = _counts(trial) | {"ranks": ranks.count}
    return Plan(run, depths, counts, trial.rates, trial.speed, notes, seconds)


def _notes_on_ranks(ranks: PlannedRanks, run: DepthForecast) -> list[str]:
    if ranks.count == 1:
        return []
    return [
        f"on {ranks.count} ranks, each like this process: a rank sends {run.sent / 1e6:,.1f} MB a "
        f"step, which takes {format_seconds(run.sent / ranks.bandwidth)} of it at "
        f"{ranks.bandwidth * 8 / 1e9:g} Gbit/s; memory is that of one rank (docs/scale.md)"
    ]


def _forecast(
    trial: Trial, depth: FreezeDepth, answers: OpCounts, ranks: PlannedRanks
) -> DepthForecast:
    config, misses, sizes = trial.config, trial.misses[depth.frozen], trial.sizes
    if trial.cached_in == "memory":
        sizes = replace(sizes, states=misses.states_bytes)
    # The frozen layers' weights are released only where no step has to run them again.
    states_cached = trial.cached_in != "off" and not misses.without_room
    released = sizes.released + depth.released_bytes * states_cached
    masters = depth.trainable * sizes.master * sizes.separate_masters
    weights = sizes.weights - depth.unconverted_bytes - released
    fitting, workers = None, trial.workers
    if not trial.refused(depth):  # laid out as the run will, by the memory that it will find
        train, batching = trial.data.train, trial.batching
        longest = batching.saved_rows([batching.longest(train)])
        told = (
            batching,
            round(longest * row_bytes(trial.observed, depth)),
            train,
            Schedule.of(config, len(train)).pairs_per_step,
            trial.free - weights - sizes.states - masters - depth.step_bytes - RESERVE,
        )
        fitting, workers = fitting_batching(*told), batches_at_once(*told, workers)
    batching = fitting or trial.batching
    at_once = ranks.streams_at_once(config, workers)
    load = trial.counter.workload(depth, batching, misses, answers, at_once)
    written = trial.disk.written + trial.disk.synced + trial.disk.hashed
    on_disk = trial.cached_in == "disk"
    costs = FixedCosts(
        start=trial.start,
        saving=trial.run_end.loading + trial.models.trainable.saved_bytes * trial.disk.written,
        answering=trial.run_end.answering,
        closing=CLOSING_SECONDS,
        checkpoint_byte=written,
        store_byte=written if on_disk else 0.0,
    )
    times = forecast(trial.rates, load, depth, costs, config)
    sent, rounds = [0.0], [c.batches / n for c, n in zip(load.epochs, load.steps, strict=True)]
    if ranks.count > 1:
        numbers = depth.trainable, trial.models.trainable.policy_bytes // sizes.master
        items = sizes.master, sizes.compute_item
        sent = [ranks.bytes_sent(config, *numbers, *items, each) for each in rounds]
        seconds = [n * b / ranks.bandwidth for n, b in zip(load.steps, sent, strict=True)]
        times = ranks.with_sums(times, seconds)
    rows = trial.counter.steps(batching, workers).longest
    whole = forecast_memory(sizes, trial.observed, depth, rows, released)
    memory = ranks.memory(config, depth, whole)
    saved = kept_checkpoints(config, times.checkpoints) * depth.checkpoint_bytes
    store = load.states_bytes if on_disk else 0.0
    disk = {"model": trial.models.trainable.saved_bytes, "checkpoints": saved, "store": store}
    measured = any(observed.depth == depth for observed in trial.observed)
    budget = fitting.budget if fitting else None
    return DepthForecast(depth, times, memory, disk, budget, trial.free, measured, sent[0])


def kept_checkpoints(config: TrainConfig, saved: int) -> int:
    """How many of the checkpoints that a run saves are there when it ends."""
    return min(saved, config.keep_checkpoints + config.load_best_model_at_end)


def _counts(trial: Trial) -> dict[str, Any]:
    """What the run goes through, at every depth alike."""
    train, models = trial.data.train, trial.models
    schedule = Schedule.of(trial.config, len(train))
    prompts = sum(len(pair.prompt_ids) for pair in train)
    answers = sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in train)
    return {
        "train_pairs": len(train),
        "eval_pairs": len(trial.data.eval),
        "steps": schedule.total_steps,
        "steps_per_epoch": schedule.steps_per_epoch,
        "pairs_per_step": schedule.pairs_per_step,
        "tokens": prompts + answers,
        "completion_tokens": answers,
        "scored_tokens": sum(pair.scored_tokens for pair in train),
        "parameters": models.trainable.policy_bytes // trial.sizes.master,
        "engine": models.computing.engine,
        "dtype": dtype_name(models.facts.dtype),
        "free_bytes": trial.free,
    }


def notes_on(config: TrainConfig) -> list[str]:
    """What the figures leave out, or hold as an upper bound."""
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
            "checkpoints are counted as if every evaluation were the best so far "
            "(load_best_model_at_end)"
        )
    if config.early_stopping_patience:
        notes.append("training may stop earlier (early_stopping_patience)")
    return notes


def settle_depth(
    config: TrainConfig, started: float = 0.0
) -> tuple[TrainConfig, dict[str, Any] | None]:
    """The configuration with a number in place of `freeze_layers: auto`, and how that was chosen.

    The budget includes the seconds that planning took, and those before, `started`.

    Raises:
        UsageError: no depth fits.
    """
    if config.freeze_layers != "auto":
        return config, None
    require_one_rank("freeze_layers auto (give a number, such as the one smoldpo plan shows)")
    begun = time.perf_counter()
    plan = make_plan(config, started)
    gc.collect()
    trim_memory()
    spent = time.perf_counter() - begun
    assert config.budget is not None
    chosen = choose_depth(plan.depths, config.budget, spent)
    records = {
        "budget": config.budget,
        "freeze_layers": chosen.depth.frozen,
        "planning_seconds": round(spent, 1),
        "forecast_seconds": round(chosen.times.total, 1),
        "forecast_peak_bytes": int(chosen.memory.peak),
    }
    settled = {"freeze_layers": chosen.depth.frozen, "budget": None}
    return config.model_copy(update=settled), records


def choose_depth(depths: Sequence[DepthForecast], budget: str, spent: float = 0.0) -> DepthForecast:
    """The fewest frozen layers that fit into memory and budget; the choice is said with its reason.

    Args:
        spent: seconds of the budget that planning took.

    Raises:
        UsageError: there is none; it names the shortest forecast.
    """
    fitting = [each for each in depths if each.fits]
    if not fitting:
        least = min(depths, key=lambda each: each.memory.peak)
        raise UsageError(
            f"freeze_layers auto: no depth fits into memory: freezing {least.depth.frozen} layers "
            f"needs {least.memory.peak:,.0f} bytes, {least.free:,.0f} are free; try a smaller "
            "max_length or model"
        )
    seconds = parse_duration(budget) - spent
    in_time = [each for each in fitting if each.times.total <= seconds]
    if not in_time:
        best = min(fitting, key=lambda each: each.times.total)
        planned = f" after {format_seconds(spent)} of planning" if spent else ""
        raise UsageError(
            f"freeze_layers auto: no depth fits the budget of {budget}: the shortest forecast is "
            f"{format_seconds(best.times.total)} with {best.depth.frozen} layers frozen{planned}; "
            "give a larger budget, fewer pairs (max_train_samples) or epochs, or a smaller "
            "max_length"
        )
    chosen = min(in_time, key=lambda each: each.depth.frozen)
    planned = f" and {format_seconds(spent)} went into planning" if spent else ""
    progress.say(
        f"freeze_layers auto: {chosen.depth.frozen} of {chosen.depth.layers} layers frozen, the "
        f"fewest that fit {budget}: the run is forecast to take "
        f"{format_seconds(chosen.times.total)}{planned}, with {chosen.depth.trainable:,} "
        f"parameters that train and {chosen.memory.peak / 1e9:.1f} GB at its peak"
    )
    return chosen
