"""A preference set in numbers: lengths, truncation, the length baseline, vocabulary.

Characters are counted for every pair. Tokens cost a hundred times as much, so in a large set they
are counted for an even sample, and for every pair that is long enough to be cut at max_length.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from smoldpo.data.cleaning.rules import Problem
from smoldpo.data.cleaning.text import prompt_text
from smoldpo.data.dialogue import as_messages, sides
from smoldpo.types import PreferencePair
from smoldpo.utils.errors import DataError

if TYPE_CHECKING:
    from smoldpo.data.tokenize import Tokenization

SAMPLE = 10_000
"""Pairs whose tokens are counted at least; up to this many, all are."""
BATCH = 64
BYTES_PER_TOKEN = 2
"""A pair with fewer UTF-8 bytes than this for each token of max_length is taken to fit. English has
about four bytes a token, code about three."""
SIDES = ("prompt", "chosen", "rejected")
WORD = re.compile(r"[^\W_]+")

Lengths = tuple[int, int, int]
"""Of the prompt, the chosen and the rejected answer."""
Report = Callable[[PreferencePair, str, Problem], None]
"""Called with a pair, a rule, and what is wrong."""


class WordCounter:
    """Counts words: for those who want no model. A text has at least as many tokens, usually."""

    unit = "words"

    def refusal(self, pair: PreferencePair) -> None:
        """Words can always be counted."""

    def count(self, pairs: Sequence[PreferencePair]) -> list[Lengths | str]:
        return [
            (len(prompt_text(p.prompt).split()), len(p.chosen.split()), len(p.rejected.split()))
            for p in pairs
        ]


class TokenCounter:
    """Counts tokens as training does: chat template and end of turn included."""

    unit = "tokens"

    def __init__(self, tokenizer: Any, how: Tokenization | None = None):
        from smoldpo.data.tokenize import PairTokenizer, Tokenization  # transformers comes with it

        how = Tokenization(0) if how is None else how
        self.exact = PairTokenizer(tokenizer, replace(how, max_length=10**9))
        self._rendered: set[int] = set()

    def count(self, pairs: Sequence[PreferencePair]) -> list[Lengths | str]:
        """Lengths of each pair, or why it has none."""
        return [self._count(pair) for pair in pairs]

    def refusal(self, pair: PreferencePair) -> str | None:
        """Why a pair cannot be tokenised, or None.

        The template is rendered for the first pair of every shape of dialogue: rendering each would
        take ten times as long as reading does.
        """
        shape = _shape(pair)
        if shape in self._rendered:
            return None
        refusal = self.exact.refusal(pair)
        if refusal is None:
            self._rendered.add(shape)
        return refusal

    def _count(self, pair: PreferencePair) -> Lengths | str:
        try:
            done = self.exact.tokenize(pair)
        except DataError as error:
            return str(error)
        return len(done.prompt_ids), len(done.chosen_ids), len(done.rejected_ids)


def _shape(pair: PreferencePair) -> int:
    """What templates refuse dialogues by: who speaks in which order, and what a message holds."""
    turns = (*as_messages(pair.prompt), None, *sides(pair)[0], None, *sides(pair)[1])
    messages = tuple(
        turn and (turn["role"], *sorted(key for key, value in turn.items() if value))
        for turn in turns
    )
    arguments = pair.arguments
    held = (sorted(arguments.kwargs), bool(arguments.tools), bool(arguments.documents))
    return hash((isinstance(pair.prompt, str), messages, repr(held)))


def control_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The texts of a tokenizer's own control tokens."""
    added = tokenizer.added_tokens_decoder.values()
    return tuple(token.content for token in added if token.special)


@dataclass(frozen=True)
class Truncation:
    """What truncation to `max_length` does to pairs of these lengths (see data/tokenize.py)."""

    max_length: int

    def prompt(self, lengths: Any) -> Any:
        """Whether the prompt loses its oldest tokens; lengths [..., 3] -> [...]."""
        lengths = np.asarray(lengths)
        return lengths[..., 0] > self._room(lengths)

    def answers(self, lengths: Any) -> Any:
        """Whether each answer loses its end; lengths [..., 3] -> [..., 2]."""
        lengths = np.asarray(lengths)
        left = self.max_length - np.minimum(lengths[..., 0], self._room(lengths))
        return lengths[..., 1:] > left[..., None]

    def _room(self, lengths: np.ndarray) -> np.ndarray:
        return np.maximum(1, self.max_length - lengths[..., 1:].max(axis=-1))

    def problems(self, lengths: Lengths, unit: str) -> list[tuple[str, Problem]]:
        """Rule and problem for what makes this pair too long: an answer alone, else the prompt."""
        limit, found = f"max_length {self.max_length:,}", []
        for side, length, cut in zip(SIDES[1:], lengths[1:], self.answers(lengths), strict=True):
            if cut:
                what = f"{side} has {length:,} {unit}; {limit} cuts it, and the prompt to one"
                found.append(("long_answer", (what, f"{side} {length:,} {unit}")))
        if not found and self.prompt(lengths):
            total = lengths[0] + max(lengths[1:])
            what = f"{total:,} {unit} with its longer answer; {limit} cuts the prompt"
            found.append(("long_prompt", (what, f"prompt {lengths[0]:,} {unit}")))
        return found


class LengthStats:
    """Numbers about the pairs that are added, in bounded memory.

    Pairs that truncation would cut, or that cannot be tokenised, are reported.

    Attributes:
        refused: numbers of the pairs, in the order in which they were added, that cannot be.
    """

    def __init__(self, counter: WordCounter | TokenCounter, max_length: int, sample: int = SAMPLE):
        self.counter, self.truncation, self.sample = counter, Truncation(max_length), sample
        self.characters = (array("I"), array("I"))
        self.counted_at = array("I")
        self.refused = array("I")
        self.lengths = array("I")
        self.vocabulary: tuple[set[str], set[str]] = (set(), set())
        self._stride, self._sampled = 1, 0
        self._pending: list[tuple[int, PreferencePair]] = []

    def __len__(self) -> int:
        return len(self.characters[0])

    def add(self, pair: PreferencePair, report: Report) -> None:
        index = len(self.characters[0])
        self.characters[0].append(len(pair.chosen))
        self.characters[1].append(len(pair.rejected))
        in_sample = index % self._stride == 0
        if in_sample:
            self._sampled += 1
            if self._sampled > self.sample:
                self._stride *= 2
                self._sampled = -(-(index + 1) // self._stride)
        if in_sample or self._may_be_cut(pair):
            self._pending.append((index, pair))
            if len(self._pending) >= BATCH:
                self.flush(report)
        elif (refusal := self.counter.refusal(pair)) is not None:
            self._refuse(index, pair, refusal, report)

    def _refuse(self, index: int, pair: PreferencePair, why: str, report: Report) -> None:
        self.refused.append(index)
        report(pair, "not_tokenizable", (why, ""))

    def _may_be_cut(self, pair: PreferencePair) -> bool:
        text = prompt_text(pair.prompt) + max(pair.chosen, pair.rejected, key=len)
        enough = BYTES_PER_TOKEN * self.truncation.max_length
        return 4 * len(text) > enough and len(text.encode("utf-8", "replace")) > enough

    def flush(self, report: Report) -> None:
        """Count the tokens of the pending pairs."""
        pending, self._pending = self._pending, []
        counted = self.counter.count([pair for _, pair in pending])
        for (index, pair), lengths in zip(pending, counted, strict=True):
            if isinstance(lengths, str):
                self._refuse(index, pair, lengths, report)
                continue
            for rule, problem in self.truncation.problems(lengths, self.counter.unit):
                report(pair, rule, problem)
            self.counted_at.append(index)
            self.lengths.extend(lengths)
            for words, text in zip(self.vocabulary, (pair.chosen, pair.rejected), strict=True):
                words.update(WORD.findall(text.lower()))

    def _counted(self, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lengths of the kept pairs that were counted, [N, 3], and which are in the sample, [N]."""
        numbers = np.array(self.counted_at, np.int64)
        lengths = np.array(self.lengths, np.int64).reshape(-1, 3)
        kept = keep[numbers]
        return lengths[kept], numbers[kept] % self._stride == 0

    def sampled(self, keep: np.ndarray) -> np.ndarray:
        """Lengths of an even sample of the kept pairs, [N, 3]."""
        lengths, in_sample = self._counted(keep)
        return lengths[in_sample]

    def statistics(self, keep: np.ndarray) -> dict[str, Any]:
        """Everything in numbers, for the pairs that `keep` marks."""
        lengths, in_sample = self._counted(keep)
        sampled, pairs = lengths[in_sample], int(keep.sum())
        cut_prompts, cut = self.truncation.prompt(lengths), self.truncation.answers(lengths)
        truncated = int((cut_prompts | cut.any(axis=1)).sum())
        chosen, rejected = (np.array(side, np.int64)[keep] for side in self.characters)
        longer, equal = int((chosen > rejected).sum()), int((chosen == rejected).sum())
        ours, theirs = self.vocabulary
        all_words = len(ours | theirs)
        return {
            "pairs": pairs,
            "unit": self.counter.unit,
            "pairs_counted": len(sampled),
            "lengths": {
                side: _spread(sampled[:, n], lengths[:, n]) for n, side in enumerate(SIDES)
            },
            "truncation": {
                "max_length": self.truncation.max_length,
                "pairs": truncated,
                "share": truncated / pairs if pairs else 0.0,
                "prompts": int(cut_prompts.sum()),
                "chosen": int(cut[:, 0].sum()),
                "rejected": int(cut[:, 1].sum()),
            },
            "length_baseline": {
                "unit": "characters",
                "chosen_longer": longer / max(1, pairs),
                "equally_long": equal / max(1, pairs),
                "accuracy_of_picking_the_longer": (longer + equal / 2) / max(1, pairs),
            },
            "vocabulary": {
                "chosen_words": len(ours),
                "rejected_words": len(theirs),
                "in_both": len(ours & theirs),
                "overlap": len(ours & theirs) / all_words if all_words else 0.0,
            },
        }


def _spread(sampled: np.ndarray, every: np.ndarray) -> dict[str, float]:
    """Median, 90%, 99% of the sample; the longest is looked for among all that were counted."""
    if not len(sampled):
        return {"median": 0, "p90": 0, "p99": 0, "max": 0}
    median, p90, p99 = np.percentile(sampled, [50, 90, 99]).tolist()
    return {"median": median, "p90": p90, "p99": p99, "max": int(every.max())}
