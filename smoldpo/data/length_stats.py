"""A preference set in numbers: lengths, truncation, the length baseline, vocabulary.

Characters are counted of every pair. Tokens cost a hundred times as much, so of a large set they
are counted on an even sample, and on every pair that is long enough to be cut at max_length.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from smoldpo.data.cleaning.rules import Finding, prompt_text
from smoldpo.types import PreferencePair
from smoldpo.utils.errors import DataError

SAMPLE = 10_000
"""Pairs whose tokens are counted at least; up to this many, all are."""
BATCH = 64
BYTES_A_TOKEN = 2
"""A pair with fewer UTF-8 bytes than this for each token of max_length is taken to fit. English has
about four bytes a token, code about three."""
SIDES = ("prompt", "chosen", "rejected")
WORD = re.compile(r"[^\W_]+")

Lengths = tuple[int, int, int]
"""Of the prompt, the chosen and the rejected answer."""


class WordCounter:
    """Counts words: for those who want no model. A text has at least as many tokens, usually."""

    unit = "words"

    def count(self, pairs: Sequence[PreferencePair]) -> list[Lengths | str]:
        return [
            (len(prompt_text(p.prompt).split()), len(p.chosen.split()), len(p.rejected.split()))
            for p in pairs
        ]


class TokenCounter:
    """Counts tokens as training does: chat template and end of turn included."""

    unit = "tokens"

    def __init__(self, tokenizer: Any):
        from smoldpo.data.tokenize import PairTokenizer  # torch and transformers come with it

        self.exact = PairTokenizer(tokenizer, max_length=10**9)
        tokens = control_tokens(tokenizer)
        self._own = re.compile("|".join(map(re.escape, tokens)) or "(?!)")

    def count(self, pairs: Sequence[PreferencePair]) -> list[Lengths | str]:
        """Lengths of each pair, or why it has none; many pairs at once are much the faster."""
        counted: list[Lengths | str] = [""] * len(pairs)
        texts: list[str] = []
        batched: list[int] = []
        for index, pair in enumerate(pairs):
            written = self._written(pair)
            if written is None:
                counted[index] = self._slowly(pair)
            else:
                texts += written
                batched.append(index)
        if texts:
            encoded = self.exact.tokenizer(texts, add_special_tokens=False, verbose=False)[
                "input_ids"
            ]
            lengths = [len(ids) for ids in encoded]
            for number, index in enumerate(batched):
                prompt, chosen, rejected = lengths[3 * number : 3 * number + 3]
                counted[index] = (prompt, chosen, rejected)
        return counted

    def _written(self, pair: PreferencePair) -> tuple[str, str, str] | None:
        """Prompt and answers as they are tokenised; None where only the exact way will do."""
        from smoldpo.data.tokenize import render

        turn = self.exact.turn
        if turn is None or self._own.search(
            f"{prompt_text(pair.prompt)} {pair.chosen} {pair.rejected}"
        ):
            return None
        is_text = isinstance(pair.prompt, str)
        messages = [{"role": "user", "content": pair.prompt}] if is_text else list(pair.prompt)
        try:
            prompt = render(self.exact.tokenizer, messages, add_generation_prompt=True)
        except Exception:  # a template can fail in any way; the exact path names the row
            return None
        sides = [side.strip() if turn.trims else side for side in (pair.chosen, pair.rejected)]
        return prompt, sides[0] + turn.end_of_turn, sides[1] + turn.end_of_turn

    def _slowly(self, pair: PreferencePair) -> Lengths | str:
        try:
            done = self.exact.tokenize(pair)
        except DataError as error:
            return str(error)
        return len(done.prompt_ids), len(done.chosen_ids), len(done.rejected_ids)


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

    def findings(self, lengths: Lengths, unit: str) -> list[tuple[str, Finding]]:
        """Rule and finding for what makes this pair too long: an answer alone, else the prompt."""
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


Report = Callable[[PreferencePair, str, Finding], None]


class Measurements:
    """Numbers about the pairs that are `add`ed, in bounded memory.

    `report` is called for pairs that truncation would cut, or that cannot be tokenised.
    """

    def __init__(self, counter: WordCounter | TokenCounter, max_length: int, sample: int = SAMPLE):
        self.counter, self.truncation, self.sample = counter, Truncation(max_length), sample
        self.characters = (array("I"), array("I"))
        self.counted_at = array("I")
        self.lengths = array("I")
        self.vocabulary: tuple[set[str], set[str]] = (set(), set())
        self._stride, self._sampled = 1, 0
        self._waiting: list[tuple[int, PreferencePair]] = []

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
            self._waiting.append((index, pair))
            if len(self._waiting) >= BATCH:
                self.flush(report)

    def _may_be_cut(self, pair: PreferencePair) -> bool:
        longer = max(pair.chosen, pair.rejected, key=len)
        text = prompt_text(pair.prompt) + longer
        enough = BYTES_A_TOKEN * self.truncation.max_length
        return 4 * len(text) > enough and len(text.encode("utf-8", "replace")) > enough

    def flush(self, report: Report) -> None:
        """Count the tokens of the pairs that wait for it."""
        waiting, self._waiting = self._waiting, []
        for (index, pair), lengths in zip(
            waiting, self.counter.count([pair for _, pair in waiting]), strict=True
        ):
            if isinstance(lengths, str):
                report(pair, "not_tokenizable", (lengths, ""))
                continue
            for rule, finding in self.truncation.findings(lengths, self.counter.unit):
                report(pair, rule, finding)
            self.counted_at.append(index)
            self.lengths.extend(lengths)
            for words, text in zip(self.vocabulary, (pair.chosen, pair.rejected), strict=True):
                words.update(WORD.findall(text.lower()))

    def statistics(self, kept: np.ndarray) -> dict[str, Any]:
        """Everything in numbers, for the pairs that `kept` marks."""
        counted, lengths = self.counted(kept)
        sampled = lengths[counted % self._stride == 0]
        return {
            "pairs": int(kept.sum()),
            "unit": self.counter.unit,
            "pairs_counted": len(sampled),
            "lengths": {
                side: _spread(sampled[:, n], lengths[:, n]) for n, side in enumerate(SIDES)
            },
            "truncation": self._truncation(lengths, int(kept.sum())),
            "length_baseline": self._length_baseline(kept),
            "vocabulary": self._vocabulary(),
        }

    def counted(self, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the kept pairs whose tokens were counted, [N], and their lengths, [N, 3]."""
        numbers = np.array(self.counted_at, np.int64)
        lengths = np.array(self.lengths, np.int64).reshape(-1, 3)
        return numbers[kept[numbers]], lengths[kept[numbers]]

    def sampled(self, kept: np.ndarray) -> np.ndarray:
        """Lengths of an even sample of the kept pairs, [N, 3]."""
        counted, lengths = self.counted(kept)
        return lengths[counted % self._stride == 0]

    def _truncation(self, lengths: np.ndarray, pairs: int) -> dict[str, Any]:
        prompts, answers = self.truncation.prompt(lengths), self.truncation.answers(lengths)
        touched = int((prompts | answers.any(axis=1)).sum())
        return {
            "max_length": self.truncation.max_length,
            "pairs": touched,
            "share": touched / pairs if pairs else 0.0,
            "prompts": int(prompts.sum()),
            "chosen": int(answers[:, 0].sum()),
            "rejected": int(answers[:, 1].sum()),
        }

    def _length_baseline(self, kept: np.ndarray) -> dict[str, Any]:
        chosen, rejected = (np.array(side, np.int64)[kept] for side in self.characters)
        pairs = max(1, len(chosen))
        longer, equal = int((chosen > rejected).sum()), int((chosen == rejected).sum())
        return {
            "unit": "characters",
            "chosen_longer": longer / pairs,
            "equally_long": equal / pairs,
            "accuracy_of_picking_the_longer": (longer + equal / 2) / pairs,
        }

    def _vocabulary(self) -> dict[str, Any]:
        chosen, rejected = self.vocabulary
        both, all_words = len(chosen & rejected), len(chosen | rejected)
        return {
            "chosen_words": len(chosen),
            "rejected_words": len(rejected),
            "in_both": both,
            "overlap": both / all_words if all_words else 0.0,
        }


def _spread(sampled: np.ndarray, every: np.ndarray) -> dict[str, float]:
    """Median, 90%, 99% of the sample; the longest is looked for among all that were counted."""
    if not len(sampled):
        return {"median": 0, "p90": 0, "p99": 0, "max": 0}
    median, p90, p99 = np.percentile(sampled, [50, 90, 99]).tolist()
    return {"median": median, "p90": p90, "p99": p99, "max": int(every.max())}
