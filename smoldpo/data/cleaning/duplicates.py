"""Rules that compare rows with each other, and with the prompts of evaluation.

Of each pair only hashes, two MinHash signatures, a location and a short excerpt are kept: about
0.5 kB. So a million rows fit, and all decisions are made at the end, by sorting.

MinHash: a text is the set of its overlapping 5-byte pieces (shingles), case and spacing aside. The
share of equal numbers in two signatures of 64 estimates |A ∩ B| / |A ∪ B|, to a standard error of
0.06.

N = texts, P = permutations (numbers in a signature), S = shingles of one text
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import numpy as np

from smoldpo.data.cleaning.text import (
    excerpt,
    hash64,
    letters_and_digits,
    normalize,
    prompt_key,
    prompt_text,
)
from smoldpo.types import NO_ARGUMENTS, Message, PreferencePair

ANSWERS_ALIKE, PROMPTS_ALIKE = 0.7, 0.5
"""Similarity of a near-duplicate pair, at the least: of both answers together, of the prompts."""
EVAL_PROMPT_ALIKE = 0.75
MIN_SHINGLES = 60
"""Shingles (about: characters) that a text needs before its similarity means anything."""
PERMUTATIONS = 64
SHINGLE = 5
CHUNK = 65_536
"""Shingles, or pairs, that are worked on at once: bounds the memory that a huge text needs."""
_MULTIPLIERS = (
    np.random.default_rng(20240607).integers(0, 2**32, PERMUTATIONS, dtype=np.uint64) | 1
).astype(np.uint32)

Decisions = Iterator[tuple[int, str]]
"""Numbers of pairs, each with the reason."""


class Locations:
    """File and row of each pair."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self.file_of, self.row_of = array("I"), array("I")

    def add(self, pair: PreferencePair) -> None:
        if not self.files or self.files[-1] != pair.file:  # rows come file by file
            self.files.append(pair.file)
        self.file_of.append(len(self.files) - 1)
        self.row_of.append(pair.row)

    def __getitem__(self, index: int) -> tuple[str, int]:
        return self.files[self.file_of[index]], self.row_of[index]

    def distinct_rows(self, keep: np.ndarray) -> int:
        """Number of rows that the pairs marked by `keep` came from."""
        places = np.array([self.file_of, self.row_of], np.int64).T.reshape(-1, 2)
        return len(np.unique(places[keep], axis=0))

    def name(self, index: int, seen_from: int | None = None) -> str:
        """The row, with its file unless the pair `seen_from` is in the same."""
        file, row = self[index]
        same = seen_from is not None and self[seen_from][0] == file
        return f"row {row}" if same else f"{file}, row {row}"


def side_hashes(pair: PreferencePair) -> tuple[int, int]:
    """The prompt with each answer, as numbers: by role and text, without white space at the ends.

    A prompt that is text is what the user says.
    """
    prompt = pair.prompt
    asked = _exact(({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt)
    if pair.arguments != NO_ARGUMENTS:  # thinking or not: another prompt
        asked += json.dumps(asdict(pair.arguments), sort_keys=True, default=str)
    return (
        hash64(asked, pair.chosen.strip(), _exact(pair.chosen_messages or ())),
        hash64(asked, pair.rejected.strip(), _exact(pair.rejected_messages or ())),
    )


def _exact(turns: Sequence[Message]) -> str:
    trimmed = [turn | {"content": (turn.get("content") or "").strip()} for turn in turns]
    return json.dumps(trimmed, sort_keys=True, default=str)


class PairIndex:
    """Hashes of the pairs seen so far, and the decisions that follow from them.

    Each rule takes a mask of the pairs still kept, [N].

    Args:
        prompts, answers: whether they are compared by similarity too.
        evaluation: the pairs of evaluation, whose prompts training must not hold.
    """

    def __init__(
        self, prompts: bool = True, answers: bool = True, evaluation: PairIndex | None = None
    ):
        self.compares_prompts, self.compares_answers = prompts, answers
        self.evaluation = evaluation
        self.locations = Locations()
        self.excerpts: list[str] = []
        self.prompts, self.chosen, self.rejected = array("Q"), array("Q"), array("Q")
        self.bare = array("Q")
        self.long_prompt, self.long_answers = array("B"), array("B")
        self.prompt_signatures, self.answer_signatures = bytearray(), bytearray()

    def __len__(self) -> int:
        return len(self.prompts)

    def add(self, pair: PreferencePair) -> None:
        prompt, said = pair.prompt, prompt_text(pair.prompt)
        chosen, rejected = side_hashes(pair)
        self.prompts.append(int(prompt_key(prompt)[:16], 16))
        self.chosen.append(chosen)
        self.rejected.append(rejected)
        self.locations.add(pair)
        self.excerpts.append(excerpt(said, width=60))
        if self.compares_prompts:
            self.bare.append(hash64(letters_and_digits(prompt)))
            hashes = shingles(said)
            self.long_prompt.append(len(hashes) >= MIN_SHINGLES)
            self.prompt_signatures += minhash(hashes).tobytes()
        if self.compares_answers:
            hashes = np.concatenate(
                [shingles(pair.chosen, salt=1), shingles(pair.rejected, salt=2)]
            )
            self.long_answers.append(len(hashes) >= MIN_SHINGLES)
            self.answer_signatures += minhash(hashes).tobytes()

    def prompt_numbers(self, keep: np.ndarray) -> np.ndarray:
        """A number for the prompt of each pair that `keep` marks; equal prompts, equal numbers."""
        return np.array(self.prompts, np.uint64)[keep]

    def eval_prompt(self, keep: np.ndarray) -> Decisions:
        """Pairs whose prompt is in evaluation too."""
        if (theirs := self.evaluation) is not None:
            for index, other in _equal(_numbers(self.prompts), keep, _numbers(theirs.prompts)):
                yield index, f"the prompt is that of {theirs.locations.name(other)} (evaluation)"

    def eval_prompt_near(self, keep: np.ndarray) -> Decisions:
        """Pairs whose prompt is nearly in evaluation: but for punctuation, or by MinHash."""
        if (theirs := self.evaluation) is None:
            return
        seen = set()
        for index, other in _equal(_numbers(self.bare), keep, _numbers(theirs.bare)):
            seen.add(index)
            where = theirs.locations.name(other)
            yield index, f"the prompt, but for punctuation, is that of {where} (evaluation)"
        mine = np.flatnonzero(keep & np.array(self.long_prompt, bool))
        others = np.flatnonzero(np.array(theirs.long_prompt, bool))
        evaluation = _signatures(theirs.prompt_signatures)[others]
        both = np.concatenate([evaluation, _signatures(self.prompt_signatures)[mine]])
        for i, j, much in zip(*similar_pairs(both, EVAL_PROMPT_ALIKE), strict=True):
            if i < len(others) <= j and (index := int(mine[j - len(others)])) not in seen:
                seen.add(index)
                where = theirs.locations.name(int(others[i]))
                yield index, f"the prompt is about {much:.0%} that of {where}"

    def contradictory(self, keep: np.ndarray) -> Decisions:
        """Pairs whose two answers stand the other way round under the same prompt elsewhere."""
        order, swapped = self._directions()
        keep = keep & (order != swapped)
        for index, other in _equal(swapped, keep, order, keep):
            where = self.locations.name(other, seen_from=index)
            yield index, f"{where} prefers the other answer to the same prompt"

    def exact_duplicate(self, keep: np.ndarray) -> Decisions:
        """Pairs that stood before, word for word; the first one stays."""
        order, _ = self._directions()
        for index, other in _equal(order, keep, order, keep):
            if index != other:
                yield index, f"the same as {self.locations.name(other, seen_from=index)}"

    def near_duplicate(self, keep: np.ndarray) -> Decisions:
        """Pairs nearly all of which stood before: the prompt and both answers."""
        indices = np.flatnonzero(keep & np.array(self.long_answers, bool))
        prompts = _signatures(self.prompt_signatures)[indices]
        answers = _signatures(self.answer_signatures)[indices]
        first, second, alike = similar_pairs(answers, ANSWERS_ALIKE)
        good = similarity(prompts[first], prompts[second]) >= PROMPTS_ALIKE
        seen = set()
        for i, j, much in zip(first[good], second[good], alike[good], strict=True):
            index, other = int(indices[j]), int(indices[i])
            if index not in seen:
                seen.add(index)
                where = self.locations.name(other, seen_from=index)
                yield index, f"its answers are about {much:.0%} those of {where}"

    def _directions(self) -> tuple[np.ndarray, np.ndarray]:
        """Each pair's texts as one number, and the same with its sides swapped."""
        chosen, rejected = _numbers(self.chosen), _numbers(self.rejected)
        factor = np.uint64(0x9E3779B97F4A7C15)
        return chosen * factor + rejected, rejected * factor + chosen


def _equal(
    ours: np.ndarray, keep: np.ndarray, theirs: np.ndarray, among: np.ndarray | None = None
) -> Iterator[tuple[int, int]]:
    """(i, j) for each number of `ours` that `theirs` holds; j is its first place there.

    The masks `keep` and `among` say which of `ours` and of `theirs` count.
    """
    mine = np.flatnonzero(keep)
    others = np.arange(len(theirs)) if among is None else np.flatnonzero(among)
    if not len(others):
        return
    known, first = np.unique(theirs[others], return_index=True)
    at = np.minimum(np.searchsorted(known, ours[mine]), len(known) - 1)
    for k in np.flatnonzero(known[at] == ours[mine]).tolist():
        yield int(mine[k]), int(others[first[at[k]]])


def _numbers(values: array[int]) -> np.ndarray:
    return np.array(values, np.uint64)


def _signatures(data: bytearray) -> np.ndarray:
    """[N, P]"""
    return np.frombuffer(data, np.uint16).reshape(-1, PERMUTATIONS)


def shingles(text: str, salt: int = 0) -> np.ndarray:
    """A 32-bit hash of every shingle, [S]; `salt` tells apart texts that are not to be confused."""
    data = np.frombuffer(normalize(text).encode("utf-8", "replace"), np.uint8).astype(np.uint32)
    if len(data) < SHINGLE:
        return np.empty(0, np.uint32)
    hashes = data[: len(data) - SHINGLE + 1] + np.uint32(salt)
    for step in range(1, SHINGLE):
        hashes = hashes * np.uint32(0x01000193) + data[step : len(data) - SHINGLE + 1 + step]
    for factor, shift in ((0x9E3779B1, 15), (0x85EBCA77, 13)):
        hashes = hashes * np.uint32(factor)
        hashes ^= hashes >> np.uint32(shift)
    return hashes


def minhash(hashes: np.ndarray) -> np.ndarray:
    """The signature: the smallest hash under each permutation, its upper 16 bits, [P].

    Multiplying by an odd number permutes the 32-bit numbers; 16 bits of the smallest are enough to
    tell two apart, and halve the memory.
    """
    if not len(hashes):
        return np.zeros(PERMUTATIONS, np.uint16)
    smallest = np.full(PERMUTATIONS, 2**32 - 1, np.uint32)
    for start in range(0, len(hashes), CHUNK):
        part = hashes[None, start : start + CHUNK] * _MULTIPLIERS[:, None]
        smallest = np.minimum(smallest, part.min(axis=1))
    mixed = smallest * np.uint32(0x9E3779B1)  # the upper bits of a minimum are mostly zero
    return (mixed >> np.uint32(16)).astype(np.uint16)


def similarity(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Estimated similarity of signatures, 0 to 1: [..., P], [..., P] -> [...]."""
    return (ours == theirs).mean(axis=-1)


def similar_pairs(
    signatures: np.ndarray, threshold: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs (i, j), i < j, whose signatures agree to `threshold`, and how much: three arrays.

    Texts are compared when a band, 4 numbers in a row, agrees: at a similarity of 0.7 one of the 16
    bands does with a probability of 0.99, at 0.3 with 0.12. Sorting by each band brings texts with
    an equal band together. Within such a group each is compared with the first and with the one
    before it: linear, whatever the size of the group.
    """
    bands = np.ascontiguousarray(signatures).view(np.uint64)
    found = [np.empty((0, 2), np.int64)]
    for band in bands.T:
        order = np.argsort(band, kind="stable")
        ordered = band[order]
        again = np.flatnonzero(ordered[1:] == ordered[:-1]) + 1
        starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
        first = starts[np.searchsorted(starts, again, side="right") - 1]
        for other in (first, again - 1):
            for start in range(0, len(again), CHUNK):
                part = slice(start, start + CHUNK)
                candidates = np.stack([order[other[part]], order[again[part]]], axis=1)
                alike = similarity(signatures[candidates[:, 0]], signatures[candidates[:, 1]])
                found.append(candidates[alike >= threshold])
    pairs = np.unique(np.concatenate(found), axis=0)
    alike = similarity(signatures[pairs[:, 0]], signatures[pairs[:, 1]])
    return pairs[:, 0], pairs[:, 1], alike
