"""data.json: what was read, what cleaning did to it, how it was split and tokenised.

`DataAccount` writes the file and reads it back. Fields that a run did not set are not written.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import BaseModel

from smoldpo.utils.text import escape_hidden

DROP, MEND, WARN = "drop", "mend", "warn"


@dataclass(frozen=True, slots=True)
class Finding:
    """What a rule found in a row: its place, what was done, and the text before and after.

    `after` is None unless the row was mended. Texts are excerpts, with hidden characters escaped.
    """

    file: str
    row: int
    rule: str
    action: str
    detail: str
    before: str = ""
    after: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def in_reading_order(findings: list[Finding]) -> list[Finding]:
    """Findings by file, in the order in which files come up, and row."""
    files = {file: at for at, file in enumerate(dict.fromkeys(item.file for item in findings))}
    return sorted(findings, key=lambda item: (files[item.file], item.row))


LOUD = re.compile(
    r"(?:.*_)?(?:tools?|functions?|documents|chat_template_kwargs|images?|videos?|audios?)"
)
"""Columns that a model would see in use, were they read."""


def loud(lost: Mapping[str, int]) -> dict[str, int]:
    """Of the columns that are not read, those whose loss matters, with their number of rows."""
    return {name: rows for name, rows in lost.items() if LOUD.fullmatch(name)}


class SourceAccount(BaseModel):
    """One source: numbers of rows, by action and rule, and the findings without the warnings."""

    source: str
    format: str
    rows_read: int
    rows_kept: int
    columns_not_read: list[str] = []
    rows_with_lost: dict[str, int] = {}
    """Rows that hold something in a column whose loss changes what the model would see."""
    files_left_out: list[str] = []
    dropped: dict[str, int] = {}
    mended: dict[str, int] = {}
    warned: dict[str, int] = {}
    touched: list[Finding] = []

    def losses(self) -> list[str]:
        """What was not read of it, in sentences."""
        lines = [
            f"warning: {name} of {rows:,} rows is not read: the model sees nothing of it"
            for name, rows in self.rows_with_lost.items()
        ]
        quiet = [name for name in self.columns_not_read if name not in self.rows_with_lost]
        if quiet:
            lines.append(f"columns not read: {', '.join(quiet)}")
        if self.files_left_out:
            lines.append(f"left out, no list of rows: {', '.join(self.files_left_out)}")
        return [escape_hidden(line) for line in lines]

    def by_action(self) -> dict[str, dict[str, int]]:
        """Rows by rule, for dropped, mended, warned."""
        return {"dropped": self.dropped, "mended": self.mended, "warned": self.warned}

    @classmethod
    def of(cls, findings: list[Finding], **about: Any) -> SourceAccount:
        """The account of these findings; `about` are the fields that do not follow from them."""
        counts = {action: Counter[str]() for action in (DROP, MEND, WARN)}
        for item in findings:
            counts[item.action][item.rule] += 1
        return cls(
            **about,
            dropped=dict(counts[DROP]),
            mended=dict(counts[MEND]),
            warned=dict(counts[WARN]),
            touched=[item for item in findings if item.action != WARN],
        )


class SplitAccount(BaseModel):
    """How pairs were divided into training and evaluation; `touched` tells of common prompts."""

    how: str
    train_pairs: int
    eval_pairs: int
    train_pairs_left_by_weight: int = 0
    train_pairs_dropped_for_eval_prompt: int = 0
    train_pairs_near_eval_prompt: int = 0
    touched: list[Finding] = []


class TokenAccount(BaseModel):
    """Lengths in tokens, and the number of pairs for each note of the tokenizer.

    Attributes:
        left_out: pairs without anything to learn from, by the reason.
        template_mismatches: where the chat template and what is scored do not agree, in words.
        template: what the chat template was given besides messages: date, kwargs, tools, documents.
    """

    max_length: int
    longest: int
    mean: float
    notes: dict[str, int] = {}
    left_out: dict[str, int] = {}
    template_mismatches: list[str] = []
    template: dict[str, Any] = {}


class DataAccount(BaseModel):
    """One source, or several under `sources`; `eval`: held-out pairs that were read apart."""

    sources: list[DataAccount] = []
    train: SourceAccount | None = None
    eval: SourceAccount | None = None
    split: SplitAccount | None = None
    tokens: TokenAccount | None = None

    def read(self) -> list[tuple[str, SourceAccount]]:
        """What was read, each with its use: train or eval."""
        parts = [(p.train, p.eval) for p in self.sources or [self]]
        named = [pair for train, held in parts for pair in (("train", train), ("eval", held))]
        return [(use, source) for use, source in named if source is not None]

    def as_json(self) -> dict[str, Any]:
        """What data.json holds."""
        return self.model_dump(exclude_unset=True)
