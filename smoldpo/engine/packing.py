"""Pairs as token streams, without padding and with what several share only once.

A pair with prompt P, chosen C and rejected R becomes one segment P C R of the stream:

    token      p0 p1 p2 | c0 c1 | r0 r1
    position    0  1  2 |  3  4 |  3  4      R stands where C stands: right behind P
    sees        causal  | P, C  | P, R       R does not see C

Causal attention makes this exact: P's states depend on P alone, so computing them once for both sides
gives the same numbers; C and R each see just what they would see alone behind P. Pairs follow one another
in the stream and do not see each other, so nothing is padded.

For the same reason the beginning that most prompts have in common, a chat template's system message, stands
once at the head of the stream, and each pair that begins with it goes on from there:

    S | P' C R | P' C R | ...      P = S P', and P', C and R see S
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from smoldpo.engine.kernels.attention import STEP, shared_prefix_mask
from smoldpo.engine.kernels.flex_attention import FILLING, SHARED
from smoldpo.types import PairLogps, TokenizedPair

MIN_SHARED_PREFIX = 8
"""A common beginning of fewer tokens is left to each pair."""


@dataclass(frozen=True)
class Segment:
    """Where one pair lies in the stream: its first own token, and the tokens of P, C and R.

    `shared` of P's tokens are not its own: they stand at the head of the stream.
    """

    start: int
    prompt: int
    chosen: int
    rejected: int
    shared: int = 0

    @property
    def length(self) -> int:
        """Tokens that are the pair's own."""
        return self.prompt + self.chosen + self.rejected - self.shared

    @property
    def tokens(self) -> list[range]:
        """Where all tokens of P C R stand in the stream, in their order."""
        return [range(self.shared), range(self.start, self.start + self.length)]

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.prompt, self.chosen, self.rejected


@dataclass(frozen=True)
class Slot:
    """A pair's place inside attention, filled up to a multiple of STEP rows (engine/kernels/attention.py)."""

    start: int
    segment: Segment
    _masks: dict[Any, torch.Tensor] = field(default_factory=dict, compare=False, repr=False)

    @property
    def prompt(self) -> int:
        return self.segment.prompt

    @property
    def shared(self) -> int:
        return self.segment.shared

    @property
    def length(self) -> int:
        return _up_to(sum(self.segment.shape), STEP)

    def bias(self, window: int | None, like: torch.Tensor) -> torch.Tensor:
        """[n, n] to be added to scores: -inf where a query must not look; made once for all layers.

        Rows that fill up see the first key, so that their softmax is a number, and no query sees them.
        """
        key = (window, like.dtype, like.device)
        if key not in self._masks:
            real = sum(self.segment.shape)
            visible = torch.zeros(self.length, self.length, dtype=torch.bool)
            visible[:real, :real] = shared_prefix_mask(*self.segment.shape, window=window)
            visible[real:, 0] = True
            bias = torch.zeros(visible.shape, dtype=like.dtype)
            self._masks[key] = bias.masked_fill_(~visible, float("-inf")).to(like.device)
        return self._masks[key]


@dataclass(frozen=True)
class Stream:
    """For each token [T]: whose it is, which part, and where it stands; see kernels/flex_attention.py."""

    pair: torch.Tensor
    part: torch.Tensor
    position: torch.Tensor
    goes_on: torch.Tensor
    masks: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, segments: Sequence[Segment], position: torch.Tensor) -> Stream:
        """From where the pairs lie, and each token's position [T]."""
        device, position = position.device, position.cpu()
        pair = torch.full_like(position, FILLING)
        part, goes_on = torch.zeros_like(position), torch.zeros_like(position, dtype=torch.bool)
        for number, segment in enumerate(segments):
            end = segment.start + segment.length
            pair[: segment.shared] = SHARED
            pair[segment.start : end] = number
            goes_on[segment.start : end] = segment.shared > 0
            part[end - segment.rejected - segment.chosen : end] = 1
            part[end - segment.rejected : end] = 2
        return cls(*(each.to(device) for each in (pair, part, position, goes_on)))


@dataclass(frozen=True)
class Layout:
    """All slots, and the way there and back. What pairs share has a slot of its own, the first."""

    slots: tuple[Slot, ...]
    spread: torch.Tensor
    """[S] the token for each row of the slots; a slot's first where it is filled up."""
    gather: torch.Tensor  # [tokens] the row of the slots that is each token's own
    copies: torch.Tensor
    """[pairs that share, tokens shared] the rows of the slots that hold what is shared."""
    segments: tuple[Segment, ...]
    position: torch.Tensor
    """[T] of each token."""

    @functools.cached_property
    def stream(self) -> Stream:
        """What FlexAttention asks for; built where it is asked for."""
        return Stream.of(self.segments, self.position)

    @classmethod
    def of(cls, segments: Sequence[Segment], position: torch.Tensor) -> Layout:
        """Slots one after another, in the order of the segments; `position` of each token [T]."""
        device = position.device
        shared = max((segment.shared for segment in segments), default=0)
        head = [Segment(0, shared, 0, 0)] if shared else []
        slots, copies = [], []
        spread: list[int] = []
        gather: list[int] = []
        for segment in [*head, *segments]:
            slot = Slot(len(spread), segment)
            before, own = segment.tokens
            gather += range(slot.start + len(before), slot.start + len(before) + len(own))
            spread += [*before, *own]
            spread += [spread[slot.start]] * (slot.start + slot.length - len(spread))
            slots.append(slot)
            if before:
                copies.append([*range(slot.start, slot.start + len(before))])
        parts = (
            torch.tensor(part, device=device, dtype=torch.long) for part in (spread, gather, copies)
        )
        return cls(tuple(slots), *parts, tuple(segments), position)


@dataclass(frozen=True)
class PackedBatch:
    """A stream of T tokens of B pairs, and the N positions in it whose predictions are scored."""

    segments: tuple[Segment, ...]
    layout: Layout
    input_ids: torch.Tensor  # [1, T]
    position_ids: torch.Tensor  # [1, T]
    rows: torch.Tensor
    """[M] stream positions whose final states are read: each P's last token, C, R."""
    predictors: torch.Tensor  # [N] which of `rows` predicts; the last of P predicts c0 and r0 both
    targets: torch.Tensor  # [N] the tokens they are to predict
    sides: torch.Tensor
    """[N] row of the result: b for the chosen side of pair b, B + b for its rejected."""
    tail: torch.Tensor
    """[N] True behind as many tokens as the pair's shorter completion has."""

    def logps(self, token_logps: torch.Tensor, squares: torch.Tensor | None = None) -> PairLogps:
        """Sum token log-probabilities [N], and `squares` [N], over each completion: tensors of [B]."""
        parts = [token_logps, torch.where(self.tail, token_logps, 0.0)]
        parts += [] if squares is None else [squares]
        sums = (self._summed(part) for part in parts)
        return PairLogps(*(side for both in sums for side in both))

    def _summed(self, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Values of tokens [N] added up over each completion: chosen [B], rejected [B]."""
        zeros = values.new_zeros(2 * len(self.segments))
        return zeros.index_add(0, self.sides, values).chunk(2)

    def __str__(self) -> str:
        """The attention mask, drawn: a row a query, a column a key, # where it looks."""
        drawn = []
        for slot in self.layout.slots:
            visible = shared_prefix_mask(*slot.segment.shape)
            before, own = slot.segment.tokens
            columns = [*before, *own]
            for query in range(len(before), len(columns)):
                row = [" "] * (columns[-1] + 1)
                for key, column in enumerate(columns):
                    row[column] = "#" if visible[query, key] else "."
                drawn.append("".join(row))
        return "\n".join(drawn)


def pair_length(pair: TokenizedPair) -> int:
    """Tokens of a pair in the stream."""
    return len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids)


def pack(
    pairs: Sequence[TokenizedPair],
    device: torch.device | str = "cpu",
    multiple_of: int = 1,
    shared: tuple[int, ...] = (),
) -> PackedBatch:
    """Lay pairs one after another into one stream, filled up to a multiple of so many tokens.

    What fills up belongs to no pair: it sees nothing, is seen by nothing, and nothing of it is read.

    Args:
        shared: tokens with which most prompts begin; they stand once at the head of the stream.
    """
    share = [shares(pair, shared) for pair in pairs]
    ids: list[int] = list(shared) if any(share) else []
    positions: list[int] = list(range(len(ids)))
    rows: list[int] = []
    predictors: list[int] = []
    targets: list[int] = []
    sides: list[int] = []
    tail: list[bool] = []
    segments = []
    for number, pair in enumerate(pairs):
        begun = len(shared) if share[number] else 0
        start, prompt = len(ids), len(pair.prompt_ids)
        segment = Segment(start, prompt, len(pair.chosen_ids), len(pair.rejected_ids), begun)
        last_of_prompt = len(rows)
        rows += range(start + prompt - begun - 1, start + segment.length)
        ids += pair.prompt_ids[begun:]
        positions += range(begun, prompt)
        first, shorter = last_of_prompt + 1, pair.shorter
        for side, completion in ((0, pair.chosen_ids), (1, pair.rejected_ids)):
            ids += completion
            positions += range(prompt, prompt + len(completion))
            predictors += [last_of_prompt, *range(first, first + len(completion) - 1)]
            first += len(completion)
            targets += completion
            sides += [side * len(pairs) + number] * len(completion)
            tail += [False] * shorter + [True] * (len(completion) - shorter)
        segments.append(segment)
    filling = [0] * (_up_to(len(ids), multiple_of) - len(ids))
    input_ids, position_ids = (
        torch.tensor([part + filling], device=device) for part in (ids, positions)
    )
    return PackedBatch(
        tuple(segments),
        Layout.of(segments, position_ids[0]),
        input_ids,
        position_ids,
        *(torch.tensor(part, device=device) for part in (rows, predictors, targets, sides, tail)),
    )


def shares(pair: TokenizedPair, shared: tuple[int, ...]) -> bool:
    """Whether the pair's prompt begins with these tokens and goes on."""
    return bool(shared) and len(pair.prompt_ids) > len(shared) == _common(pair.prompt_ids, shared)


def _common(some: tuple[int, ...], other: tuple[int, ...]) -> int:
    length = min(len(some), len(other))
    return next((i for i in range(length) if some[i] != other[i]), length)


def common_prefix(pairs: Sequence[TokenizedPair]) -> tuple[int, ...]:
    """The longest run of tokens with which more than half of all prompts begin, and go on.

    Empty where it has less than MIN_SHARED_PREFIX tokens. It is a property of the whole data and not of a
    stream, so that what is computed for a pair does not depend on the pairs beside it.
    """
    begun: list[int] = []
    left = [pair.prompt_ids for pair in pairs]
    while True:
        depth = len(begun)
        following = Counter(ids[depth] for ids in left if len(ids) > depth + 1)
        token, count = following.most_common(1)[0] if following else (0, 0)
        if 2 * count <= len(pairs) or count < 2:
            return tuple(begun) if len(begun) >= MIN_SHARED_PREFIX else ()
        begun.append(token)
        left = [ids for ids in left if len(ids) > depth + 1 and ids[depth] == token]


def _up_to(number: int, multiple_of: int) -> int:
    return -(-number // multiple_of) * multiple_of


def batch_by_tokens(pairs: Sequence[TokenizedPair], max_tokens: int) -> list[list[int]]:
    """Cut pairs, in their order, into batches of at most `max_tokens`; a longer pair goes alone.

    Returns lists of indices into `pairs`.
    """
    batches: list[list[int]] = []
    room = 0
    for index, pair in enumerate(pairs):
        length = pair_length(pair)
        if length > room or not batches:
            batches.append([])
            room = max_tokens
        batches[-1].append(index)
        room -= length
    return batches


def by_length(pairs: Sequence[TokenizedPair], max_tokens: int) -> list[list[int]]:
    """Like `batch_by_tokens`, over the pairs from long to short: the largest batch comes first."""
    order = sorted(range(len(pairs)), key=lambda index: -pair_length(pairs[index]))
    batches = batch_by_tokens([pairs[index] for index in order], max_tokens)
    return [[order[place] for place in batch] for batch in batches]
