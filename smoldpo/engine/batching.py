"""How pairs are grouped into batches, and what a batch costs in work and in memory.

An engine takes its batches from its `batching`; a forecast asks the same object, without an engine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch

from smoldpo.engine.cache.keys import pair_key
from smoldpo.engine.layout import ROWS, STEP, TRUNK_ROWS, round_up
from smoldpo.engine.packing import batch_by_length, even_batches, has_prefix, pair_length
from smoldpo.types import TokenizedPair
from smoldpo.utils.workers import shares

STREAM_TOKENS = 1920
"""Tokens of a stream: enough to keep one core's matrix products busy."""
TRAIN_SHARE = 2 / 3
"""Streams with a backward pass have this share: a step of eight usual pairs makes two. Four take a
third more time together, for blocks of rows that are not full, and the LM head's fixed cost."""
STREAM_MULTIPLE = 128
"""Streams are padded to a multiple of this, for few shapes of products (kernels/attention.py)."""

Batch = Sequence[TokenizedPair]
T = TypeVar("T")


@dataclass(frozen=True)
class OpCounts:
    """What some batches put through one decoder layer, and through the LM head."""

    rows: float = 0.0
    """Rows of a layer's products above the freeze boundary, padding included."""
    trunk_rows: float = 0.0
    """The same below the boundary, where the blocks are larger."""
    scores: float = 0.0
    """Attention scores: the sum of the squared lengths of the slots."""
    head_rows: float = 0.0
    batches: int = 0
    pairs: int = 0

    def __add__(self, other: OpCounts) -> OpCounts:
        return OpCounts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def total(parts: Iterable[OpCounts]) -> OpCounts:
    """The sum of all parts."""
    return sum(parts, OpCounts())


@dataclass(frozen=True)
class Batching(ABC):
    """Batches within a budget. A value: halving the budget makes another."""

    budget: int
    """How much goes through the model at once, in `unit`."""

    @property
    @abstractmethod
    def unit(self) -> str:
        """tokens or pairs."""

    @property
    def setting(self) -> str:
        """What the budget is called among a run's settings, and in its metrics."""
        return "stream_tokens" if self.unit == "tokens" else "per_device_train_batch_size"

    @abstractmethod
    def indices(self, pairs: Batch) -> list[list[int]]:
        """Batches of a pass without gradients over `pairs`, as indices into them."""

    @abstractmethod
    def step_batches(self, pairs: Batch) -> list[Batch]:
        """Micro-batches of an optimizer step over `pairs`, in their order."""

    @abstractmethod
    def length(self, pair: TokenizedPair) -> int:
        """Tokens that decide how much memory a pair takes."""

    @abstractmethod
    def saved_rows(self, batch: Batch) -> int:
        """Rows of which a backward pass over `batch` keeps activations."""

    @abstractmethod
    def backward_bytes(
        self, one: int, longest: TokenizedPair, pairs_per_step: int, at_once: int = 1
    ) -> int:
        """Bytes of activations of the largest micro-batches, where `longest` takes `one`.

        Args:
            at_once: micro-batches that are computed at once.
        """

    @abstractmethod
    def halved(self, pairs: Batch) -> Batching | None:
        """Half the budget, for batches of `pairs`; None where each batch held one pair already."""

    @abstractmethod
    def count(self, batch: Batch) -> OpCounts:
        """What one batch computes."""

    def forward_batches(self, pairs: Batch) -> list[Batch]:
        """Batches of a pass without gradients over `pairs`."""
        return [[pairs[index] for index in indices] for indices in self.indices(pairs)]

    def longest(self, pairs: Batch) -> TokenizedPair:
        """The pair that takes the most memory."""
        return max(pairs, key=self.length)

    def count_all(self, batches: Iterable[Batch]) -> OpCounts:
        """What the batches compute together."""
        return total(map(self.count, batches))

    def count_busiest(self, batches: Iterable[Batch], workers: int) -> OpCounts:
        """What the worker computes that has most to do; each takes the next batch when free."""
        counts = [self.count(batch) for batch in batches]
        parts = shares([count.rows for count in counts], workers)
        return max(
            (total(counts[index] for index in part) for part in parts), key=lambda part: part.rows
        )


@dataclass(frozen=True)
class TokenBatching(Batching):
    """The fast engine's: streams of packed pairs, cut by tokens (engine/packing.py)."""

    budget: int = STREAM_TOKENS
    """Tokens of a stream without a backward pass."""
    prefix: tuple[int, ...] = ()
    """Tokens with which most prompts begin; each stream holds them once."""

    @property
    def unit(self) -> str:
        return "tokens"

    def key(self, pair: TokenizedPair) -> str:
        """Under which the pair's trunk states and reference log-probabilities are stored."""
        return pair_key(pair, len(self.prefix) if has_prefix(pair, self.prefix) else 0)

    def indices(self, pairs: Batch) -> list[list[int]]:
        return batch_by_length(pairs, self.budget)

    def step_batches(self, pairs: Batch) -> list[Batch]:
        cut = even_batches(pairs, int(TRAIN_SHARE * self.budget))
        return [[pairs[index] for index in indices] for indices in cut]

    def length(self, pair: TokenizedPair) -> int:
        return pair_length(pair)

    def saved_rows(self, batch: Batch) -> int:
        return round_up(sum(map(pair_length, batch)), STREAM_MULTIPLE)

    def backward_bytes(
        self, one: int, longest: TokenizedPair, pairs_per_step: int, at_once: int = 1
    ) -> int:
        alone = pair_length(longest)
        tokens = min(at_once * max(alone, TRAIN_SHARE * self.budget), pairs_per_step * alone)
        return int(one * round_up(tokens, STREAM_MULTIPLE) / round_up(alone, STREAM_MULTIPLE))

    def halved(self, pairs: Batch) -> TokenBatching | None:
        if TRAIN_SHARE * self.budget <= max(map(pair_length, pairs)):
            return None
        return replace(self, budget=self.budget // 2)

    def count(self, batch: Batch) -> OpCounts:
        sharing = sum(has_prefix(pair, self.prefix) for pair in batch)
        prefix = len(self.prefix) if sharing else 0
        lengths = [pair_length(pair) for pair in batch]
        rows = round_up(prefix + sum(lengths) - sharing * prefix, STREAM_MULTIPLE)
        return OpCounts(
            round_up(rows, ROWS),
            round_up(rows, TRUNK_ROWS),
            sum(round_up(length, STEP) ** 2 for length in [*lengths, prefix]),
            sum(pair.scored_tokens for pair in batch),
            1,
            len(batch),
        )


@dataclass(frozen=True)
class PairBatching(Batching):
    """The plain engine's: a number of pairs, padded; every row goes through the head."""

    eval_budget: int
    """Pairs of a batch without gradients; `budget` is that of a micro-batch with gradients."""

    @property
    def unit(self) -> str:
        return "pairs"

    def indices(self, pairs: Batch) -> list[list[int]]:
        order = sorted(range(len(pairs)), key=lambda index: pairs[index].longest)
        return [list(part) for part in _cut(order, self.eval_budget)]

    def step_batches(self, pairs: Batch) -> list[Batch]:
        return _cut(pairs, self.budget)

    def length(self, pair: TokenizedPair) -> int:
        return pair.longest

    def saved_rows(self, batch: Batch) -> int:
        return 2 * len(batch) * max(pair.longest for pair in batch)

    def backward_bytes(
        self, one: int, longest: TokenizedPair, pairs_per_step: int, at_once: int = 1
    ) -> int:
        return one * min(self.budget, pairs_per_step)

    def halved(self, pairs: Batch) -> PairBatching | None:
        if max(self.budget, self.eval_budget) == 1:
            return None
        return PairBatching(
            max(1, min(self.budget, len(pairs)) // 2), max(1, self.eval_budget // 2)
        )

    def count(self, batch: Batch) -> OpCounts:
        rows = self.saved_rows(batch)
        return OpCounts(rows, 0, rows * (rows // (2 * len(batch))), rows, 1, len(batch))


def _cut(items: Sequence[T], size: int) -> list[Sequence[T]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def saved_for_backward(work: Callable[[], object], weights: Iterable[torch.Tensor]) -> int:
    """Bytes that autograd saves of what `work` computes, each storage once, without `weights`."""
    known = {weight.untyped_storage().data_ptr() for weight in weights}
    saved: dict[int, torch.Tensor] = {}  # holding them, so that no address is used twice

    def pack(tensor: torch.Tensor) -> None:
        address = tensor.untyped_storage().data_ptr()
        if address not in known:
            saved[address] = tensor

    def unpack(_: None) -> torch.Tensor:
        raise RuntimeError("this graph is counted, and has no backward pass")

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        work()
    total = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    saved.clear()  # the graph holds `pack`, so both would never be freed
    return total
