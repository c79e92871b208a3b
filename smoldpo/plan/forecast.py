"""Time of a run, by phase: arithmetic on rates and counts. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from smoldpo.plan.rates import Rates
from smoldpo.plan.work import NONE, Work


@dataclass(frozen=True)
class Depth:
    """What a freeze depth means for a model of so many layers."""

    frozen: int
    """What freeze_layers would be."""
    below: int
    """Layers below the boundary: nothing in them or in the embeddings trains."""
    layers: int
    trainable: int
    """Parameters that train."""
    head_trains: bool
    optimizer: int = 0
    """Bytes of the optimizer's state."""
    checkpoint: int = 0
    """Bytes of one checkpoint's tensors."""
    step: int = 0
    """Bytes of gradients, the optimizer's state and its temporaries, as the run counts them beforehand."""
    unconverted: int = 0
    """Bytes by which frozen weights, as they are stored, are fewer than in the compute dtype."""
    released: int = 0
    """Bytes of frozen weights that are let go once all pairs went through them."""
    resting: int = 0
    """Bytes of all frozen weights that can be let go, as they are while the model is saved and answers."""

    @property
    def top(self) -> int:
        """Layers that a backward pass goes through."""
        return self.layers - self.below


@dataclass(frozen=True)
class Load:
    """What a run does at one depth."""

    trunk: Work = NONE
    """Through the frozen layers once: pairs whose states are not there yet."""
    reference: Work = NONE
    """Scored once by the reference."""
    reference_layers: int = 0
    """Layers of which states have to be computed for that."""
    epochs: Sequence[Work] = ()
    steps: Sequence[int] = ()
    """Optimizer steps of each epoch."""
    two_passes: bool = False
    """A loss over whole steps sees all log-probabilities first, then differentiates."""
    evaluation: Work = NONE
    """All held-out pairs, once."""
    evaluation_layers: int = 0
    before: int = 0
    """Passes over the held-out pairs before training, besides those of `reference`."""
    between: int = 0
    """Evaluations during training."""
    again: float = 0.0
    """Share of the streams whose frozen layers run each time, for want of room to keep their states."""
    answers: Work = NONE
    """Answers and pairs worth reading, scored token by token by one model."""
    states_bytes: float = 0.0
    """Trunk states that are written to disk."""


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
    """How many a run saves (keeper.py): every so many steps or minutes, and the last where there are others.

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
