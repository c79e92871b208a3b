"""The pairs of the dry run: some of the run's own, short ones and long ones, at its real lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from smoldpo.engine.packing import pair_length
from smoldpo.types import TokenizedPair


@dataclass(frozen=True)
class Samples:
    """Pairs of the shorter half and of the longer half, evenly spaced by length."""

    short: list[TokenizedPair]
    long: list[TokenizedPair]

    @property
    def both(self) -> tuple[list[TokenizedPair], list[TokenizedPair]]:
        return self.short, self.long


def step_samples(pairs: Sequence[TokenizedPair], count: int) -> Samples:
    """What one step each goes through: so many pairs."""
    short, long = _halves(pairs)
    return Samples(evenly(short, count), evenly(long, count))


def stream_samples(pairs: Sequence[TokenizedPair], tokens: int) -> Samples:
    """What fills one stream of so many tokens each."""
    return Samples(*(evenly(half, _that_fit(half, tokens)) for half in _halves(pairs)))


def _halves(pairs: Sequence[TokenizedPair]) -> tuple[list[TokenizedPair], list[TokenizedPair]]:
    order = sorted(pairs, key=pair_length)
    middle = len(order) // 2
    return order[:middle] or order, order[middle:]


def _that_fit(pairs: Sequence[TokenizedPair], tokens: int) -> int:
    count = max(1, int(tokens * len(pairs) / sum(map(pair_length, pairs))))
    while count > 1 and sum(map(pair_length, evenly(pairs, count))) > tokens:
        count -= 1
    return count


def evenly(pairs: Sequence[TokenizedPair], count: int) -> list[TokenizedPair]:
    """So many of them, or all, evenly spaced."""
    count = min(count, len(pairs))
    return [pairs[int((at + 0.5) * len(pairs) / count)] for at in range(count)]


def disguised(pairs: Sequence[TokenizedPair], salt: int) -> list[TokenizedPair]:
    """Pairs of the same lengths with other answers, so that nothing kept for the first serves them."""
    return [
        replace(
            pair,
            id=f"{pair.id}#{salt}",
            chosen_ids=_moved(pair.chosen_ids, pair, salt),
            rejected_ids=_moved(pair.rejected_ids, pair, salt),
        )
        for pair in pairs
    ]


def _moved(ids: tuple[int, ...], pair: TokenizedPair, salt: int) -> tuple[int, ...]:
    words = max(*pair.prompt_ids, *pair.chosen_ids, *pair.rejected_ids) + 1
    return tuple((token + salt) % words for token in ids)
