"""The dry run at one freeze depth: some passes and steps of the real engine and loop, timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

from smoldpo.config.losses import needs_reference
from smoldpo.config.schema import TrainConfig
from smoldpo.engine.batch_budget import fit_budget
from smoldpo.engine.batching import Batching
from smoldpo.engine.layout import ROWS, TRUNK_ROWS, round_up
from smoldpo.engine.packing import pair_length
from smoldpo.plan.cost_model import TimedPass, TimedStep
from smoldpo.plan.depths import TrialDepth
from smoldpo.plan.measure import PeakMemory, page_in, resident
from smoldpo.plan.memory import ObservedMemory
from smoldpo.training.loop import train
from smoldpo.training.policy_and_reference import PolicyAndReference
from smoldpo.training.sampler import Schedule
from smoldpo.training.state import TrainingState
from smoldpo.types import TokenizedPair
from smoldpo.utils.memory import free_memory, trim_memory

SECONDS = 16.0
"""For the dry runs of all depths, about; loading, saving and generating come on top."""
PAIRS = range(8, 1, -1)
"""Pairs of a step. One alone would leave most of a block of rows empty (kernels/layers.py)."""


@dataclass
class Measurements:
    """What the dry run at one depth found."""

    passes: list[TimedPass] = field(default_factory=list)
    steps: list[TimedStep] = field(default_factory=list)
    memory: ObservedMemory | None = None


class DryRun:
    """Passes and steps at one depth, timed.

    Args:
        models: loaded for this depth, with a cache in memory. The steps change their policy.
        tried: the depth, and how much of it is run.
        pairs: all training pairs; the longest decides what fits into memory.
        size: how many pairs go through, and how often.
    """

    def __init__(
        self,
        config: TrainConfig,
        models: PolicyAndReference,
        tried: TrialDepth,
        pairs: Sequence[TokenizedPair],
        size: TrialSize,
    ):
        self._config, self._models, self._engine = config, models, models.engine
        self._tried, self._depth = tried, tried.depth
        self._pairs, self._size = pairs, size
        short, long = trial_batches(pairs, size.pairs)
        self._batches = [short] if tried.one_step else [short, long]
        self._fast = models.computing.engine == "fast"
        self._longest = self._batching.longest(pairs)
        self._found = Measurements()

    @property
    def _batching(self) -> Batching:
        """The engine's, at the budget that it has now."""
        return self._engine.batching

    @property
    def _workers(self) -> int:
        return self._engine.workers.count

    def run(self, first: bool, between: Callable[[], object]) -> Measurements:
        """All passes and steps.

        Args:
            first: whether this is the process's first dry run, in which compiling and the start
                of threads are not to be counted.
            between: called between the parts that are timed.

        Raises:
            SmoldpoError: a step at this depth does not fit into memory.
        """
        engine = self._engine
        page_in(engine.policy, engine.reference)
        before = resident()
        with PeakMemory() as peak:
            self._prepare(first)
        first_pass = peak.bytes - before
        before -= engine.release_frozen()
        between()
        state = TrainingState(engine, self._config, self._models.trainable.rates)
        per_step = Schedule.of(self._config, len(self._pairs)).pairs_per_step
        free = free_memory(engine.device)
        one = fit_budget(engine, self._pairs, per_step, state.step_bytes, free)
        for batch in self._batches if self._tried.time_passes else []:
            self._time_pass(batch)
            between()
        trim_memory()
        with PeakMemory() as peak:
            for number, batch in enumerate(self._batches):
                self._time_steps(state, batch, first=number == 0)
                between()
        trim_memory()
        self._found.memory = self._observed(before, peak.bytes, one, first_pass)
        return self._found

    def _prepare(self, first: bool) -> None:
        """The first pass over all pairs that are tried.

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
        pairs += last
        seconds = _seconds_of(lambda: self._engine.prepare(pairs))
        depth, batching = self._depth, self._batching
        top = depth.top if self._config.reference is None else depth.layers
        counts = batching.count_busiest(batching.forward_batches(pairs), self._workers)
        if not needs_reference(self._config.loss_type):
            top, counts = 0, replace(counts, head_rows=0)
        if self._fast and depth.below + top:
            self._found.passes.append(TimedPass(counts, depth.below, top, seconds))

    def _time_pass(self, batch: list[TokenizedPair]) -> None:
        """The policy's log-probabilities, from trunk states that are cached."""
        batching = self._batching
        counts = batching.count_busiest(batching.forward_batches(batch), self._workers)
        if self._size.repeat:
            self._engine.policy_logps(batch)
        seconds = _seconds_of(lambda: self._engine.policy_logps(batch))
        layers = self._depth.top if self._fast else self._depth.layers
        self._found.passes.append(TimedPass(counts, 0, layers, seconds))

    def _time_steps(self, state: TrainingState, batch: list[TokenizedPair], first: bool) -> None:
        """The training loop over one batch; its last step counts.

        The first step of all allocates and compiles for the later ones. Where there is one step
        alone, that is little beside the gradients, and the update is not counted.
        """
        gradients_ended: list[float] = []
        steps_ended = [time.perf_counter()]
        state.step = 0
        steps = 1 if self._tried.one_step else 1 + (first or self._size.repeat)
        one_batch = {
            "per_device_train_batch_size": len(batch),
            "gradient_accumulation_steps": 1,
            "max_steps": steps,
            "logging_steps": 1,
        }
        unwritten: Any = SimpleNamespace(log=lambda row: None)
        train(
            self._engine,
            batch,
            self._config.model_copy(update=one_batch),
            unwritten,
            starts_at_reference=first and self._config.reference is None,
            after_step=lambda _: steps_ended.append(time.perf_counter()),
            watch=lambda *_, **__: None,
            state=state,
            advance=lambda _: gradients_ended.append(time.perf_counter()),
        )
        begun, ended = steps_ended[-2:]
        gradients = gradients_ended[-1] - begun
        update = None if self._tried.one_step else ended - gradients_ended[-1]
        batches = self._batching.step_batches(batch)
        counts = self._batching.count_busiest(batches, self._workers)
        self._found.steps.append(TimedStep(counts, self._depth, gradients, update))

    def _observed(self, before: int, peak: int, one: int, first_pass: int) -> ObservedMemory:
        """What each row keeps, given the `one` of the longest pair; and what no count explains."""
        depth, batching = self._depth, self._batching
        row = one / batching.saved_rows([self._longest])
        rows = (
            sorted(map(batching.saved_rows, batching.step_batches(batch)))
            for batch in self._batches
        )
        saved = max(sum(each[-self._workers :]) for each in rows)
        gradients = sum(p.nbytes for _, p in self._engine.trainable_parameters())
        return ObservedMemory(
            depth=depth,
            row=row,
            other=peak - before - depth.optimizer_bytes - gradients - saved * row,
            rest=resident() - before - depth.optimizer_bytes,
            first_pass=first_pass,
        )


def _seconds_of(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def trial_batches(
    pairs: Sequence[TokenizedPair], count: int
) -> tuple[list[TokenizedPair], list[TokenizedPair]]:
    """Two batches, of the shorter and of the longer half of the pairs, evenly spaced by length."""

    def spaced(group: Sequence[TokenizedPair]) -> list[TokenizedPair]:
        size = min(count, len(group))
        return [group[int((k + 0.5) * len(group) / size)] for k in range(size)]

    order = sorted(pairs, key=pair_length)
    middle = len(order) // 2
    return spaced(order[:middle] or order), spaced(order[middle:])


@dataclass(frozen=True)
class TrialSize:
    """How much the dry run puts through each depth."""

    pairs: int  # Pairs of each of two batches
    repeat: bool
    """Whether each pass and step is run once more before it counts; else only the first step is.

    Where arithmetic takes all the time, a first call takes hardly longer than the next one.
    """

    def operations(
        self,
        layer_parameters: int,
        head_parameters: int,
        tried: Sequence[TrialDepth],
        lengths: tuple[float, float, int],
    ) -> float:
        """Floating-point operations of the dry runs, about.

        Args:
            layer_parameters: in all decoder layers together.
            head_parameters: in the LM head.
            lengths: mean tokens of a pair, mean of its completions, tokens of the longest pair.
        """
        mean, scored, longest = lengths
        rows = round_up(self.pairs * mean, ROWS)
        logits = self.pairs * scored * head_parameters
        total = 0.0
        for each in tried:
            depth, batches = each.depth, 1 if each.one_step else 2
            passes = batches * (1 + self.repeat) if each.time_passes else 0
            steps = 1 if each.one_step else 3 + self.repeat
            above = layer_parameters * depth.top / depth.layers
            prepared = batches * self.pairs * mean + (longest if depth.below else 0)
            total += 2 * (round_up(prepared, TRUNK_ROWS) * layer_parameters + batches * logits)
            total += 2 * round_up(longest, ROWS) * above
            total += passes * 2 * (rows * above + logits)
            total += steps * (6 * rows * above + (6 if depth.head_trains else 4) * logits)
        return total


def choose_trial_size(
    pairs: Sequence[TokenizedPair],
    pairs_per_step: int,
    layer_parameters: int,
    head_parameters: int,
    tried: Sequence[TrialDepth],
    speed: float,
) -> TrialSize:
    """The largest size that takes about SECONDS at most; on a very slow machine the smallest.

    Args:
        pairs: all training pairs.
        pairs_per_step: of an optimizer step of the run.
        layer_parameters, head_parameters: in all decoder layers, and in the LM head.
        speed: floating-point operations a second that a run reaches here.
    """
    scored = sum(pair.scored_tokens for pair in pairs) / len(pairs)
    tokens = [pair_length(pair) for pair in pairs]
    lengths = sum(tokens) / len(tokens), scored, max(tokens)
    counts = [count for count in PAIRS if count <= pairs_per_step] or [pairs_per_step]
    sizes = [TrialSize(counts[0], True), *(TrialSize(count, False) for count in counts)]
    for size in sizes:
        operations = size.operations(layer_parameters, head_parameters, tried, lengths)
        if operations <= SECONDS * speed:
            return size
    return sizes[-1]
