"""How much work a run's parts are, counted from the pairs' lengths by the rules of the engine's packing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache

from smoldpo.config.schema import TrainConfig
from smoldpo.engine import fast, plain
from smoldpo.engine.fast import TRAIN_SHARE
from smoldpo.engine.kernels.attention import STEP
from smoldpo.engine.kernels.layers import ROWS, TRUNK_ROWS
from smoldpo.engine.logprobs import FILL, MAX_TOKENS
from smoldpo.engine.packing import batch_by_tokens, by_length, pair_length, shares
from smoldpo.plan.cache_lookup import NOTHING, Kept
from smoldpo.training.loop import loss_function
from smoldpo.training.phases import RunPhases
from smoldpo.training.sampler import Schedule
from smoldpo.types import TokenizedPair


@dataclass(frozen=True)
class FastPacking:
    """As engine/fast.py lays pairs into streams."""

    budget: int
    """Tokens of a stream without a backward pass."""
    shared: tuple[int, ...] = ()
    """What most prompts begin with."""

    def passes(self, pairs: Sequence[TokenizedPair]) -> list[list[TokenizedPair]]:
        """Streams of a pass without gradients."""
        return [[pairs[i] for i in some] for some in by_length(pairs, self.budget)]

    def step(self, pairs: Sequence[TokenizedPair]) -> list[list[TokenizedPair]]:
        """Streams of an optimizer step."""
        return [[pairs[i] for i in some] for some in batch_by_tokens(pairs, self.step_tokens)]

    @property
    def step_tokens(self) -> int:
        return int(TRAIN_SHARE * self.budget)

    def work(self, stream: Sequence[TokenizedPair]) -> Work:
        """What one stream is."""
        share = [shares(pair, self.shared) for pair in stream]
        head = len(self.shared) if any(share) else 0
        lengths = [pair_length(pair) for pair in stream]
        filled = filled_up(head + sum(lengths) - sum(share) * len(self.shared))
        slots = [_up_to(length, STEP) for length in [*lengths, head]]
        return Work(
            _up_to(filled, ROWS),
            _up_to(filled, TRUNK_ROWS),
            sum(slot * slot for slot in slots),
            sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in stream),
            1,
            len(stream),
        )

    def held(self, stream: Sequence[TokenizedPair]) -> float:
        """Rows of which a backward pass over the stream keeps states."""
        return filled_up(sum(map(pair_length, stream)))

    def longest(self, pairs: Sequence[TokenizedPair]) -> TokenizedPair:
        """The pair that needs the most memory."""
        return max(pairs, key=pair_length)

    def at_once_bytes(self, one: int, longest: TokenizedPair, per_step: int) -> int:
        """What a step keeps for its backward pass at the most, as the engine reckons from `one` pair's."""
        return fast.at_once_bytes(one, pair_length(longest), self.budget, per_step)

    def halved(self, longest: TokenizedPair, pairs: int) -> FastPacking | None:
        """With half the budget, as the engine halves it over so many pairs; None where it does not."""
        fewer = fast.halved(self.budget, pair_length(longest))
        return None if fewer is None else replace(self, budget=fewer)


@dataclass(frozen=True)
class PlainPacking:
    """As engine/plain.py pads pairs; every row goes through the head."""

    budget: int
    """Pairs of a micro-batch."""
    eval_budget: int

    def passes(self, pairs: Sequence[TokenizedPair]) -> list[list[TokenizedPair]]:
        return _cut(sorted(pairs, key=lambda pair: pair.longest), self.eval_budget)

    def step(self, pairs: Sequence[TokenizedPair]) -> list[list[TokenizedPair]]:
        return _cut(list(pairs), self.budget)

    def work(self, stream: Sequence[TokenizedPair]) -> Work:
        longest = max(pair.longest for pair in stream)
        rows = 2 * len(stream) * longest
        return Work(rows, 0, rows * longest, rows, 1, len(stream))

    def held(self, stream: Sequence[TokenizedPair]) -> float:
        return 2 * len(stream) * max(pair.longest for pair in stream)

    def longest(self, pairs: Sequence[TokenizedPair]) -> TokenizedPair:
        return max(pairs, key=lambda pair: pair.longest)

    def at_once_bytes(self, one: int, longest: TokenizedPair, per_step: int) -> int:
        return one * min(self.budget, per_step)

    def halved(self, longest: TokenizedPair, pairs: int) -> PlainPacking | None:
        fewer = plain.halved(self.budget, self.eval_budget, pairs)
        return None if fewer is None else PlainPacking(*fewer)


Packing = FastPacking | PlainPacking


def work_of(packing: Packing, streams: Iterable[Sequence[TokenizedPair]]) -> Work:
    """What these streams are together."""
    return total(packing.work(stream) for stream in streams)


def filled_up(tokens: int) -> int:
    """Length of a stream of so many tokens with what fills it up."""
    return _up_to(tokens, FILL)


def _up_to(number: int, multiple_of: int) -> int:
    return math.ceil(number / multiple_of) * multiple_of


def _cut(pairs: list[TokenizedPair], size: int) -> list[list[TokenizedPair]]:
    return [pairs[start : start + size] for start in range(0, len(pairs), size)]


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


# How much work some passes are: counts alone, without torch.


@dataclass(frozen=True)
class Work:
    """What goes through one layer, and through the head, in some passes over some pairs."""

    rows: float = 0.0
    """Of the products in a layer above the boundary, with what fills up."""
    trunk_rows: float = 0.0
    """The same below the boundary, where the blocks are larger."""
    scores: float = 0.0
    """Of attention: the squares of the slots' lengths, added up."""
    scored: float = 0.0
    """Rows of the head."""
    streams: int = 0
    pairs: int = 0

    def __add__(self, other: Work) -> Work:
        mine, theirs = ([getattr(w, f.name) for f in fields(self)] for w in (self, other))
        return Work(*(a + b for a, b in zip(mine, theirs, strict=True)))


NONE = Work()


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


def total(parts: Iterable[Work]) -> Work:
    """All of them together."""
    return sum(parts, Work())


# What a run does at one depth, counted: which pairs go through what, how often.


READINGS = 9
"""Pairs worth reading of an evaluation, about (evaluation/side_by_side.py)."""


@dataclass(frozen=True)
class Steps:
    """The optimizer steps of a run under one budget, epoch by epoch."""

    epochs: list[Work]
    steps: list[int]
    longest: float
    """Rows of the longest stream with a backward pass."""


class Counts:
    """Each count of a run made once, whatever number of depths asks for it."""

    def __init__(
        self,
        config: TrainConfig,
        train: Sequence[TokenizedPair],
        evaluation: Sequence[TokenizedPair],
    ):
        self.train_pairs = len(train)
        self.steps = cache(lambda packing: count_steps(config, packing, train))
        """The optimizer steps under a packing: Steps."""
        self.evaluation = cache(lambda packing: work_of(packing, packing.passes(evaluation)))
        """All held-out pairs, once: Work."""
        self.once = cache(lambda packing, kept: _once(packing, kept))
        """What goes through trunk and reference: Work, Work; nothing where the engine keeps nothing."""


def count_steps(config: TrainConfig, packing: Packing, train: Sequence[TokenizedPair]) -> Steps:
    """Each step's own pairs, packed as they will be."""
    schedule = Schedule.of(config, len(train))
    epochs: list[Work] = []
    steps: list[int] = []
    longest = 0.0
    for step in range(schedule.total_steps):
        if step % schedule.steps_per_epoch == 0:
            epochs.append(Work())
            steps.append(0)
        streams = packing.step([train[index] for index in schedule.indices(step)])
        epochs[-1] += work_of(packing, streams)
        steps[-1] += 1
        longest = max(longest, *(packing.held(stream) for stream in streams))
    return Steps(epochs, steps, longest)


def load_at(
    config: TrainConfig,
    depth: Depth,
    packing: Packing,
    counts: Counts,
    kept: Kept,
    answers: Work,
) -> Load:
    """What the run does; `kept` is what is there already, and `answers` what is scored of them."""
    fast = isinstance(packing, FastPacking)
    own = config.reference is not None
    steps, evaluation = counts.steps(packing), counts.evaluation(packing)
    trunk, reference = counts.once(packing, kept)
    phases = RunPhases.of(config, counts.train_pairs, evaluation.pairs)
    # A fast engine has the reference's log-probabilities from the first pass.
    before = phases.policy_before + (0 if fast else phases.reference_before)
    per_stream = steps.epochs[0].pairs / max(1, steps.epochs[0].streams)
    return Load(
        trunk=trunk,
        reference=reference,
        reference_layers=depth.layers if own else depth.top,
        epochs=steps.epochs,
        steps=steps.steps,
        two_passes=loss_function(config, config.beta).whole_step,
        evaluation=evaluation,
        evaluation_layers=depth.top if fast else depth.layers,
        before=before,
        between=len(phases.evaluations),
        again=1 - (1 - kept.missing) ** per_stream if fast else 0.0,
        answers=answers,
        states_bytes=kept.states_bytes,
    )


def _once(packing: Packing, kept: Kept) -> tuple[Work, Work]:
    """Through trunk and reference, as FastEngine.prepare groups the pairs."""
    if kept is NOTHING:
        return Work(), Work()
    unscored = set(kept.without_logps)
    stateless = set(kept.without_states)
    first = packing.passes(kept.without_states)
    then = packing.passes([pair for pair in kept.without_logps if pair not in stateless])
    scoring = [stream for stream in first if any(pair in unscored for pair in stream)] + then
    return work_of(packing, first), work_of(packing, scoring)


def answers_work(
    prompts: Sequence[int], new_tokens: int, evaluation: Sequence[TokenizedPair], read: bool
) -> Work:
    """Both models' answers to prompts of so many tokens, and the pairs worth reading, to be scored."""
    pairs = [TokenizedPair("", (0,) * n, (0,) * new_tokens, (0,) * new_tokens) for n in prompts]
    pairs += evaluation[:READINGS] if read else []
    if not pairs:
        return Work()
    packing = FastPacking(MAX_TOKENS)
    return work_of(packing, packing.passes(pairs))
