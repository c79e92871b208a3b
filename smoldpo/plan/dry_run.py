"""The dry run at one freeze depth: a few passes and a few steps of the real engine, optimizer and trainer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from smoldpo.config.losses import needs_reference
from smoldpo.config.schema import TrainConfig
from smoldpo.engine.batch_budget import fit_budget
from smoldpo.engine.kernels.layers import ROWS, TRUNK_ROWS
from smoldpo.engine.packing import common_prefix, pair_length
from smoldpo.plan.cost_model import Passed, Stepped
from smoldpo.plan.depths import Visit
from smoldpo.plan.memory import Sizes, Tried, height, read_in, resident
from smoldpo.plan.workload import FastPacking, Packing, PlainPacking, work_of
from smoldpo.training.loop import train
from smoldpo.training.policy_and_reference import PolicyAndReference
from smoldpo.training.state import TrainingState
from smoldpo.types import TokenizedPair
from smoldpo.utils.memory import free_memory, trim_memory


@dataclass
class Measured:
    """What one depth told."""

    passed: list[Passed] = field(default_factory=list)
    stepped: list[Stepped] = field(default_factory=list)
    tried: Tried | None = None


class DryRun:
    """Passes and steps at one depth, timed.

    Args:
        models: loaded for the visit's depth, with a cache in memory; their policy is changed by the steps.
        pairs: all training pairs, of which the longest decides what fits.
        samples: as many pairs of each kind as `dose` says.
    """

    def __init__(
        self,
        config: TrainConfig,
        models: PolicyAndReference,
        visit: Visit,
        pairs: Sequence[TokenizedPair],
        samples: Samples,
        dose: Dose,
        sizes: Sizes,
    ):
        self._config, self._engine = config, models.engine
        self._visit, self._depth = visit, visit.depth
        self._rates = models.rates
        self._pairs, self._sizes, self._dose = pairs, sizes, dose
        self._batches = [samples.short] if visit.once else [samples.short, samples.long]
        self._fast = models.computing["engine"] == "fast"
        self._state: TrainingState | None = None
        self._shared = common_prefix(samples.long)  # as the engine finds it in the first pairs
        self._longest = self._packing().longest(pairs)
        self.found = Measured()

    def go(self, first: bool, between: Callable[[], Any]) -> Measured:
        """All of it; in the first dry run, compiling and the start of threads count for nothing.

        Args:
            between: called between the parts that are timed.
        """
        engine = self._engine
        read_in(engine.policy, engine.reference)
        before = resident()
        with height() as seen:
            self._prepare(first)
        passing, before = seen.bytes - before, before - engine.release_frozen()
        between()
        self._state = state = TrainingState(engine, self._config, self._rates)
        per_step = self._config.per_device_train_batch_size
        per_step *= self._config.gradient_accumulation_steps
        free = free_memory(engine.device)
        one = fit_budget(engine, self._pairs, per_step, state.step_bytes, free)
        for batch in self._batches if self._visit.passes else []:
            self._time_pass(batch)
            between()
        trim_memory()
        with height() as seen:
            for number, batch in enumerate(self._batches):
                self._time_steps(batch, first=number == 0)
                between()
        self.found.tried = self._memory(before, seen.bytes, one, passing)
        return self.found

    def _prepare(self, first: bool) -> None:
        """States and reference of all pairs that are tried.

        The longest pair goes along: alone it would cost a whole block of rows (kernels/layers.py).
        """
        *others, last = self._batches
        pairs = [pair for batch in others for pair in batch]
        if self._fast and self._depth.below:
            pairs.append(self._longest)
        pairs = [pair for pair in dict.fromkeys(pairs) if pair not in last]
        if first:
            self._engine.prepare(pairs)
            pairs = []
        self._time_prepare(pairs + last)

    def _time_prepare(self, pairs: list[TokenizedPair]) -> None:
        """Through trunk and reference, as far as the engine computes them before the first step."""
        seconds = _timed(lambda: self._engine.prepare(pairs))
        depth, packing = self._depth, self._packing()
        top, work = depth.top, work_of(packing, packing.passes(pairs))
        if self._config.reference is not None:
            top = depth.layers
        if not needs_reference(self._config.loss_type):
            top, work = 0, replace(work, scored=0)
        if self._fast and depth.below + top:
            self.found.passed.append(Passed(work, depth.below, top, seconds))

    def _packing(self) -> Packing:
        return packing_of(self._engine, self._fast, self._shared)

    def _time_pass(self, sample: list[TokenizedPair]) -> None:
        """The policy's log-probabilities, from states that are there."""
        packing = self._packing()
        work = work_of(packing, packing.passes(sample))
        if self._dose.twice:
            self._engine.policy_logps(sample)
        seconds = _timed(lambda: self._engine.policy_logps(sample))
        layers = self._depth.top if self._fast else self._depth.layers
        self.found.passed.append(Passed(work, 0, layers, seconds))

    def _time_steps(self, sample: list[TokenizedPair], first: bool) -> None:
        """The trainer's own loop over one batch; the last of its steps counts.

        What is allocated or compiled in the first step of all belongs to no other. Where there is but one,
        that is little beside the gradients, and the update is not counted.
        """
        assert self._state is not None
        clock = _Clock()
        self._state.step = 0
        steps = 1 if self._visit.once else 1 + (first or self._dose.twice)
        train(
            self._engine,
            sample,
            _one_batch(self._config, len(sample), steps),
            _Unwritten(),
            starts_at_reference=first and self._config.reference is None,
            after_step=clock.step_ends,
            watch=lambda *_, **__: None,
            state=self._state,
            advance=clock.gradients_end,
        )
        packing, depth = self._packing(), self._depth
        work, (gradients, update) = work_of(packing, packing.step(sample)), clock.last
        self.found.stepped.append(
            Stepped(
                work,
                depth.top,
                depth.trainable,
                depth.head_trains,
                gradients,
                None if self._visit.once else update,
            )
        )

    def _memory(self, before: int, most: int, one: int, passing: int) -> Tried:
        """What a row keeps, of which the longest pair has `one` bytes; and what no count explains."""
        depth, packing = self._depth, self._packing()
        row = one / packing.held([self._longest])
        held = max(packing.held(some) for batch in self._batches for some in packing.step(batch))
        trim_memory()
        trainable = depth.trainable * self._sizes.master
        return Tried(
            depth=depth,
            kept_row=row,
            other=most - before - depth.optimizer - trainable - held * row,
            rest=resident() - before - depth.optimizer,
            passing=passing,
        )


def packing_of(engine: Any, fast: bool, shared: tuple[int, ...]) -> Packing:
    """The packing rules of an engine as it is set now."""
    if fast:
        return FastPacking(engine.budget, shared)
    return PlainPacking(engine.budget, engine.eval_batch_size)


def _one_batch(config: TrainConfig, pairs: int, steps: int) -> TrainConfig:
    """The same training, of so many steps over one batch."""
    return config.model_copy(
        update={
            "per_device_train_batch_size": pairs,
            "gradient_accumulation_steps": 1,
            "max_steps": steps,
            "logging_steps": 1,
        }
    )


class _Clock:
    """When gradients and steps ended, as the trainer says."""

    def __init__(self) -> None:
        self._begun = self._gradients = time.perf_counter()
        self.last = (0.0, 0.0)

    def gradients_end(self, _: int) -> None:
        self._gradients = time.perf_counter()

    def step_ends(self, _: int) -> bool:
        now = time.perf_counter()
        self.last = (self._gradients - self._begun, now - self._gradients)
        self._begun = now
        return False


class _Unwritten:
    """Metrics that nobody reads."""

    def log(self, row: dict[str, Any]) -> None:
        pass


def _timed(work: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


# The pairs of the dry run: some of the run's own, short ones and long ones, at its real lengths.


@dataclass(frozen=True)
class Samples:
    """Pairs of the shorter half and of the longer half, evenly spaced by length."""

    short: list[TokenizedPair]
    long: list[TokenizedPair]


def step_samples(pairs: Sequence[TokenizedPair], count: int) -> Samples:
    """What one step each goes through: so many pairs."""
    order = sorted(pairs, key=pair_length)
    middle = len(order) // 2
    return Samples(evenly(order[:middle] or order, count), evenly(order[middle:], count))


def evenly(pairs: Sequence[TokenizedPair], count: int) -> list[TokenizedPair]:
    """So many of them, or all, evenly spaced."""
    count = min(count, len(pairs))
    return [pairs[int((at + 0.5) * len(pairs) / count)] for at in range(count)]


# How much the dry run goes through: enough to be steady, and little enough to be done within a minute.


SECONDS = 16.0
"""For all depths together; loading, saving and drawing answers come to it."""
PAIRS = range(8, 1, -1)
"""To a step of the dry run. One alone would leave most of a block of rows empty (kernels/layers.py)."""


@dataclass(frozen=True)
class Dose:
    """Of one depth."""

    pairs: int
    """Of each of two batches."""
    twice: bool
    """Whether each pass and step is done once more before it counts; else the first step of all alone is.

    Where arithmetic takes all the time, a first call takes hardly more than the next one.
    """

    def operations(
        self, inside: int, head: int, visits: Sequence[Visit], size: tuple[float, float, int]
    ) -> float:
        """What the dry runs compute (DryRun).

        Args:
            inside: parameters in all decoder layers.
            head: parameters in the LM head.
            size: tokens of a pair, those of its completions, on average; tokens of the longest pair.
        """
        mean, scored, longest = size
        rows, logits = _filled(self.pairs * mean, ROWS), self.pairs * scored * head
        total = 0.0
        for visit in visits:
            depth, batches = visit.depth, 1 if visit.once else 2
            passes = batches * (1 + self.twice) if visit.passes else 0
            steps = 1 if visit.once else 3 + self.twice
            above = inside * depth.top / depth.layers
            prepared = batches * self.pairs * mean + (longest if depth.below else 0)
            total += 2 * (_filled(prepared, TRUNK_ROWS) * inside + batches * logits)
            total += 2 * _filled(longest, ROWS) * above
            total += passes * 2 * (rows * above + logits)
            total += steps * (6 * rows * above + (6 if depth.head_trains else 4) * logits)
        return total


def _filled(rows: float, block: int) -> int:
    return block * math.ceil(rows / block)


def choose_dose(
    pairs: Sequence[TokenizedPair],
    per_step: int,
    inside: int,
    head: int,
    visits: Sequence[Visit],
    rate: float,
) -> Dose:
    """The largest dose that takes about SECONDS at most; of a very slow machine, the smallest there is.

    Args:
        pairs: all training pairs.
        per_step: of an optimizer step of the run.
        inside, head: parameters in all decoder layers, and in the LM head.
        rate: operations a second that a run reaches here.
    """
    scored = sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs) / len(pairs)
    lengths = [pair_length(pair) for pair in pairs]
    size = sum(lengths) / len(pairs), scored, max(lengths)
    counts = [count for count in PAIRS if count <= per_step] or [per_step]
    doses = [Dose(counts[0], True), *(Dose(count, False) for count in counts)]
    for dose in doses:
        if dose.operations(inside, head, visits, size) <= SECONDS * rate:
            return dose
    return doses[-1]
