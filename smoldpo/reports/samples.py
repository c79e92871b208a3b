"""Texts of a report: prompts, answers with coloured words, clipped so that the page stays small."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from smoldpo.evaluation.schema import SAMPLE_PROMPT, Sample, TokenRatio
from smoldpo.types import Prompt

MAX_CHARACTERS = 1500
MAX_TOKENS = 350
MAX_MESSAGES = 6
COLOURED_SHARE = 0.15
"""About this share of all tokens on the page is coloured: those that changed most."""
MIN_CHANGE = 0.1
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


def dialogue(prompt: Prompt) -> Dialogue:
    """A prompt, be it text or chat messages."""
    if isinstance(prompt, str):
        return Dialogue([_message("prompt", prompt)], 0)
    shown = prompt[-MAX_MESSAGES:]
    messages = [_message(str(item.get("role", "?")), item.get("content", "")) for item in shown]
    return Dialogue(messages, len(prompt) - len(shown))


def _message(role: str, content: Any) -> Message:
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    return Message(role, text[:MAX_CHARACTERS], max(0, len(text) - MAX_CHARACTERS))


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

    levels: tuple[float, ...]

    @classmethod
    def of(cls, answers: Iterable[Sequence[TokenRatio]]) -> Colouring:
        """Levels for all tokens that one page shows."""
        ratios = [
            abs(ratio)
            for tokens in answers
            for _, ratio in tokens
            if ratio is not None and math.isfinite(ratio)
        ]
        parts = 1 - COLOURED_SHARE * np.array([1, 0.5, 0.2, 0.05])
        found = np.quantile(ratios, parts) if ratios else np.full(4, np.inf)
        return cls(tuple(max(MIN_CHANGE, float(level)) for level in found))

    @property
    def factor(self) -> float | None:
        """The smallest change of a probability that is coloured, as a factor."""
        return math.exp(min(self.levels[0], 50)) if math.isfinite(self.levels[0]) else None

    def answer(self, text: str, tokens: Sequence[TokenRatio]) -> Answer:
        """The text with its words coloured; without tokens, as it is."""
        if not tokens:
            more = len(text) - MAX_CHARACTERS
            return Answer(
                [Piece(text[:MAX_CHARACTERS])], f"{more:,} characters" if more > 0 else ""
            )
        pieces: list[Piece] = []
        for token, ratio in tokens[:MAX_TOKENS]:
            piece = self._piece(token[:MAX_CHARACTERS], ratio)
            space = token[: len(token) - len(token.lstrip())] if piece.look else ""
            for part in (Piece(space), replace(piece, text=piece.text[len(space) :])):
                if pieces and not part.look and not pieces[-1].look:
                    part = Piece(pieces.pop().text + part.text)
                pieces.append(part)
        more = len(tokens) - MAX_TOKENS
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
    theirs = colouring.answer(sample.reference, sample.reference_tokens)
    ours = colouring.answer(sample.policy, sample.policy_tokens)
    sides = [
        ("Reference", theirs, sample.reference_ended),
        ("Policy", ours, sample.policy_ended),
    ]
    return ShownSample(dialogue(sample.prompt), sample.id == SAMPLE_PROMPT, sides)
