"""The table of schemas: how each is recognised, what it reads, and its reader.

A new schema is a reader (in `paired` where the row says which answer is better, in `scored` where a
score or vote does), an entry here, and a five-line fixture in tests/data/fixtures.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from smoldpo.data.schemas import paired, scored
from smoldpo.data.schemas.fields import SYSTEM_KEYS, Unreadable, is_transcript
from smoldpo.data.sources import Row
from smoldpo.types import PreferencePair
from smoldpo.utils.errors import DataError

Values = Mapping[str, Any]
Test = Callable[[Values], bool]
SIDES = ("chosen", "rejected")
COMMON = (*SYSTEM_KEYS, "id", "source", "category")
SCORES = tuple(name for both in paired.SCORE_COLUMNS for name in both)


@dataclass(frozen=True)
class Schema:
    """One way in which preference rows are published.

    `columns` are those without which it is not this schema, `optional` those it reads where they
    are there, besides COMMON. `matches` tells from a row's values whether it is in this schema.
    `read` is None where a pair is made of several rows (`scored.AnswerGroups`).
    """

    name: str
    columns: tuple[str, ...]
    optional: tuple[str, ...]
    matches: Test
    read: Callable[[Row], PreferencePair] | None

    @property
    def known(self) -> tuple[str, ...]:
        """Every column name that this schema's reader looks at."""
        return self.columns + self.optional + COMMON


def _has(*groups: tuple[str, ...]) -> Test:
    """Whether one of these groups of columns is there whole."""
    return lambda values: any(all(name in values for name in group) for group in groups)


def _all(*tests: Test) -> Test:
    return lambda values: all(test(values) for test in tests)


def _any_of(names: tuple[str, ...]) -> Test:
    return lambda values: any(name in values for name in names)


def _no_prompt(values: Values) -> bool:
    return values.get("prompt") is None


def _sides_and(*columns: str) -> Test:
    """Whether both sides and these columns are there, and no prompt that would come first."""
    return _all(_has((*SIDES, *columns)), _no_prompt)


def _is_chatml(values: Values) -> bool:
    if _has(_CHATML_SIDES)(values) and not _has(SIDES)(values):
        return _any_of(paired.CHATML_PROMPTS)(values)
    return _sides_and("input")(values)


def _is_transcript_prompt(values: Values) -> bool:
    texts = all(isinstance(values.get(key), str) for key in SIDES)
    return texts and is_transcript(values.get("prompt"), open_turn=True)


def _is_ratings(values: Values) -> bool:
    lists = any(isinstance(values.get(key), list) for key in scored.ANSWER_LISTS)
    return lists and _any_of(scored.PROMPT_KEYS)(values) and "chosen" not in values


_TALKS = ("conversation_a", "conversation_b")
_TURNS = ("prompt", "response_a", "response_b")
_VOTES = ("winner_model_a", "winner_model_b")
_IS_ARENA = _all(_has(("winner",), _VOTES), _has(_TALKS, _TURNS))
_SHP = ("history", "human_ref_A", "human_ref_B", "labels")
_HELPSTEER3 = ("context", "response1", "response2", "overall_preference")
_IS_CONVERSATIONS = _all(_any_of(("conversations", "messages")), _sides_and())
_CHATML_SIDES = ("chosen_response", "rejected_response")
_CHATML = ("prompt", "question", "instruction", *_CHATML_SIDES, "status", *SCORES)
_ULTRAFEEDBACK = (*SIDES, "score_chosen", "score_rejected")
_IS_ULTRAFEEDBACK = _all(_has(*paired.SCORE_COLUMNS), _has(SIDES))
_IS_EXPLICIT = _all(_has(SIDES), lambda values: not _no_prompt(values))
_IS_TRANSCRIPTS = _all(_sides_and(), lambda values: is_transcript(values["chosen"]))
_RATINGS = (*scored.PROMPT_KEYS[1:], *scored.ANSWER_LISTS[1:], *scored.SCORE_LISTS)
_HELPSTEER = ("prompt", "response", "helpfulness")
_IS_HELPSTEER = _all(_has(("prompt", "response")), _any_of(scored.ROW_SCORES))

_ENTRIES = (
    Schema("arena", (*_TALKS, "winner"), (*_TURNS, *_VOTES), _IS_ARENA, scored.read_arena),
    Schema("shp", _SHP, ("score_ratio",), _has(_SHP), scored.read_shp),
    Schema("helpsteer3", _HELPSTEER3, (), _has(_HELPSTEER3), scored.read_helpsteer3),
    Schema(
        "conversations",
        ("conversations", *SIDES),
        ("messages",),
        _IS_CONVERSATIONS,
        paired.read_conversations,
    ),
    Schema(
        "alpaca",
        ("instruction", *SIDES),
        ("input", "history"),
        _sides_and("instruction"),
        paired.read_alpaca,
    ),
    Schema("orca", ("question", *SIDES), (), _sides_and("question"), paired.read_orca),
    Schema("chatml", ("input", *SIDES), _CHATML, _is_chatml, paired.read_chatml),
    Schema(
        "transcript_prompt",
        ("prompt", *SIDES),
        (),
        _is_transcript_prompt,
        paired.read_transcript_prompt,
    ),
    Schema(
        "ultrafeedback",
        _ULTRAFEEDBACK,
        ("prompt", "prompt_format", "status", *SCORES),
        _IS_ULTRAFEEDBACK,
        paired.read_scored,
    ),
    Schema("explicit", ("prompt", *SIDES), ("prompt_format",), _IS_EXPLICIT, paired.read_explicit),
    Schema("transcripts", SIDES, (), _IS_TRANSCRIPTS, paired.read_transcripts),
    Schema("implicit", SIDES, ("prompt_format",), _sides_and(), paired.read_implicit),
    Schema("ratings", ("prompt", "completions"), _RATINGS, _is_ratings, scored.read_ratings),
    Schema("helpsteer", _HELPSTEER, scored.ROW_SCORES[1:], _IS_HELPSTEER, None),
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
    name = next((schema.name for schema in _ENTRIES if schema.matches(values)), None)
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
    best = SCHEMAS["explicit"]
    mapping: dict[str, str] = {}
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
