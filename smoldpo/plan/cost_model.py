"""Seconds of a run by phase: rates fitted to timed passes and steps, times what the run counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
from scipy.optimize import nnls

from smoldpo.config.schema import TrainConfig
from smoldpo.engine.batching import OpCounts
from smoldpo.plan.depths import FreezeDepth
from smoldpo.plan.workload import Workload
from smoldpo.training.phases import RunPhases, checkpoint_due
from smoldpo.utils.core_use import CoreUse
from smoldpo.utils.text import format_seconds


@dataclass(frozen=True)
class FixedCosts:
    """Seconds that do not depend on the depth, measured."""

    start: float = 0.0  # Imports, data, models, tokens
    saving: float = 0.0
    answering: float = 0.0  # Both models loaded, and their answers
    closing: float = 0.0
    checkpoint_byte: float = 0.0  # A byte of a checkpoint, on the disk and hashed
    store_byte: float = 0.0  # A byte of trunk states


@dataclass(frozen=True)
class Phase:
    """One line of the forecast."""

    name: str
    seconds: float


NOT_MATMUL = {"start", "checkpoints", "saving the model", "statistics and report"}
"""Phases that are not matrix products for the most part."""


@dataclass(frozen=True)
class Times:
    """The phases of a run, in their order, and how many checkpoints it saves."""

    phases: list[Phase] = field(default_factory=list)
    checkpoints: int = 0

    @property
    def total(self) -> float:
        return sum(phase.seconds for phase in self.phases)

    def at_speed(self, factor: float) -> Times:
        """The same run where products are `factor` times as fast."""
        phases = [
            phase if phase.name in NOT_MATMUL else Phase(phase.name, phase.seconds / factor)
            for phase in self.phases
        ]
        return Times(phases, self.checkpoints)


@dataclass(frozen=True)
class TimedPass:
    """A pass without gradients: through `below` layers of the trunk, `top` others, and the head."""

    counts: OpCounts
    below: int
    top: int
    seconds: float


@dataclass(frozen=True)
class TimedStep:
    """An optimizer step: seconds of `gradients` and of the `update` (None: not known)."""

    counts: OpCounts
    depth: FreezeDepth
    gradients: float
    update: float | None


@dataclass(frozen=True)
class Rates:
    """Seconds per unit of each kind of work.

    pass without gradients   below trunk_rows trunk_row + top rows top_row
                             + (below + top) scores score + head_rows head
    gradients of a step      top rows step_row + top scores step_score + head_rows step_head
                             (1.5 times that where the head trains)
                             + batches parameters gradient
    update                   parameters optimizer + step

    `below` and `top` are the layers on each side of the freeze boundary.
    """

    trunk_row: float = 0.0
    top_row: float = 0.0
    score: float = 0.0
    head: float = 0.0
    step_row: float = 0.0
    step_score: float = 0.0
    step_head: float = 0.0
    gradient: float = 0.0
    optimizer: float = 0.0
    step: float = 0.0

    def trunk(self, counts: OpCounts, below: int) -> float:
        """Seconds of a pass through the frozen layers."""
        return below * (counts.trunk_rows * self.trunk_row + counts.scores * self.score)

    def top(self, counts: OpCounts, layers: int) -> float:
        """Seconds of a pass without gradients through so many layers and the head."""
        each = counts.rows * self.top_row + counts.scores * self.score
        return layers * each + counts.head_rows * self.head

    def gradients(self, counts: OpCounts, depth: FreezeDepth) -> float:
        """Seconds of a forward and backward pass."""
        rates = (self.step_row, self.step_score, self.step_head, self.gradient)
        columns = _gradient_columns(counts, depth)
        return sum(count * rate for count, rate in zip(columns, rates, strict=True))

    def update(self, parameters: int) -> float:
        """Seconds from gradients to new weights, once."""
        return parameters * self.optimizer + self.step


def _gradient_columns(counts: OpCounts, depth: FreezeDepth) -> list[float]:
    """The units of a step's four rates.

    A row of the head takes two products forward and backward, and a third for the gradient of the
    head's weights. That third is fixed at half of the two: fitted by itself, it also took whatever
    else the depth had of its own at which everything trains.
    """
    head_rows = counts.head_rows * (1.5 if depth.head_trains else 1.0)
    rows, scores = depth.top * counts.rows, depth.top * counts.scores
    return [rows, scores, head_rows, counts.batches * depth.trainable]


def fit_rates(passes: Sequence[TimedPass], steps: Sequence[TimedStep]) -> Rates:
    """The rates that explain the timings best; a rate of which no timing tells is 0.

    Raises:
        ValueError: there are no timings.
    """
    forward = [
        [
            p.below * p.counts.trunk_rows,
            p.top * p.counts.rows,
            (p.below + p.top) * p.counts.scores,
            p.counts.head_rows,
        ]
        for p in passes
    ]
    backward = [_gradient_columns(s.counts, s.depth) for s in steps]
    updates = [(s.depth.trainable, s.update) for s in steps if s.update is not None]
    return Rates(
        *_fit(forward, [p.seconds for p in passes]),
        *_fit(backward, [s.gradients for s in steps]),
        *_fit([[parameters, 1.0] for parameters, _ in updates], [s for _, s in updates]),
    )


def _fit(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """x >= 0 with rows x close to seconds: non-negative least squares (Lawson and Hanson 1974).

    The errors are relative, so that a short pass counts as much as a long one.
    """
    if not rows:
        raise ValueError("nothing was measured")
    target = np.maximum(np.asarray(seconds, float), 1e-9)
    matrix = np.asarray(rows, float) / target[:, None]
    scale = matrix.max(axis=0)  # columns differ by many powers of ten
    scale[scale == 0] = 1.0
    found, _ = nnls(matrix / scale, np.ones(len(target)))
    return [float(x) for x in found / scale]


def count_checkpoints(
    config: TrainConfig, phases: RunPhases, seconds: float, before: float = 0.0
) -> int:
    """How many checkpoints a run saves; each evaluation counts as the best so far.

    Args:
        seconds: of all steps and of the evaluations between them.
        before: seconds from the run's start, where the clock starts, to the first step.
    """
    saved, clock = 0, 0.0
    for step in range(1, phases.steps + 1):
        now = before + seconds * step / phases.steps
        last, minutes = step == phases.steps, (now - clock) / 60
        best = config.load_best_model_at_end and step in phases.evaluations
        if best or checkpoint_due(config, step, minutes, last=last, others=saved > 0):
            saved, clock = saved + 1, now
    return saved


def forecast(
    rates: Rates, load: Workload, depth: FreezeDepth, costs: FixedCosts, config: TrainConfig
) -> Times:
    """Every phase of a run at one depth; the phases that it does not have are left out."""
    once = rates.trunk(load.trunk, depth.below) + load.states_bytes * costs.store_byte
    once += rates.top(load.reference, load.reference_layers)
    evaluation = load.recomputed * rates.trunk(load.evaluation, depth.below)
    evaluation += rates.top(load.evaluation, load.evaluation_layers)
    before, between = load.evaluations_before, len(load.phases.evaluations)
    epochs = [
        _epoch_seconds(rates, load, depth, counts, steps)
        for counts, steps in zip(load.epochs, load.steps, strict=True)
    ]
    saved = count_checkpoints(
        config, load.phases, sum(epochs) + between * evaluation, once + before * evaluation
    )
    held_out = load.phases.after
    answering = costs.answering + 2 * rates.top(load.answers, depth.layers)
    lines = [
        (True, "start", costs.start),
        (True, load.phases.first_pass, once),
        (held_out, "evaluating before", before * evaluation),
        *((True, f"epoch {number}", seconds) for number, seconds in enumerate(epochs, 1)),
        (between > 0, "evaluating in between", between * evaluation),
        (saved > 0, "checkpoints", saved * depth.checkpoint_bytes * costs.checkpoint_byte),
        (True, "saving the model", costs.saving),
        (held_out, "evaluating after", evaluation),
        (costs.answering > 0, "answers of both models", answering),
        (True, "statistics and report", costs.closing),
    ]
    return Times([Phase(name, seconds) for present, name, seconds in lines if present], saved)


def _epoch_seconds(
    rates: Rates, load: Workload, depth: FreezeDepth, counts: OpCounts, steps: int
) -> float:
    seconds = rates.gradients(counts, depth) + steps * rates.update(depth.trainable)
    seconds += load.recomputed * rates.trunk(counts, depth.below)
    seconds += load.two_passes * rates.top(counts, depth.top)
    return seconds


SWING = 1.5
"""The fastest reading over the slowest from which a remark is made."""
UNUSUAL = 1.15
"""The usual speed over the present one, or the inverse, from which a remark is made."""
ENOUGH_READINGS = 3
"""Earlier readings that tell what is usual."""


@dataclass(frozen=True)
class MachineSpeed:
    """GFLOP/s of one thread's matrix products in the compute dtype (engine/precision.py).

    A laptop that is warm or on battery, or a virtual machine with busy neighbours, has another
    speed in an hour. No forecast knows that; it can say what it saw.
    """

    readings: Sequence[float]  # Taken between the parts of the dry run
    earlier: Sequence[float] = ()  # Of earlier commands on this machine
    use: CoreUse | None = None  # Of the cores, while planning
    threads: int = 1  # That compute

    @property
    def now(self) -> float:
        return median(self.readings)

    @property
    def usual(self) -> float | None:
        return median(self.earlier) if len(self.earlier) >= ENOUGH_READINGS else None

    def remarks(self, times: Times) -> list[str]:
        """What a forecast of these times must say of the machine's speed."""
        found, slowest, fastest = [], min(self.readings), max(self.readings)
        if fastest >= SWING * slowest:
            found.append(
                f"this machine's speed swung between {slowest:,.0f} and {fastest:,.0f} GFLOP/s "
                "while planning: a run may meet another mean, and take as much more or less time"
            )
        if self.usual and max(self.usual / self.now, self.now / self.usual) >= UNUSUAL:
            total = format_seconds(times.at_speed(self.usual / self.now).total)
            found.append(
                f"products ran at {self.now:,.0f} GFLOP/s while planning, and at {self.usual:,.0f} "
                f"in this machine's last {len(self.earlier)} commands: at that speed the run takes "
                f"{total}"
            )
        if self.use is not None and self.use.busy:
            alone = format_seconds(times.at_speed(self.use.slower(self.threads)).total)
            found.append(
                f"the machine is busy: {self.use.in_words}; the forecast is for a run beside them, "
                f"and alone it takes about {alone}"
            )
        return found

    def as_dict(self) -> dict[str, Any]:
        return {
            "gflops": round(self.now, 1),
            "slowest": round(min(self.readings), 1),
            "fastest": round(max(self.readings), 1),
            "usual": self.usual and round(self.usual, 1),
            "earlier_commands": len(self.earlier),
        }
