"""Pairs as token streams, without padding and with what several share only once.

A pair with prompt P, chosen C and rejected R becomes one segment P C R of the stream:

    token      p0 p1 p2 | c0 c1 | r0 r1
    position    0  1  2 |  3  4 |  3  4      R stands where C stands: right behind P
    sees        causal  | P, C  | P, R       R does not see C

Causal attention makes this exact: P's states depend on P alone, so computing them once for both
sides gives the same numbers; C and R each see just what they would see alone behind P. Pairs follow
one another in the stream and do not see each other, so nothing is padded.

For the same reason the prefix that most prompts have in common, a chat template's system message,
is once at the head of the stream, and each pair that begins with it goes on from there:

    S | P' C R | P' C R | ...      P = S P', and P', C and R see S

Tokens of C and R that are not scored lie in the stream like all others, and are seen; but nothing
is predicted for them, so what would predict them alone is no row that is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress

import torch

from smoldpo.engine.layout import Layout, Segment, round_up
from smoldpo.types import PairLogps, TokenizedPair

MIN_SHARED_PREFIX = 8
"""A common prefix of fewer tokens is left to each pair."""


@dataclass(frozen=True)
class PackedBatch:
    """A stream of T tokens of B pairs, and the N positions in it whose predictions are scored."""

    segments: tuple[Segment, ...]
    layout: Layout
    input_ids: torch.Tensor  # [1, T]
    position_ids: torch.Tensor  # [1, T]
    rows: torch.Tensor
    """[M] stream positions whose final states are read: those before a scored token, and each
    pair's last."""
    predictors: torch.Tensor  # [N] which of `rows` predicts; the last of P predicts c0 and r0 both
    targets: torch.Tensor  # [N] the tokens they are to predict
    sides: torch.Tensor
    """[N] row of the result: b for the chosen side of pair b, B + b for its rejected."""
    tail: torch.Tensor
    """[N] True behind as many scored tokens as the pair's shorter completion has."""

    def logps(self, token_logps: torch.Tensor, squares: torch.Tensor | None = None) -> PairLogps:
        """Sums of token log-probabilities [N], and of `squares` [N], by completion: [B] each."""
        parts = [token_logps, torch.where(self.tail, token_logps, 0.0)]
        parts += [] if squares is None else [squares]
        zeros = token_logps.new_zeros(2 * len(self.segments))
        sums = (zeros.index_add(0, self.sides, part).chunk(2) for part in parts)
        return PairLogps(*(side for both in sums for side in both))


def pair_length(pair: TokenizedPair) -> int:
    """Tokens of a pair in the stream."""
    return len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids)


def pack(
    pairs: Sequence[TokenizedPair],
    device: torch.device | str = "cpu",
    multiple_of: int = 1,
    prefix: tuple[int, ...] = (),
) -> PackedBatch:
    """Lay pairs one after another into one stream, padded to a multiple of so many tokens.

    Padding belongs to no pair: it sees nothing, is seen by nothing, and nothing of it is read.

    Args:
        prefix: tokens with which most prompts begin; they are once at the head of the stream.
    """
    sharing = [has_prefix(pair, prefix) for pair in pairs]
    ids: list[int] = list(prefix) if any(sharing) else []
    positions: list[int] = list(range(len(ids)))
    rows: dict[int, int] = {}  # stream position -> index in the order of the stream
    predictors: list[int] = []
    targets: list[int] = []
    sides: list[int] = []
    tail: list[bool] = []
    segments = []
    for number, pair in enumerate(pairs):
        shared = len(prefix) if sharing[number] else 0
        start, prompt = len(ids), len(pair.prompt_ids)
        segment = Segment(start, prompt, len(pair.chosen_ids), len(pair.rejected_ids), shared)
        ids += pair.prompt_ids[shared:]
        positions += range(shared, prompt)
        last_of_prompt, shorter = len(ids) - 1, pair.shorter
        for side, (completion, scored) in enumerate(pair.completions):
            before = compress(
                [last_of_prompt, *range(len(ids), len(ids) + len(completion))], scored
            )
            ids += completion
            positions += range(prompt, prompt + len(completion))
            predictors += [rows.setdefault(at, len(rows)) for at in before]
            targets += compress(completion, scored)
            count = sum(scored)
            sides += [side * len(pairs) + number] * count
            tail += [False] * shorter + [True] * (count - shorter)
        # Each pair's last token too: torch compiles anew for what has a single row.
        rows.setdefault(len(ids) - 1, len(rows))
        segments.append(segment)
    padding = [0] * (round_up(len(ids), multiple_of) - len(ids))
    position_ids = torch.tensor([positions + padding], device=device)
    return PackedBatch(
        tuple(segments),
        Layout.of(segments, position_ids[0]),
        torch.tensor([ids + padding], device=device),
        position_ids,
        *(torch.tensor(p, device=device) for p in ([*rows], predictors, targets, sides, tail)),
    )


def has_prefix(pair: TokenizedPair, prefix: tuple[int, ...]) -> bool:
    """Whether the pair's prompt begins with these tokens and goes on."""
    length = len(prefix)
    return 0 < length < len(pair.prompt_ids) and pair.prompt_ids[:length] == prefix


def common_prefix(pairs: Sequence[TokenizedPair]) -> tuple[int, ...]:
    """The longest run of tokens with which more than half of all prompts begin, and go on.

    Empty where it has less than MIN_SHARED_PREFIX tokens. A property of the whole data and not of a
    stream, so that what is computed for a pair does not depend on the other pairs of its stream.
    """
    prefix: list[int] = []
    prompts = [pair.prompt_ids for pair in pairs]
    while True:
        depth = len(prefix)
        prompts = [ids for ids in prompts if len(ids) > depth + 1]
        token, count = next(iter(Counter(ids[depth] for ids in prompts).most_common(1)), (0, 0))
        if 2 * count <= len(pairs) or count < 2:
            return tuple(prefix) if len(prefix) >= MIN_SHARED_PREFIX else ()
        prefix.append(token)
        prompts = [ids for ids in prompts if ids[depth] == token]


def batch_by_tokens(pairs: Sequence[TokenizedPair], max_tokens: int) -> list[list[int]]:
    """Pairs in their order, in batches of at most `max_tokens`; a longer pair goes alone.

    Returns lists of indices into `pairs`.
    """
    batches: list[list[int]] = []
    room = 0
    for index, length in enumerate(map(pair_length, pairs)):
        if length > room or not batches:
            batches.append([])
            room = max_tokens
        batches[-1].append(index)
        room -= length
    return batches


def even_batches(pairs: Sequence[TokenizedPair], max_tokens: int) -> list[list[int]]:
    """Like `batch_by_tokens`, in as many batches, but of tokens as equal as can be.

    Equal batches keep several workers busy to the end. Each pair goes where its middle lies, when
    the tokens of all pairs are cut into equal parts; where that makes a batch too long, the
    batches are those of `batch_by_tokens`.
    """
    plain = batch_by_tokens(pairs, max_tokens)
    lengths = list(map(pair_length, pairs))
    total, before = sum(lengths), 0
    even: list[list[int]] = [[] for _ in plain]
    for index, length in enumerate(lengths):
        even[(2 * before + length) * len(plain) // (2 * total)].append(index)
        before += length
    fits = all(sum(lengths[i] for i in part) <= max_tokens for part in even if len(part) > 1)
    return even if fits and all(even) else plain


def batch_by_length(pairs: Sequence[TokenizedPair], max_tokens: int) -> list[list[int]]:
    """Like `batch_by_tokens`, over the pairs from long to short: the largest batch comes first."""
    order = sorted(range(len(pairs)), key=lambda index: -pair_length(pairs[index]))
    batches = batch_by_tokens([pairs[index] for index in order], max_tokens)
    return [[order[position] for position in batch] for batch in batches]
