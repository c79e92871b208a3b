"""Rules that compare rows with each other, and with the prompts of evaluation.

Of each pair only hashes, a sketch, its place and a short excerpt are kept: about 0.5 kB. So a
million rows fit, and all decisions are made at the end, by sorting.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from smoldpo.data.cleaning.rules import prompt_text
from smoldpo.data.cleaning.text import bare_words, excerpt, number_of, plain, prompt_key
from smoldpo.types import PreferencePair, Prompt

ANSWERS_ALIKE, PROMPTS_ALIKE = 0.7, 0.5
"""A near-duplicate pair: both answers together, and the prompt, are at least this much alike."""
EVAL_PROMPT_ALIKE = 0.75
ENOUGH = 60
"""Shingles (about: characters) that a text needs before its likeness means anything."""

Decision = tuple[int, str, str]
"""Number of the pair, rule, and what is to be said."""


@dataclass
class Places:
    """Where pairs stood: file and row of each."""

    files: list[str] = field(default_factory=list)
    file_of: array[int] = field(default_factory=lambda: array("I"))
    row_of: array[int] = field(default_factory=lambda: array("I"))

    def add(self, pair: PreferencePair) -> None:
        if not self.files or self.files[-1] != pair.file:  # rows come file by file
            self.files.append(pair.file)
        self.file_of.append(len(self.files) - 1)
        self.row_of.append(pair.row)

    def __len__(self) -> int:
        return len(self.row_of)

    def __getitem__(self, index: int) -> tuple[str, int]:
        return self.files[self.file_of[index]], self.row_of[index]

    def distinct_rows(self, kept: np.ndarray) -> int:
        """Number of rows that the pairs marked by `kept` came from."""
        places = np.array([self.file_of, self.row_of], np.int64).T.reshape(-1, 2)
        return len(np.unique(places[kept], axis=0))

    def name(self, index: int, beside: int | None = None) -> str:
        """The row, and its file where that is not the one that the pair `beside` stands in."""
        file, row = self[index]
        same = beside is not None and self[beside][0] == file
        return f"row {row}" if same else f"{file}, row {row}"


class EvaluationPrompts:
    """The prompts that a model will be judged by; training must not hold them."""

    def __init__(self) -> None:
        self.places = Places()
        self.keys, self.bare = array("Q"), array("Q")
        self.sketched, self.sketches = array("I"), bytearray()

    def add(self, pair: PreferencePair) -> None:
        self.keys.append(_short(prompt_key(pair.prompt)))
        self.bare.append(number_of(bare_words(pair.prompt)))
        hashes = shingles(prompt_text(pair.prompt))
        if len(hashes) >= ENOUGH:
            self.sketched.append(len(self.places))
            self.sketches += sketch(hashes).tobytes()
        self.places.add(pair)


class Memory:
    """What is kept of the pairs seen so far, and the decisions that follow from it."""

    def __init__(self, sketching: bool, judged: EvaluationPrompts | None):
        self.judged = judged
        self.sketching = sketching
        self.places = Places()
        self.excerpts: list[str] = []
        self.prompts, self.chosen, self.rejected = array("Q"), array("Q"), array("Q")
        self.bare = array("Q")
        self.enough = array("B")
        self.sketches = bytearray()

    def add(self, pair: PreferencePair) -> None:
        exact = pair.prompt if isinstance(pair.prompt, str) else _exact(pair.prompt)
        self.prompts.append(_short(prompt_key(pair.prompt)))
        self.chosen.append(number_of(exact, pair.chosen.strip()))
        self.rejected.append(number_of(exact, pair.rejected.strip()))
        said = prompt_text(pair.prompt)
        self.places.add(pair)
        self.excerpts.append(excerpt(said, width=60))
        if self.judged is not None:
            self.bare.append(number_of(bare_words(pair.prompt)))
        if self.sketching or self.judged is not None:
            of_prompt = shingles(said)
            answers = np.concatenate(
                [shingles(pair.chosen, salt=1), shingles(pair.rejected, salt=2)]
            )
            self.enough.append((len(of_prompt) >= ENOUGH) + 2 * (len(answers) >= ENOUGH))
            self.sketches += sketch(of_prompt).tobytes() + sketch(answers).tobytes()

    def prompt_keys(self, kept: np.ndarray) -> np.ndarray:
        """A number for the prompt of each pair that `kept` marks; equal prompts, equal numbers."""
        return _numbers(self.prompts)[kept]

    def _both_sketches(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        both = np.frombuffer(self.sketches, np.uint16).reshape(-1, 2 * PERMUTATIONS)
        enough = np.frombuffer(self.enough, np.uint8)
        return both[:, :PERMUTATIONS], both[:, PERMUTATIONS:], (enough & 1) > 0, (enough & 2) > 0

    def eval_prompt(self, alive: np.ndarray) -> Iterator[Decision]:
        """Pairs whose prompt also stands in evaluation."""
        if self.judged is None or not len(self.judged.keys):
            return
        yield from self._also_judged(
            self.judged, self.prompts, self.judged.keys, alive, "eval_prompt"
        )

    def eval_prompt_near(self, alive: np.ndarray) -> Iterator[Decision]:
        """Pairs whose prompt nearly stands in evaluation: but for punctuation, or by MinHash."""
        judged = self.judged
        if judged is None or not len(judged.keys):
            return
        seen = set()
        for decision in self._also_judged(
            judged, self.bare, judged.bare, alive, "eval_prompt_near"
        ):
            seen.add(decision[0])
            yield decision
        prompts, _, enough, _ = self._both_sketches()
        ours = np.flatnonzero(alive & enough)
        theirs = np.frombuffer(judged.sketches, np.uint16).reshape(-1, PERMUTATIONS)
        first, second, alike = similar(np.concatenate([theirs, prompts[ours]]), EVAL_PROMPT_ALIKE)
        for i, j, much in zip(first, second, alike, strict=True):
            if i < len(theirs) <= j and (index := int(ours[j - len(theirs)])) not in seen:
                seen.add(index)
                where = judged.places.name(judged.sketched[i])
                yield index, "eval_prompt_near", f"the prompt is about {much:.0%} that of {where}"

    def _also_judged(
        self,
        judged: EvaluationPrompts,
        ours: array[int],
        theirs: array[int],
        alive: np.ndarray,
        rule: str,
    ) -> Iterator[Decision]:
        known, first = np.unique(_numbers(theirs), return_index=True)
        mine = _numbers(ours)
        at = np.minimum(np.searchsorted(known, mine), len(known) - 1)
        for index in np.flatnonzero((known[at] == mine) & alive).tolist():
            where = judged.places.name(int(first[at[index]]))
            much = "" if rule == "eval_prompt" else ", but for punctuation,"
            yield index, rule, f"the prompt{much} is that of {where} (evaluation)"

    def contradictory(self, alive: np.ndarray) -> Iterator[Decision]:
        """Pairs whose two answers stand the other way round under the same prompt elsewhere."""
        order, swapped = self._directions()
        indices = np.flatnonzero(alive & (order != swapped))
        if not len(indices):
            return
        known, first = np.unique(order[indices], return_index=True)
        at = np.minimum(np.searchsorted(known, swapped[indices]), len(known) - 1)
        for k in np.flatnonzero(known[at] == swapped[indices]).tolist():
            index, other = int(indices[k]), int(indices[first[at[k]]])
            where = self.places.name(other, beside=index)
            yield index, "contradictory", f"{where} prefers the other answer to the same prompt"

    def exact_duplicate(self, alive: np.ndarray) -> Iterator[Decision]:
        """Pairs that stood before, word for word; the first one stays."""
        indices = np.flatnonzero(alive)
        order, _ = self._directions()
        _, first, which = np.unique(order[indices], return_index=True, return_inverse=True)
        for k in np.flatnonzero(first[which] != np.arange(len(indices))).tolist():
            index, other = int(indices[k]), int(indices[first[which[k]]])
            yield index, "exact_duplicate", f"the same as {self.places.name(other, beside=index)}"

    def near_duplicate(self, alive: np.ndarray) -> Iterator[Decision]:
        """Pairs nearly all of which stood before: the prompt and both answers."""
        if not self.sketching:
            return
        prompts, answers, _, enough = self._both_sketches()
        indices = np.flatnonzero(alive & enough)
        first, second, alike = similar(answers[indices], ANSWERS_ALIKE)
        good = likeness(prompts[indices[first]], prompts[indices[second]]) >= PROMPTS_ALIKE
        told = set()
        for i, j, much in zip(first[good], second[good], alike[good], strict=True):
            index, other = int(indices[j]), int(indices[i])
            if index not in told:
                told.add(index)
                where = self.places.name(other, beside=index)
                yield index, "near_duplicate", f"its answers are about {much:.0%} those of {where}"

    def _directions(self) -> tuple[np.ndarray, np.ndarray]:
        """Each pair's texts as one number, and the same with its sides swapped."""
        chosen = _numbers(self.chosen)
        rejected = _numbers(self.rejected)
        factor = np.uint64(0x9E3779B97F4A7C15)
        return chosen * factor + rejected, rejected * factor + chosen


def _numbers(values: array[int]) -> np.ndarray:
    return np.frombuffer(values, np.uint64) if values else np.empty(0, np.uint64)


def _short(key: str) -> int:
    return int(key[:16], 16)


def _exact(prompt: Prompt) -> str:
    return json.dumps(prompt, sort_keys=True, default=str)


# MinHash sketches: how alike two texts are, told from 64 small numbers each.
#
# A text is the set of its overlapping 5-byte pieces (its shingles), case and spacing aside. The
# share of equal numbers in two sketches estimates |A ∩ B| / |A ∪ B|, to a standard error of 0.06.
#
# N = texts, P = permutations (numbers in a sketch), S = shingles of one text


PERMUTATIONS = 64
ROWS_IN_BAND = 4
"""Texts are compared when 4 numbers in a row agree: at a likeness of 0.7 some of the 16 bands does
with a probability of 0.99, at 0.3 with 0.12."""
SHINGLE = 5
CHUNK = 65_536
"""Shingles, or pairs, that are worked on at once: bounds the memory that a huge text needs."""

_MULTIPLIERS = (
    np.random.default_rng(20240607).integers(0, 2**32, PERMUTATIONS, dtype=np.uint64) | 1
).astype(np.uint32)


def shingles(text: str, salt: int = 0) -> np.ndarray:
    """A 32-bit hash of every shingle, [S]; `salt` tells apart texts that are not to be confused."""
    data = np.frombuffer(plain(text).encode("utf-8", "replace"), np.uint8).astype(np.uint32)
    if len(data) < SHINGLE:
        return np.empty(0, np.uint32)
    hashes = data[: len(data) - SHINGLE + 1] + np.uint32(salt)
    for step in range(1, SHINGLE):
        hashes = hashes * np.uint32(0x01000193) + data[step : len(data) - SHINGLE + 1 + step]
    for factor, shift in ((0x9E3779B1, 15), (0x85EBCA77, 13)):
        hashes = hashes * np.uint32(factor)
        hashes ^= hashes >> np.uint32(shift)
    return hashes


def sketch(hashes: np.ndarray) -> np.ndarray:
    """The smallest hash under each permutation, its upper 16 bits, [P].

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


def likeness(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Estimated likeness of sketches, row by row: [N, P], [N, P] -> [N]."""
    return (ours == theirs).mean(axis=1)


def similar(sketches: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs (i, j), i < j, whose sketches agree to `threshold`, and how much: three arrays.

    Sorting by each band brings texts with an equal band together. Within such a group each is
    compared with the first and with the one before it: linear, whatever the size of the group.
    """
    bands = np.ascontiguousarray(sketches).view(np.uint64)
    found = [np.empty((0, 2), np.int64)]
    for band in bands.T:
        order = np.argsort(band, kind="stable")
        ordered = band[order]
        again = np.flatnonzero(ordered[1:] == ordered[:-1]) + 1
        starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
        first = starts[np.searchsorted(starts, again, side="right") - 1]
        for other in (first, again - 1):
            found.append(_alike(sketches, order[other], order[again], threshold))
    pairs = np.unique(np.concatenate(found), axis=0)
    alike = likeness(sketches[pairs[:, 0]], sketches[pairs[:, 1]])
    return pairs[:, 0], pairs[:, 1], alike


def _alike(
    sketches: np.ndarray, ours: np.ndarray, theirs: np.ndarray, threshold: float
) -> np.ndarray:
    """Those of the candidates that agree to `threshold`, [M, 2]; by chunks, to bound memory."""
    kept = [np.empty((0, 2), np.int64)]
    for start in range(0, len(ours), CHUNK):
        i, j = ours[start : start + CHUNK], theirs[start : start + CHUNK]
        good = likeness(sketches[i], sketches[j]) >= threshold
        kept.append(np.stack([i[good], j[good]], axis=1))
    return np.concatenate(kept)
