"""Texts of a report: prompts, answers with coloured words, clipped so that the page stays small."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from smoldpo.evaluation.schema import SAMPLE_PROMPT, Sample, TokenRatio

MOST_CHARACTERS = 1500
MOST_TOKENS = 350
MOST_MESSAGES = 6
SHARE_COLOURED = 0.15
"""Of all tokens on the page, those that changed most are coloured: about this share."""
LEAST = 0.1
"""Nats: a smaller change is never coloured, however little the others changed."""


@dataclass(frozen=True)
class Message:
    """What one speaker said, and how many characters of it are not shown."""

    role: str
    text: str
    left_out: int


@dataclass(frozen=True)
class Dialogue:
    """A prompt: its last messages, and how many before them are not shown."""

    messages: list[Message]
    left_out: int


def dialogue(prompt: str | list[dict]) -> Dialogue:
    """A prompt, be it text or chat messages."""
    if isinstance(prompt, str):
        return Dialogue([_message("prompt", prompt)], 0)
    shown = prompt[-MOST_MESSAGES:]
    messages = [_message(str(item.get("role", "?")), item.get("content", "")) for item in shown]
    return Dialogue(messages, len(prompt) - len(shown))


def _message(role: str, content: Any) -> Message:
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    return Message(role, text[:MOST_CHARACTERS], max(0, len(text) - MOST_CHARACTERS))


@dataclass(frozen=True)
class Piece:
    """Text of one look: `look` is u1 to u4 where the policy likes it more, d1 to d4 where less."""

    text: str
    look: str = ""
    factor: str = ""
    """How many times as likely the policy finds the token."""


@dataclass(frozen=True)
class Answer:
    """An answer in pieces, and what is not shown of it."""

    pieces: list[Piece]
    left_out: str


@dataclass(frozen=True)
class Colouring:
    """From which |log-ratio| on a token takes each of the four depths of colour."""

    levels: tuple[float, float, float, float]

    @classmethod
    def of(cls, answers: Iterable[Sequence[TokenRatio]]) -> Colouring:
        """Levels for all tokens that one page shows."""
        ratios = [
            abs(ratio)
            for tokens in answers
            for _, ratio in tokens
            if ratio is not None and math.isfinite(ratio)
        ]
        parts = 1 - SHARE_COLOURED * np.array([1, 0.5, 0.2, 0.05])
        found = np.quantile(ratios, parts) if ratios else np.full(4, np.inf)
        return cls(tuple(max(LEAST, float(level)) for level in found))

    @property
    def factor(self) -> float | None:
        """The smallest change of a probability that is coloured, as a factor."""
        return math.exp(min(self.levels[0], 50)) if math.isfinite(self.levels[0]) else None

    def answer(self, text: str, tokens: Sequence[TokenRatio]) -> Answer:
        """The text with its words coloured; without tokens, as it is."""
        if not tokens:
            more = len(text) - MOST_CHARACTERS
            return Answer(
                [Piece(text[:MOST_CHARACTERS])], f"{more:,} characters" if more > 0 else ""
            )
        pieces: list[Piece] = []
        for token, ratio in tokens[:MOST_TOKENS]:
            piece = self._piece(token[:MOST_CHARACTERS], ratio)
            space = token[: len(token) - len(token.lstrip())] if piece.look else ""
            for part in (Piece(space), replace(piece, text=piece.text[len(space) :])):
                if pieces and not part.look and not pieces[-1].look:
                    part = Piece(pieces.pop().text + part.text)
                pieces.append(part)
        more = len(tokens) - MOST_TOKENS
        return Answer(pieces, f"{more:,} tokens" if more > 0 else "")

    def _piece(self, token: str, ratio: float | None) -> Piece:
        if ratio is None or not math.isfinite(ratio) or not token.strip():
            return Piece(token)
        depth = sum(abs(ratio) >= level for level in self.levels)
        if not depth:
            return Piece(token)
        factor = math.exp(max(-50.0, min(50.0, ratio)))
        return Piece(token, f"{'u' if ratio > 0 else 'd'}{depth}", f"× {factor:.3g}")


@dataclass(frozen=True)
class ShownSample:
    """A prompt with both models' answers."""

    prompt: Dialogue
    greedy: bool
    """Whether each answer's tokens are the likeliest ones, not drawn."""
    sides: list[tuple[str, Answer, bool | None]]
    """Who answered, what, and whether it ended by itself."""


def shown_sample(sample: Sample, colouring: Colouring) -> ShownSample:
    """A sample as the page shows it."""
    sides = [
        (
            "Reference",
            colouring.answer(sample.reference, sample.reference_tokens),
            sample.reference_ended,
        ),
        ("Policy", colouring.answer(sample.policy, sample.policy_tokens), sample.policy_ended),
    ]
    return ShownSample(dialogue(sample.prompt), sample.id == SAMPLE_PROMPT, sides)
