"""Time of a run, by phase: arithmetic on rates and counts. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
from scipy.optimize import nnls

from smoldpo.plan.workload import Depth, Load, Work
from smoldpo.utils.text import words


@dataclass(frozen=True)
class Fixed:
    """Seconds that do not depend on the depth, measured."""

    start: float = 0.0
    """Imports, data, models, tokens."""
    saving: float = 0.0
    answering: float = 0.0
    """Both models loaded, and their answers."""
    closing: float = 0.0
    checkpoint_byte: float = 0.0
    """A byte of a checkpoint, on the disk and hashed."""
    store_byte: float = 0.0
    """A byte of trunk states."""


STEADY = {"start", "checkpoints", "saving the model", "statistics and report"}
"""Phases that are not products of matrices for the most part."""


@dataclass(frozen=True)
class Phase:
    """One line of the forecast."""

    name: str
    seconds: float


@dataclass(frozen=True)
class Times:
    """The phases of a run, in their order, and how many checkpoints it saves."""

    phases: list[Phase] = field(default_factory=list)
    checkpoints: int = 0

    @property
    def total(self) -> float:
        return sum(phase.seconds for phase in self.phases)

    def at_speed(self, factor: float) -> Times:
        """The same run where products are so many times as fast."""
        phases = [
            phase if phase.name in STEADY else Phase(phase.name, phase.seconds / factor)
            for phase in self.phases
        ]
        return Times(phases, self.checkpoints)


def epoch_seconds(rates: Rates, load: Load, depth: Depth, epoch: int) -> float:
    """Seconds of one epoch's optimizer steps."""
    work, steps = load.epochs[epoch], load.steps[epoch]
    seconds = rates.gradients(work, depth.top, depth.trainable, depth.head_trains)
    seconds += steps * rates.update(depth.trainable)
    seconds += load.again * rates.trunk(work, depth.below)
    if load.two_passes and work.streams > steps:  # a step of one stream needs one pass
        seconds += rates.top(work, depth.top) * (1 - steps / work.streams)
    return seconds


def evaluation_seconds(rates: Rates, load: Load, depth: Depth) -> float:
    """Seconds of one pass of the policy over the held-out pairs."""
    again = load.again * rates.trunk(load.evaluation, depth.below)
    return again + rates.top(load.evaluation, load.evaluation_layers)


def checkpoints(
    seconds: float,
    steps: int,
    save_steps: int | None,
    save_minutes: float | None,
    best: bool,
    eval_steps: int | None = None,
    before: float = 0.0,
) -> int:
    """How many checkpoints a run saves (training/checkpointer.py), the last one included.

    Args:
        seconds: of all steps, and of what comes between them.
        best: whether the best policy is saved; every evaluation is taken to be better than those before.
        eval_steps: evaluations come after so many steps.
        before: seconds from the run's beginning, where the clock starts, to the first step.
    """
    saved, clock = 0, 0.0
    for step in range(1, steps + 1):
        now = before + seconds * step / steps
        due = any(every and step % every == 0 for every in (save_steps, best and eval_steps))
        due = due or (save_minutes and now - clock >= 60 * save_minutes)
        if due or (step == steps and (saved or save_steps or best)):
            saved, clock = saved + 1, now
    return saved


def forecast(
    rates: Rates,
    load: Load,
    depth: Depth,
    fixed: Fixed,
    checkpoint_bytes: float,
    save_steps: int | None,
    save_minutes: float | None,
    best: bool,
    compares: bool = True,
    eval_steps: int | None = None,
) -> Times:
    """Every phase of a run at one depth; those that it does not have are left out."""
    once = rates.trunk(load.trunk, depth.below) + load.states_bytes * fixed.store_byte
    once += rates.top(load.reference, load.reference_layers)
    epochs = [epoch_seconds(rates, load, depth, number) for number in range(len(load.epochs))]
    evaluation = evaluation_seconds(rates, load, depth)
    between = load.between * evaluation
    before = load.before * evaluation
    saved = checkpoints(
        sum(epochs) + between,
        sum(load.steps),
        save_steps,
        save_minutes,
        best,
        eval_steps,
        once + before,
    )
    after = 1 if load.evaluation.pairs else 0
    scoring = 2 * rates.top(load.answers, depth.layers)
    phases = [
        Phase("start", fixed.start),
        Phase("trunk and reference" if compares else "trunk", once),
        Phase("evaluating before", before),
        *(Phase(f"epoch {number + 1}", seconds) for number, seconds in enumerate(epochs)),
        Phase("evaluating in between", between),
        Phase("checkpoints", saved * checkpoint_bytes * fixed.checkpoint_byte),
        Phase("saving the model", fixed.saving),
        Phase("evaluating after", after * evaluation),
        Phase("answers of both models", fixed.answering + scoring),
        Phase("statistics and report", fixed.closing),
    ]
    asked = {"evaluating before": after, "evaluating in between": load.between}
    asked |= {"evaluating after": after, "checkpoints": saved}
    asked["answers of both models"] = fixed.answering
    return Times([phase for phase in phases if asked.get(phase.name, 1)], saved)


# Seconds a unit of work, fitted to what a few passes and steps took.
#
#     a pass without gradients   below trunk_rows trunk_row + top rows top_row
#                                + (below + top) scores score + scored head
#     gradients of a step        top rows step_row + top scores step_score + scored step_head (half as much
#                                again where the head trains) + streams parameters gradient
#     the optimizer's step       parameters optimizer + step
#
# `below` and `top` are the layers that the work goes through on each side of the freeze boundary.
# Every rate is at least 0: the fit is the non-negative least squares of Lawson and Hanson (1974), of relative
# errors, so that a short pass counts as much as a long one.


@dataclass(frozen=True)
class Passed:
    """A pass without gradients: through `below` layers of the trunk, `top` others, and the head."""

    work: Work
    below: int
    top: int
    seconds: float


@dataclass(frozen=True)
class Stepped:
    """An optimizer step: `gradients` and `optimizer` are seconds; None: not known."""

    work: Work
    top: int
    parameters: int
    head_trains: bool
    gradients: float
    optimizer: float | None


@dataclass(frozen=True)
class Rates:
    """Seconds a unit of each kind of work; see above."""

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

    def trunk(self, work: Work, below: int) -> float:
        """Seconds of a pass through the frozen layers."""
        return below * (work.trunk_rows * self.trunk_row + work.scores * self.score)

    def top(self, work: Work, layers: int) -> float:
        """Seconds of a pass without gradients through so many layers and the head."""
        each = work.rows * self.top_row + work.scores * self.score
        return layers * each + work.scored * self.head

    def gradients(self, work: Work, layers: int, parameters: int, head_trains: bool) -> float:
        """Seconds of a forward and backward pass through so many layers and the head."""
        each = work.rows * self.step_row + work.scores * self.step_score
        head = _head(work, head_trains) * self.step_head
        return layers * each + head + work.streams * parameters * self.gradient

    def update(self, parameters: int) -> float:
        """Seconds from gradients to new weights, once."""
        return parameters * self.optimizer + self.step


def fit_rates(passed: Sequence[Passed], stepped: Sequence[Stepped]) -> Rates:
    """The rates that explain best what was measured; what nothing tells of is 0."""
    forward = _fit(
        [
            [
                p.below * p.work.trunk_rows,
                p.top * p.work.rows,
                (p.below + p.top) * p.work.scores,
                p.work.scored,
            ]
            for p in passed
        ],
        [p.seconds for p in passed],
    )
    backward = _fit(
        [
            [
                s.top * s.work.rows,
                s.top * s.work.scores,
                _head(s.work, s.head_trains),
                s.work.streams * s.parameters,
            ]
            for s in stepped
        ],
        [s.gradients for s in stepped],
    )
    updates = [(s.parameters, s.optimizer) for s in stepped if s.optimizer is not None]
    update = _fit([[parameters, 1] for parameters, _ in updates], [s for _, s in updates])
    return Rates(*forward, *backward, *update)


def _head(work: Work, head_trains: bool) -> float:
    """Tokens through the head: forward and back are two products each, the gradient of its weights a third.

    Fitted by itself, that third took whatever else the depth with everything training had of its own.
    """
    return work.scored * (1.5 if head_trains else 1.0)


def _fit(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """x >= 0 with rows x close to seconds, by relative error."""
    if not rows:
        raise ValueError("nothing was measured")
    target = np.maximum(np.asarray(seconds, float), 1e-9)
    matrix = np.asarray(rows, float) / target[:, None]
    scale = matrix.max(axis=0)  # columns differ by many powers of ten
    scale[scale == 0] = 1.0
    found, _ = nnls(matrix / scale, np.ones(len(target)))
    return [float(x) for x in found / scale]


# How fast this machine multiplies matrices while a forecast is made, beside what it did before.
#
# A laptop that is warm or on battery, or a virtual machine with busy neighbours, has another speed in an
# hour. No forecast knows that hour's; but it can say what it saw.


SWUNG = 1.5
"""The fastest reading over the slowest, from which on that is said."""
DIFFERS = 1.15
"""The usual speed over the present one, or the other way, from which on that is said."""
ENOUGH = 3
"""Earlier readings that tell what is usual."""


@dataclass(frozen=True)
class Pace:
    """GFLOP/s of products in the compute dtype (engine/precision.py)."""

    readings: Sequence[float]
    """Taken between the parts of the dry run."""
    earlier: Sequence[float] = ()
    """Of earlier commands on this machine."""

    @property
    def now(self) -> float:
        return median(self.readings)

    @property
    def usual(self) -> float | None:
        return median(self.earlier) if len(self.earlier) >= ENOUGH else None

    def remarks(self, times: Times) -> list[str]:
        """What a forecast of these times must say of the minute in which it was made."""
        said, slowest, fastest = [], min(self.readings), max(self.readings)
        if fastest >= SWUNG * slowest:
            said.append(
                f"this machine's speed swung between {slowest:,.0f} and {fastest:,.0f} GFLOP/s while "
                "planning: a run may meet another mean, and take as much more or less time"
            )
        if self.usual and max(self.usual / self.now, self.now / self.usual) >= DIFFERS:
            total = words(times.at_speed(self.usual / self.now).total)
            said.append(
                f"products ran at {self.now:,.0f} GFLOP/s while planning, and at {self.usual:,.0f} in "
                f"this machine's last {len(self.earlier)} commands: at that speed the run takes {total}"
            )
        return said

    def as_dict(self) -> dict[str, Any]:
        return {
            "gflops": round(self.now, 1),
            "slowest": round(min(self.readings), 1),
            "fastest": round(max(self.readings), 1),
            "usual": self.usual and round(self.usual, 1),
            "earlier_commands": len(self.earlier),
        }
