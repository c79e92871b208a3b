"""Pairs as token streams, without padding and with each prompt only once.

A pair with prompt P, chosen C and rejected R becomes one segment P C R of the stream:

    token      p0 p1 p2 | c0 c1 | r0 r1
    position    0  1  2 |  3  4 |  3  4      R stands where C stands: right behind P
    sees        causal  | P, C  | P, R       R does not see C

Causal attention makes this exact: P's states depend on P alone, so computing them once for both sides
gives the same numbers; C and R each see just what they would see alone behind P. Pairs follow one another
in the stream and do not see each other, so nothing is padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from smoldpo.models.attention import STEP
from smoldpo.models.masks import shared_prefix_mask
from smoldpo.types import PairLogps, TokenizedPair


@dataclass(frozen=True)
class Segment:
    """Where one pair lies in the stream: its first token, and the tokens of P, C and R."""

    start: int
    prompt: int
    chosen: int
    rejected: int

    @property
    def length(self) -> int:
        return self.prompt + self.chosen + self.rejected

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.prompt, self.chosen, self.rejected


@dataclass(frozen=True)
class Slot:
    """A pair's place inside attention, filled up to a multiple of STEP rows (models/attention.py)."""

    start: int
    segment: Segment
    _masks: dict[Any, torch.Tensor] = field(default_factory=dict, compare=False, repr=False)

    @property
    def prompt(self) -> int:
        return self.segment.prompt

    @property
    def length(self) -> int:
        return _up_to(self.segment.length, STEP)

    def bias(self, window: int | None, like: torch.Tensor) -> torch.Tensor:
        """[n, n] to be added to scores: -inf where a query must not look; made once for all layers.

        Rows that fill up see the first key, so that their softmax is a number, and no query sees them.
        """
        key = (window, like.dtype, like.device)
        if key not in self._masks:
            real = self.segment.length
            visible = torch.zeros(self.length, self.length, dtype=torch.bool)
            visible[:real, :real] = shared_prefix_mask(*self.segment.shape, window=window)
            visible[real:, 0] = True
            bias = torch.zeros(visible.shape, dtype=like.dtype)
            self._masks[key] = bias.masked_fill_(~visible, float("-inf")).to(like.device)
        return self._masks[key]


@dataclass(frozen=True)
class Layout:
    """All slots, and the way there and back."""

    slots: tuple[Slot, ...]
    spread: (
        torch.Tensor
    )  # [S] the token for each row of the slots; a pair's first where a slot is filled up
    gather: torch.Tensor  # [tokens of all pairs] the row of the slots for each of them

    @classmethod
    def of(cls, segments: Sequence[Segment], device: torch.device | str) -> Layout:
        """Slots one after another, in the order of the segments."""
        slots, spread, gather = [], [], []
        for segment in segments:
            slot = Slot(len(spread), segment)
            gather += range(slot.start, slot.start + segment.length)
            spread += range(segment.start, segment.start + segment.length)
            spread += [segment.start] * (slot.length - segment.length)
            slots.append(slot)
        return cls(tuple(slots), *(torch.tensor(part, device=device) for part in (spread, gather)))


@dataclass(frozen=True)
class PackedBatch:
    """A stream of T tokens of B pairs, and the N positions in it whose predictions are scored."""

    segments: tuple[Segment, ...]
    layout: Layout
    input_ids: torch.Tensor  # [1, T]
    position_ids: torch.Tensor  # [1, T]
    rows: (
        torch.Tensor
    )  # [M] stream positions whose final states are read: each P's last token, C, R
    predictors: torch.Tensor  # [N] which of `rows` predicts; the last of P predicts c0 and r0 both
    targets: torch.Tensor  # [N] the tokens they are to predict
    sides: (
        torch.Tensor
    )  # [N] row of the result: b for the chosen side of pair b, B + b for its rejected

    def logps(self, token_logps: torch.Tensor) -> PairLogps:
        """Sum token log-probabilities [N] over each completion: two tensors of [B]."""
        pairs = len(self.segments)
        zeros = token_logps.new_zeros(2 * pairs)
        chosen, rejected = zeros.index_add(0, self.sides, token_logps).chunk(2)
        return PairLogps(chosen, rejected)

    def __str__(self) -> str:
        """The attention mask, drawn: a row a query, a column a key, # where it looks."""
        rows = []
        for segment in self.segments:
            visible = shared_prefix_mask(*segment.shape)
            rows += [
                " " * segment.start + "".join("#" if seen else "." for seen in row)
                for row in visible
            ]
        return "\n".join(rows)


def pair_length(pair: TokenizedPair) -> int:
    """Tokens of a pair in the stream."""
    return len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids)


def pack(
    pairs: Sequence[TokenizedPair], device: torch.device | str = "cpu", multiple_of: int = 1
) -> PackedBatch:
    """Lay pairs one after another into one stream, filled up to a multiple of so many tokens.

    What fills up belongs to no pair: it sees nothing, is seen by nothing, and nothing of it is read.
    """
    ids: list[int] = []
    positions: list[int] = []
    rows: list[int] = []
    predictors: list[int] = []
    targets: list[int] = []
    sides: list[int] = []
    segments = []
    for number, pair in enumerate(pairs):
        start, prompt = len(ids), len(pair.prompt_ids)
        last_of_prompt = len(rows)
        rows += range(start + prompt - 1, start + pair_length(pair))
        ids += pair.prompt_ids
        positions += range(prompt)
        for side, completion in ((0, pair.chosen_ids), (1, pair.rejected_ids)):
            first = last_of_prompt + 1 + len(ids) - start - prompt
            ids += completion
            positions += range(prompt, prompt + len(completion))
            predictors += [last_of_prompt, *range(first, first + len(completion) - 1)]
            targets += completion
            sides += [side * len(pairs) + number] * len(completion)
        segments.append(Segment(start, prompt, len(pair.chosen_ids), len(pair.rejected_ids)))
    filling = _up_to(len(ids), multiple_of) - len(ids)
    ids += [0] * filling
    positions += [0] * filling
    return PackedBatch(
        tuple(segments),
        Layout.of(segments, device),
        *(torch.tensor([part], device=device) for part in (ids, positions)),
        *(torch.tensor(part, device=device) for part in (rows, predictors, targets, sides)),
    )


def _up_to(number: int, multiple_of: int) -> int:
    return -(-number // multiple_of) * multiple_of


def cut_by_tokens(pairs: Sequence[TokenizedPair], max_tokens: int) -> list[list[int]]:
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
    """Like `cut_by_tokens`, over the pairs from long to short: the largest batch comes first."""
    order = sorted(range(len(pairs)), key=lambda index: -pair_length(pairs[index]))
    batches = cut_by_tokens([pairs[index] for index in order], max_tokens)
    return [[order[place] for place in batch] for batch in batches]
