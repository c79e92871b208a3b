"""How much work a run's parts are, counted from the pairs' lengths by the rules of the engine's packing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from smoldpo.engine import fast, plain
from smoldpo.engine.fast import TRAIN_SHARE
from smoldpo.engine.packing import by_length, cut_by_tokens, pair_length, shares
from smoldpo.engine.scorer import FILL
from smoldpo.models.attention import STEP
from smoldpo.models.lean import ROWS, TRUNK_ROWS
from smoldpo.plan.work import Work, total
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
        return [[pairs[i] for i in some] for some in cut_by_tokens(pairs, self.step_tokens)]

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
