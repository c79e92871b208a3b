"""The table of schemas: how each is recognised, what it reads, and its reader.

A new schema is a reader (in `pairs` where the row says which answer is better, in `judged` where a
score or vote does), an entry here, and a five-line fixture in tests/data/fixtures.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from smoldpo.data.rows import Row
from smoldpo.data.schemas import paired, scored
from smoldpo.data.schemas.fields import SYSTEM_KEYS, Unreadable, is_transcript
from smoldpo.types import PreferencePair
from smoldpo.utils.errors import DataError

Values = Mapping[str, Any]
SIDES = ("chosen", "rejected")
COMMON = ("id", "source", "category")
SCORES = tuple(name for both in paired.SCORE_COLUMNS for name in both)


@dataclass(frozen=True)
class Schema:
    """One way in which preference rows are published.

    `columns` are those without which it is not this schema, `optional` those it reads where they
    are there. `read` is None where a pair is made of several rows (`judged.AnswerGroups`).
    """

    name: str
    says: str
    columns: tuple[str, ...]
    optional: tuple[str, ...]
    recognises: Callable[[Values], bool]
    read: Callable[[Row], PreferencePair] | None

    @property
    def known(self) -> tuple[str, ...]:
        """Every column name that this schema's reader looks at."""
        return self.columns + self.optional + COMMON


def _has(*keys: str) -> Callable[[Values], bool]:
    return lambda values: all(key in values for key in keys)


def _sides_without_prompt(*keys: str) -> Callable[[Values], bool]:
    """Whether both sides and all of `keys` are there, and no prompt that would come first."""
    return lambda values: _has(*SIDES, *keys)(values) and values.get("prompt") is None


def _is_arena(values: Values) -> bool:
    votes = "winner" in values or _has("winner_model_a", "winner_model_b")(values)
    talks = _has("conversation_a", "conversation_b")(values)
    return votes and (talks or _has("prompt", "response_a", "response_b")(values))


def _is_conversations(values: Values) -> bool:
    named = "conversations" in values or "messages" in values
    return named and _sides_without_prompt()(values)


def _is_chatml(values: Values) -> bool:
    if _has("chosen_response", "rejected_response")(values) and not _has(*SIDES)(values):
        return any(key in values for key in paired.CHATML_PROMPTS)
    return _sides_without_prompt("input")(values)


def _is_transcript_prompt(values: Values) -> bool:
    texts = all(isinstance(values.get(key), str) for key in SIDES)
    return texts and paired.looks_like_transcript_prompt(dict(values))


def _is_scored(values: Values) -> bool:
    has_scores = any(_has(*names)(values) for names in paired.SCORE_COLUMNS)
    return has_scores and _has(*SIDES)(values)


def _is_ratings(values: Values) -> bool:
    asks = any(key in values for key in scored.PROMPT_KEYS)
    lists = any(isinstance(values.get(key), list) for key in scored.ANSWER_LISTS)
    return asks and lists and "chosen" not in values


def _is_helpsteer(values: Values) -> bool:
    return _has("prompt", "response")(values) and any(key in values for key in scored.ROW_SCORES)


_ENTRIES = (
    Schema(
        "arena",
        "two answers and a vote (LMSYS, LMArena)",
        ("conversation_a", "conversation_b", "winner"),
        ("prompt", "response_a", "response_b", "winner_model_a", "winner_model_b", *SYSTEM_KEYS),
        _is_arena,
        scored.read_arena,
    ),
    Schema(
        "shp",
        "two comments and a label (Stanford SHP)",
        ("history", "human_ref_A", "human_ref_B", "labels"),
        ("score_ratio", *SYSTEM_KEYS),
        _has("history", "human_ref_A", "human_ref_B", "labels"),
        scored.read_shp,
    ),
    Schema(
        "helpsteer3",
        "two answers and a preference from -3 to 3 (HelpSteer3)",
        ("context", "response1", "response2", "overall_preference"),
        SYSTEM_KEYS,
        _has("context", "response1", "response2", "overall_preference"),
        scored.read_helpsteer3,
    ),
    Schema(
        "conversations",
        "a dialogue and its two answers (LLaMA-Factory, axolotl's chat_template)",
        ("conversations", *SIDES),
        ("messages", *SYSTEM_KEYS),
        _is_conversations,
        paired.read_conversations,
    ),
    Schema(
        "alpaca",
        "instruction, input and two answers (LLaMA-Factory)",
        ("instruction", *SIDES),
        ("input", "history", *SYSTEM_KEYS),
        _sides_without_prompt("instruction"),
        paired.read_alpaca,
    ),
    Schema(
        "orca",
        "system, question and two answers (Intel's Orca pairs)",
        ("question", *SIDES),
        SYSTEM_KEYS,
        _sides_without_prompt("question"),
        paired.read_orca,
    ),
    Schema(
        "chatml",
        "axolotl's chatml and llama3 columns",
        ("input", *SIDES),
        (
            "prompt",
            "question",
            "instruction",
            "chosen_response",
            "rejected_response",
            "status",
            *SCORES,
            *SYSTEM_KEYS,
        ),
        _is_chatml,
        paired.read_chatml,
    ),
    Schema(
        "transcript_prompt",
        "a prompt that is a transcript, and two ways to go on (HH with prompts)",
        ("prompt", *SIDES),
        SYSTEM_KEYS,
        _is_transcript_prompt,
        paired.read_transcript_prompt,
    ),
    Schema(
        "ultrafeedback",
        "explicit or implicit, with a score a side (UltraFeedback-binarized, Argilla)",
        (*SIDES, "score_chosen", "score_rejected"),
        ("prompt", "prompt_format", "status", *SCORES, *SYSTEM_KEYS),
        _is_scored,
        paired.read_scored,
    ),
    Schema(
        "explicit",
        "prompt, chosen and rejected, each text or messages (TRL)",
        ("prompt", *SIDES),
        ("prompt_format", *SYSTEM_KEYS),
        lambda values: _has(*SIDES)(values) and values.get("prompt") is not None,
        paired.read_explicit,
    ),
    Schema(
        "transcripts",
        "two transcripts that differ in the last answer (Anthropic HH)",
        SIDES,
        SYSTEM_KEYS,
        lambda values: _sides_without_prompt()(values) and is_transcript(values["chosen"]),
        paired.read_transcripts,
    ),
    Schema(
        "implicit",
        "chosen and rejected, which begin with the same prompt (TRL)",
        SIDES,
        ("prompt_format", *SYSTEM_KEYS),
        _sides_without_prompt(),
        paired.read_implicit,
    ),
    Schema(
        "ratings",
        "several answers with scores in one row (UltraFeedback, Argilla)",
        ("prompt", "completions"),
        (*scored.PROMPT_KEYS[1:], *scored.ANSWER_LISTS[1:], *scored.SCORE_LISTS, *SYSTEM_KEYS),
        _is_ratings,
        scored.read_ratings,
    ),
    Schema(
        "helpsteer",
        "one answer with its scores a row (HelpSteer)",
        ("prompt", "response", "helpfulness"),
        (*scored.ROW_SCORES[1:], *SYSTEM_KEYS),
        _is_helpsteer,
        None,
    ),
)

SCHEMAS: dict[str, Schema] = {schema.name: schema for schema in _ENTRIES}
"""Every schema by its name, in the order in which they are tried."""

NAMES_FOR = {
    "prompt": ("question", "instruction", "query", "input", "text", "context", "user", "ask"),
    "chosen": ("better", "preferred", "accepted", "good", "positive", "best", "winner", "win"),
    "rejected": ("worse", "dispreferred", "bad", "negative", "worst", "loser", "lose", "other"),
}
"""What people call the three columns; for the mapping that an error message proposes."""


def detect(first: Row) -> str:
    """The name of the schema (a key of SCHEMAS) that a row is in.

    Raises:
        Unreadable: a side is null or empty and there is no prompt, so that this row cannot tell.
        DataError: it is in none; the message shows its keys, the nearest schema and a mapping.
    """
    values = first.values
    name = next((schema.name for schema in _ENTRIES if schema.recognises(values)), None)
    if name is None:
        raise DataError(_no_schema(values), first.file, first.row)
    if name in ("implicit", "transcripts"):
        for side in SIDES:
            if not values[side]:
                raise Unreadable(f"empty_{side}", f"{side} is empty")
    return name


def contradiction(name: str, values: Values) -> str | None:
    """Why a later row shows that the first row's schema is not that of the set, or None."""
    if name not in ("implicit", "transcripts"):
        return None
    if values.get("prompt") is not None:
        return "has a prompt, but the first row had none; choose with --format explicit"
    if name == "implicit" and all(is_transcript(values.get(side)) for side in SIDES):
        return "is a transcript, but the first row was not; choose with --format transcripts"
    return None


def _no_schema(values: Values) -> str:
    keys = ", ".join(map(repr, values)) or "none"
    best, mapping = SCHEMAS["explicit"], {}
    for schema in (SCHEMAS["explicit"], *_ENTRIES):
        guess = _guess_columns(schema, values)
        if len(guess) / len(schema.columns) > len(mapping) / len(best.columns):
            best, mapping = schema, guess
    needed = ",".join(
        f"{column}={mapping.get(column, 'COLUMN')}"
        for column in best.columns
        if mapping.get(column) != column
    )
    write = f"--columns {needed}" if needed else f"--format {best.name}"
    return (
        f"the columns are those of no known schema: {keys}. The nearest is {best.name} "
        f"({', '.join(best.columns)}): write {write}, or choose with --format: {', '.join(SCHEMAS)}"
    )


def _guess_columns(schema: Schema, values: Values) -> dict[str, str]:
    """Which of a row's columns could be which of the schema's: by name, by habit, by likeness."""
    free = {name.lower(): name for name in values if name not in schema.columns}
    guess = {column: column for column in schema.columns if column in values}
    for column in schema.columns:
        if column in guess:
            continue
        habits = [name for name in NAMES_FOR.get(column, ()) if name in free]
        found = habits or difflib.get_close_matches(column.lower(), list(free), n=1, cutoff=0.7)
        within = [name for name in free if column in name.split("_")]
        for name in (found or within)[:1]:
            guess[column] = free.pop(name)
    return guess
