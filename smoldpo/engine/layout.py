"""Where pairs lie in a token stream and who sees whom (engine/packing.py); sizes of computation.

Dimensions: T tokens of the stream, n rows of one slot, S rows of all slots.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.attention.flex_attention import BlockMask

STEP = 32
"""Slots' lengths are multiples of this: few enough shapes, and little padding."""
ROWS = 256
"""Rows of a forward product on a CPU, and of what is done between products to stay in its cache."""
TRUNK_ROWS = 960
"""The same below the freeze boundary: the fastest for SmolLM2-135M on AMX."""
PREFIX, PADDING = -1, -2
"""Instead of a pair's number: tokens that many pairs share, and tokens that pad the stream."""


@dataclass(frozen=True)
class Segment:
    """Where one pair lies in the stream: its first own token, and the tokens of P, C and R.

    `shared` of P's tokens are not its own: they are the prefix at the head of the stream.
    """

    start: int
    prompt: int
    chosen: int
    rejected: int
    shared: int = 0

    @property
    def length(self) -> int:
        """Tokens that are the pair's own."""
        return self.total - self.shared

    @property
    def total(self) -> int:
        """Tokens of P, C and R, the shared ones included."""
        return self.prompt + self.chosen + self.rejected

    @property
    def tokens(self) -> list[range]:
        """Where all tokens of P C R are in the stream, in their order."""
        return [range(self.shared), range(self.start, self.start + self.length)]

    def mask(self, window: int | None = None) -> torch.Tensor:
        """[total, total] booleans: True where the query (row) sees the key (column).

        `window`: a query sees the keys less than this many positions before it (sliding attention).
        """
        order = torch.arange(self.total)
        is_rejected = order >= self.prompt + self.chosen
        is_chosen = (order >= self.prompt) & ~is_rejected
        visible = order[:, None] >= order[None, :]
        visible &= ~(is_rejected[:, None] & is_chosen[None, :])
        if window is not None:
            position = torch.where(is_rejected, order - self.chosen, order)
            visible &= position[:, None] - position[None, :] < window
        return visible


_PARTS = ("start", "prompt", "chosen", "rejected", "shared")


@dataclass(frozen=True)
class Slot:
    """A pair's place inside attention, from row `start`, padded to a multiple of STEP rows."""

    start: int
    segment: Segment
    _masks: dict[object, torch.Tensor] = field(default_factory=dict, compare=False, repr=False)

    @property
    def length(self) -> int:
        return round_up(self.segment.total, STEP)

    def bias(self, window: int | None, like: torch.Tensor) -> torch.Tensor:
        """[n, n] to be added to scores: -inf where a query must not look; made once for all layers.

        Padding sees the first key, so that its softmax is a number, and no query sees padding.
        """
        key = (window, like.dtype, like.device)
        if key not in self._masks:
            real = self.segment.total
            visible = torch.zeros(self.length, self.length, dtype=torch.bool)
            visible[:real, :real] = self.segment.mask(window)
            visible[real:, 0] = True
            bias = torch.zeros(visible.shape, dtype=like.dtype)
            self._masks[key] = bias.masked_fill_(~visible, float("-inf")).to(like.device)
        return self._masks[key]


@dataclass(frozen=True)
class Stream:
    """Pair, part and position of each token [T] (kernels/flex_attention.py)."""

    pair: torch.Tensor
    """Number of its pair, PREFIX or PADDING."""
    part: torch.Tensor
    """0 prompt, 1 chosen, 2 rejected."""
    position: torch.Tensor
    after_prefix: torch.Tensor
    """Whether its pair goes on from the prefix."""
    masks: dict[int | None, BlockMask] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class Layout:
    """All slots, and the way there and back. The shared prefix has a slot of its own, the first."""

    segments: tuple[Segment, ...]
    position: torch.Tensor
    """[T] of each token."""
    slots: tuple[Slot, ...]
    token_of_row: torch.Tensor
    """[S] the token of each row of the slots; a slot's first where it is padded."""
    row_of_token: torch.Tensor
    """[tokens] the row of the slots that is each token's own."""
    prefix_rows: torch.Tensor
    """[pairs with the prefix, its tokens] their rows that repeat it."""

    @classmethod
    def of(cls, segments: Sequence[Segment], position: torch.Tensor) -> Layout:
        """Slots one after another, in the order of the segments; `position` of each token [T]."""
        shared = max((segment.shared for segment in segments), default=0)
        head = [Segment(0, shared, 0, 0)] if shared else []
        slots = []
        token_of_row: list[int] = []
        row_of_token: list[int] = []
        prefix_rows: list[list[int]] = []
        for segment in [*head, *segments]:
            slot = Slot(len(token_of_row), segment)
            before, own = segment.tokens
            first = slot.start + len(before)
            row_of_token += range(first, first + len(own))
            token_of_row += [*before, *own]
            padding = slot.start + slot.length - len(token_of_row)
            token_of_row += [token_of_row[slot.start]] * padding
            slots.append(slot)
            if before:
                prefix_rows.append([*range(slot.start, first)])
        to_tensor = functools.partial(torch.tensor, device=position.device, dtype=torch.long)
        return cls(
            tuple(segments),
            position,
            tuple(slots),
            to_tensor(token_of_row),
            to_tensor(row_of_token),
            to_tensor(prefix_rows),
        )

    @functools.cached_property
    def prefix(self) -> int:
        """Tokens at the head of the stream that pairs share."""
        return max((segment.shared for segment in self.segments), default=0)

    @functools.cached_property
    def pairs(self) -> torch.Tensor:
        """[2, slots, 6] for kernels/native: start, P, C, R, shared and the first row that asks.

        First for layers in which all rows ask, then for those of which few are read.
        """
        rows = []
        for read in (False, True):
            for part in (slot.segment for slot in self.slots):
                first = part.prompt - 1 if read else part.shared
                rows.append([*(getattr(part, name) for name in _PARTS), first])
        return torch.tensor(rows, dtype=torch.long).view(2, len(self.slots), len(_PARTS) + 1)

    @functools.cached_property
    def stream(self) -> Stream:
        """What FlexAttention asks for; built where it is asked for."""
        device, position = self.position.device, self.position.cpu()
        pair, part = torch.full_like(position, PADDING), torch.zeros_like(position)
        after_prefix = torch.zeros_like(position, dtype=torch.bool)
        for number, segment in enumerate(self.segments):
            end = segment.start + segment.length
            pair[: segment.shared] = PREFIX
            pair[segment.start : end] = number
            after_prefix[segment.start : end] = segment.shared > 0
            part[end - segment.rejected - segment.chosen : end] = 1
            part[end - segment.rejected : end] = 2
        return Stream(pair.to(device), part.to(device), self.position, after_prefix.to(device))


def round_up(number: float, multiple_of: int) -> int:
    """The next multiple."""
    return int(-(-number // multiple_of)) * multiple_of
