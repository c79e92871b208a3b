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

from smoldpo.data.rules.excerpts import excerpt
from smoldpo.data.rules.prompts import bare_words, number_of, prompt_key
from smoldpo.data.rules.sides import prompt_text
from smoldpo.data.rules.sketch import PERMUTATIONS, likeness, shingles, similar, sketch
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
