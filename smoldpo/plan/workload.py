"""How much a run computes: its batches by the engine's rules, its phases by the run's own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from smoldpo.config.schema import TrainConfig
from smoldpo.engine import fast, plain
from smoldpo.engine.fast import TRAIN_SHARE
from smoldpo.engine.kernels.attention import STEP
from smoldpo.engine.kernels.layers import ROWS, TRUNK_ROWS
from smoldpo.engine.logprobs import FILL, MAX_TOKENS
from smoldpo.engine.packing import batch_by_tokens, by_length, pair_length, shares
from smoldpo.plan.cache_lookup import CacheMisses
from smoldpo.plan.depths import FreezeDepth
from smoldpo.training.loop import loss_function
from smoldpo.training.phases import RunPhases
from smoldpo.training.sampler import Schedule
from smoldpo.types import TokenizedPair

NOTABLE_PAIRS = 9
"""Pairs of an evaluation that are scored token by token, about (evaluation/side_by_side.py)."""
Batch = Sequence[TokenizedPair]


@dataclass(frozen=True)
class OpCounts:
    """What some batches put through one decoder layer, and through the LM head."""

    rows: float = 0.0
    """Rows of the products in a layer above the boundary, filled up to whole blocks."""
    trunk_rows: float = 0.0  # The same below the boundary, where blocks are larger
    scores: float = 0.0  # Attention scores: the sum of the squares of the slots' lengths
    head_rows: float = 0.0
    batches: int = 0
    pairs: int = 0

    def __add__(self, other: OpCounts) -> OpCounts:
        both = zip(vars(self).values(), vars(other).values(), strict=True)
        return OpCounts(*(a + b for a, b in both))


def total(parts: Iterable[OpCounts]) -> OpCounts:
    """The sum of all parts."""
    return sum(parts, OpCounts())


@dataclass(frozen=True)
class FastBatching:
    """How the fast engine cuts pairs into streams (engine/fast.py)."""

    budget: int  # Tokens of a stream without a backward pass
    shared: tuple[int, ...] = ()  # The tokens with which most prompts begin

    def forward_batches(self, pairs: Batch) -> list[Batch]:
        """Batches of a pass without gradients."""
        return [[pairs[i] for i in some] for some in by_length(pairs, self.budget)]

    def step_batches(self, pairs: Batch) -> list[Batch]:
        """Batches of an optimizer step."""
        tokens = int(TRAIN_SHARE * self.budget)
        return [[pairs[i] for i in some] for some in batch_by_tokens(pairs, tokens)]

    def count(self, batch: Batch) -> OpCounts:
        share = [shares(pair, self.shared) for pair in batch]
        head = len(self.shared) if any(share) else 0
        lengths = [pair_length(pair) for pair in batch]
        filled = round_up(head + sum(lengths) - sum(share) * len(self.shared), FILL)
        slots = [round_up(length, STEP) for length in [*lengths, head]]
        return OpCounts(
            round_up(filled, ROWS),
            round_up(filled, TRUNK_ROWS),
            sum(slot * slot for slot in slots),
            sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in batch),
            1,
            len(batch),
        )

    def saved_rows(self, batch: Batch) -> float:
        """Rows of which a backward pass over the batch keeps states."""
        return round_up(sum(map(pair_length, batch)), FILL)

    def longest(self, pairs: Batch) -> TokenizedPair:
        """The pair that needs the most memory."""
        return max(pairs, key=pair_length)

    def backward_bytes(self, one: int, longest: TokenizedPair, pairs_per_step: int) -> int:
        """Bytes that a step keeps at most for its backward pass, given those of the longest."""
        return fast.at_once_bytes(one, pair_length(longest), self.budget, pairs_per_step)

    def halved(self, longest: TokenizedPair, pairs: int) -> FastBatching | None:
        """With half the budget; None where the engine would not halve it over so many pairs."""
        fewer = fast.halved(self.budget, pair_length(longest))
        return None if fewer is None else replace(self, budget=fewer)


@dataclass(frozen=True)
class PlainBatching:
    """How the plain engine cuts pairs into padded batches (engine/plain.py)."""

    budget: int  # Pairs of a micro-batch
    eval_budget: int

    def forward_batches(self, pairs: Batch) -> list[Batch]:
        by_longest = sorted(pairs, key=lambda pair: pair.longest)
        return [
            by_longest[i : i + self.eval_budget] for i in range(0, len(pairs), self.eval_budget)
        ]

    def step_batches(self, pairs: Batch) -> list[Batch]:
        return [pairs[i : i + self.budget] for i in range(0, len(pairs), self.budget)]

    def count(self, batch: Batch) -> OpCounts:
        rows = self.saved_rows(batch)  # every row goes through the head as well
        longest = max(pair.longest for pair in batch)
        return OpCounts(rows, 0, rows * longest, rows, 1, len(batch))

    def saved_rows(self, batch: Batch) -> float:
        return 2 * len(batch) * max(pair.longest for pair in batch)

    def longest(self, pairs: Batch) -> TokenizedPair:
        return max(pairs, key=lambda pair: pair.longest)

    def backward_bytes(self, one: int, longest: TokenizedPair, pairs_per_step: int) -> int:
        return one * min(self.budget, pairs_per_step)

    def halved(self, longest: TokenizedPair, pairs: int) -> PlainBatching | None:
        fewer = plain.halved(self.budget, self.eval_budget, pairs)
        return None if fewer is None else PlainBatching(*fewer)


Batching = FastBatching | PlainBatching


def round_up(number: float, multiple_of: int) -> int:
    """The next multiple."""
    return math.ceil(number / multiple_of) * multiple_of


def count_batches(batching: Batching, batches: Iterable[Batch]) -> OpCounts:
    """All batches together."""
    return total(batching.count(batch) for batch in batches)


@dataclass(frozen=True)
class Workload:
    """What a run computes at one depth."""

    phases: RunPhases
    trunk: OpCounts = OpCounts()
    """Pairs whose trunk states are not cached: once through the frozen layers."""
    reference: OpCounts = OpCounts()  # Pairs whose reference log-probabilities are not cached
    reference_layers: int = 0  # Layers that the reference still has to run for them
    epochs: Sequence[OpCounts] = ()
    steps: Sequence[int] = ()  # Optimizer steps of each epoch
    two_passes: bool = False
    """Whether the loss needs all log-probabilities of a step before it is differentiated."""
    evaluation: OpCounts = OpCounts()  # All held-out pairs, once
    evaluation_layers: int = 0
    evaluations_before: int = 0
    """Passes over the held-out pairs before training, besides those in `reference`."""
    recomputed: float = 0.0
    """Share of the batches whose trunk states find no room, and are computed each time."""
    answers: OpCounts = OpCounts()  # Answers and notable pairs that one model scores token by token
    states_bytes: float = 0.0  # Trunk states that are written


@dataclass(frozen=True)
class StepCounts:
    """The optimizer steps of a run, by epoch."""

    epochs: list[OpCounts]
    steps: list[int]
    longest: float  # Rows of the longest batch with a backward pass


class RunCounter:
    """Counts what a run computes; what is the same at several depths is counted once."""

    def __init__(self, config: TrainConfig, train: Batch, evaluation: Batch):
        self._config, self._train, self._evaluation = config, train, evaluation
        self.steps = cache(self._count_steps)
        self._held_out = cache(lambda b: count_batches(b, b.forward_batches(evaluation)))
        self._first_pass = cache(_count_first_pass)

    def _count_steps(self, batching: Batching) -> StepCounts:
        """Each step's own pairs, as this batching cuts them."""
        schedule = Schedule.of(self._config, len(self._train))
        epochs: list[OpCounts] = []
        steps: list[int] = []
        longest = 0.0
        for step in range(schedule.total_steps):
            if step % schedule.steps_per_epoch == 0:
                epochs.append(OpCounts())
                steps.append(0)
            batches = batching.step_batches([self._train[i] for i in schedule.indices(step)])
            epochs[-1] += count_batches(batching, batches)
            steps[-1] += 1
            longest = max(longest, *(batching.saved_rows(batch) for batch in batches))
        return StepCounts(epochs, steps, longest)

    def workload(
        self, depth: FreezeDepth, batching: Batching, misses: CacheMisses, answers: OpCounts
    ) -> Workload:
        """The whole run at a depth."""
        config, fast = self._config, isinstance(batching, FastBatching)
        phases = RunPhases.of(config, len(self._train), len(self._evaluation))
        steps, (trunk, reference) = self.steps(batching), self._first_pass(batching, misses)
        per_batch = steps.epochs[0].pairs / max(1, steps.epochs[0].batches)
        return Workload(
            phases=phases,
            trunk=trunk,
            reference=reference,
            reference_layers=depth.top if config.reference is None else depth.layers,
            epochs=steps.epochs,
            steps=steps.steps,
            two_passes=loss_function(config, config.beta).whole_step,
            evaluation=self._held_out(batching),
            evaluation_layers=depth.top if fast else depth.layers,
            # A fast engine has the reference's log-probabilities from the first pass.
            evaluations_before=phases.policy_before + (0 if fast else phases.reference_before),
            recomputed=1 - (1 - misses.without_room) ** per_batch if fast else 0.0,
            answers=answers,
            states_bytes=misses.states_bytes,
        )


def _count_first_pass(batching: Batching, misses: CacheMisses) -> tuple[OpCounts, OpCounts]:
    """Through trunk and reference, as FastEngine.prepare groups the pairs."""
    unscored, stateless = set(misses.without_logps), set(misses.without_states)
    first = batching.forward_batches(misses.without_states)
    then = batching.forward_batches([p for p in misses.without_logps if p not in stateless])
    scored = [batch for batch in first if any(pair in unscored for pair in batch)] + then
    return count_batches(batching, first), count_batches(batching, scored)


def count_answers(prompts: Sequence[int], new_tokens: int, notable: Batch) -> OpCounts:
    """Answers to prompts of so many tokens, and the notable pairs, scored by one model."""
    pairs = [TokenizedPair("", (0,) * n, (0,) * new_tokens, (0,) * new_tokens) for n in prompts]
    batching = FastBatching(MAX_TOKENS)
    return count_batches(batching, batching.forward_batches([*pairs, *notable[:NOTABLE_PAIRS]]))
