"""How much a run computes: its batches by the engine's rules, its phases by the run's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from smoldpo.config.schema import TrainConfig
from smoldpo.engine.batching import Batch, Batching, OpCounts, TokenBatching, total
from smoldpo.plan.cache_lookup import CacheMisses
from smoldpo.plan.depths import FreezeDepth
from smoldpo.training.loop import loss_function
from smoldpo.training.phases import RunPhases
from smoldpo.training.sampler import Schedule
from smoldpo.types import TokenizedPair

NOTABLE_PAIRS = 9
"""Pairs of an evaluation that are scored token by token, about (evaluation/side_by_side.py)."""

NO_COUNTS = OpCounts()


@dataclass(frozen=True)
class Workload:
    """What a run computes at one depth."""

    phases: RunPhases
    trunk: OpCounts = NO_COUNTS
    """Pairs whose trunk states are not cached: once through the frozen layers."""
    reference: OpCounts = NO_COUNTS  # Pairs whose reference log-probabilities are not cached
    reference_layers: int = 0  # Layers that the reference still has to run for them
    epochs: Sequence[OpCounts] = ()
    steps: Sequence[int] = ()  # Optimizer steps of each epoch
    two_passes: float = 0.0
    """Share of the steps' rows that go forward once more, because the loss needs all
    log-probabilities of a step before it is differentiated."""
    evaluation: OpCounts = NO_COUNTS  # All held-out pairs, once
    evaluation_layers: int = 0
    evaluations_before: int = 0
    """Passes over the held-out pairs before training, besides those in `reference`."""
    recomputed: float = 0.0
    """Share of the batches whose trunk states find no room, and are computed each time."""
    answers: OpCounts = NO_COUNTS  # Answers and notable pairs that one model scores token by token
    states_bytes: float = 0.0  # Trunk states that are written


@dataclass(frozen=True)
class StepCounts:
    """The optimizer steps of a run, by epoch: what the busiest worker computes of each step."""

    epochs: list[OpCounts]
    steps: list[int]
    longest: float  # Rows of the batches with a backward pass that are computed at once, at most
    several: float  # Share of the rows that are in steps of several batches


class RunCounter:
    """Counts what a run computes; what is the same at several depths is counted once."""

    def __init__(self, config: TrainConfig, train: Batch, evaluation: Batch):
        self._config, self._train, self._evaluation = config, train, evaluation
        self.steps = cache(self._count_steps)
        self._held_out = cache(lambda b, w: b.count_busiest(b.forward_batches(evaluation), w))
        self._first_pass = cache(_count_first_pass)

    def _count_steps(self, batching: Batching, workers: int) -> StepCounts:
        """Each step's own pairs, as this batching cuts them and so many workers share them."""
        schedule = Schedule.of(self._config, len(self._train))
        epochs: list[OpCounts] = []
        steps: list[int] = []
        longest = several = 0.0
        for step in range(schedule.total_steps):
            if step % schedule.steps_per_epoch == 0:
                epochs.append(OpCounts())
                steps.append(0)
            batches = batching.step_batches([self._train[i] for i in schedule.indices(step)])
            counts = batching.count_busiest(batches, workers)
            epochs[-1] += counts
            steps[-1] += 1
            several += counts.rows * (len(batches) > 1)
            rows = sorted(map(batching.saved_rows, batches))
            longest = max(longest, sum(rows[-workers:]))
        return StepCounts(epochs, steps, longest, several / max(1.0, total(epochs).rows))

    def workload(
        self,
        depth: FreezeDepth,
        batching: Batching,
        misses: CacheMisses,
        answers: OpCounts,
        workers: int = 1,
    ) -> Workload:
        """The whole run at a depth."""
        config, fast = self._config, isinstance(batching, TokenBatching)
        phases = RunPhases.of(config, len(self._train), len(self._evaluation))
        steps = self.steps(batching, workers)
        trunk, reference = self._first_pass(batching, misses, workers)
        per_batch = steps.epochs[0].pairs / max(1, steps.epochs[0].batches)
        return Workload(
            phases=phases,
            trunk=trunk,
            reference=reference,
            reference_layers=depth.top if config.reference is None else depth.layers,
            epochs=steps.epochs,
            steps=steps.steps,
            two_passes=steps.several * loss_function(config, config.beta).whole_step,
            evaluation=self._held_out(batching, workers),
            evaluation_layers=depth.top if fast else depth.layers,
            # A fast engine has the reference's log-probabilities from the first pass.
            evaluations_before=phases.policy_before + (0 if fast else phases.reference_before),
            recomputed=1 - (1 - misses.without_room) ** per_batch if fast else 0.0,
            answers=answers,
            states_bytes=misses.states_bytes,
        )


def _count_first_pass(
    batching: Batching, misses: CacheMisses, workers: int
) -> tuple[OpCounts, OpCounts]:
    """Through trunk and reference, as FastEngine.prepare groups the pairs."""
    unscored, stateless = set(misses.without_logps), set(misses.without_states)
    first = batching.forward_batches(misses.without_states)
    then = batching.forward_batches([p for p in misses.without_logps if p not in stateless])
    scored = [batch for batch in first if any(pair in unscored for pair in batch)] + then
    return batching.count_busiest(first, workers), batching.count_busiest(scored, workers)


def count_answers(
    prompts: Sequence[int], new_tokens: int, notable: Batch, workers: int = 1
) -> OpCounts:
    """Answers to prompts of so many tokens, and the notable pairs, scored by one model."""
    pairs = [TokenizedPair("", (0,) * n, (0,) * new_tokens, (0,) * new_tokens) for n in prompts]
    batching = TokenBatching()
    batches = batching.forward_batches([*pairs, *notable[:NOTABLE_PAIRS]])
    return batching.count_busiest(batches, workers)
