"""The table of schemas: how each is recognised, what it reads, and its reader.

A new schema is a reader (in `paired` where the row says which answer is better, in `compared` or
`scored` where a verdict, score or vote does, in `trainers` where a trainer asks for it), an entry
here, and a five-line fixture in tests/data/fixtures.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from smoldpo.data.schemas import compared, paired, scored, trainers
from smoldpo.data.schemas.cells import unpack_row
from smoldpo.data.schemas.fields import SYSTEM_KEYS, Unreadable, is_transcript
from smoldpo.data.sources import Row
from smoldpo.types import PreferencePair
from smoldpo.utils.errors import DataError

Values = Mapping[str, Any]
Test = Callable[[Values], bool]
SIDES = ("chosen", "rejected")
COMMON = (
    *SYSTEM_KEYS,
    *("id", "source", "category", "tools", "documents", "chat_template_kwargs"),
    "provenance",  # of pairs that were made: how, for people (pairs/make.py)
)
VERDICTS = ("status", *(name for both in paired.SCORE_COLUMNS for name in both))


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
        return self.columns + self.optional + COMMON + (VERDICTS if self.has_sides else ())

    @property
    def has_sides(self) -> bool:
        """Whether a row says itself which answer is chosen, and may have a score for each."""
        return set(SIDES) <= {*self.columns, *self.optional}


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
_IS_CONVERSATIONS = _all(_any_of(paired.DIALOGUES), _sides_and())
_CHATML_SIDES = ("chosen_response", "rejected_response")
_CHATML = ("prompt", "question", "instruction", *_CHATML_SIDES)
_ULTRAFEEDBACK = (*SIDES, "score_chosen", "score_rejected")
_IS_ULTRAFEEDBACK = _all(_has(SIDES), lambda values: bool(paired.score_columns(values)))
_IS_EXPLICIT = _all(_has(SIDES), lambda values: not _no_prompt(values))
_SAFE_RLHF = ("prompt", "response_0", "response_1", "better_response_id")
_VOTED = ("prompt", "a", "b", "winner")
_ALPACA_FARM = ("instruction", "output_1", "output_2", "preference")
_WEBGPT = ("question", "answer_0", "answer_1", "score_0", "score_1")
_HELPSTEER2 = ("prompt", "response_1", "response_2", "preference_strength")
_STACK_EXCHANGE = ("question", "response_j", "response_k")
_SUMMARIES = ("info", "summaries", "choice")
_OPENAI = ("input", *trainers.OPENAI_SIDES)
_UNPAIRED = ("prompt", "completion", "label")
_SWIFT = ("rejected_messages", "query", "response", "history")
_IS_SWIFT = _all(
    _any_of(trainers.SWIFT_REJECTED),
    _has(("messages",), ("query", "response")),
    lambda values: not _any_of(("chosen", "chosen_response"))(values),
)
_RATINGS = (
    *scored.PROMPT_KEYS[1:],
    *scored.ANSWER_LISTS[1:],
    *scored.SCORE_LISTS,
    *scored.RANK_LISTS,
)
_HELPSTEER = ("prompt", "response", "helpfulness")
_IS_HELPSTEER = _all(_has(("prompt", "response")), _any_of(scored.ROW_SCORES))


def _is_transcripts(values: Values) -> bool:
    """Both sides where there is a prompt too: an answer may well begin with "Human:"."""
    if not _has(SIDES)(values):
        return False
    if _no_prompt(values):
        return is_transcript(values["chosen"])
    return all(is_transcript(values[side]) for side in SIDES)


def _is_output_list(values: Values) -> bool:
    return _has(("instruction", "output"))(values) and isinstance(values["output"], list)


_ENTRIES = (
    Schema("arena", (*_TALKS, "winner"), (*_TURNS, *_VOTES), _IS_ARENA, scored.read_arena),
    Schema("shp", _SHP, ("score_ratio",), _has(_SHP), scored.read_shp),
    Schema("helpsteer3", _HELPSTEER3, (), _has(_HELPSTEER3), scored.read_helpsteer3),
    Schema(
        "conversations",
        ("conversations", *SIDES),
        paired.DIALOGUES[1:],
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
        ("prompt", "prompt_format"),
        _IS_ULTRAFEEDBACK,
        paired.read_scored,
    ),
    Schema("transcripts", SIDES, ("prompt",), _is_transcripts, paired.read_transcripts),
    Schema("explicit", ("prompt", *SIDES), ("prompt_format",), _IS_EXPLICIT, paired.read_explicit),
    Schema("implicit", SIDES, ("prompt_format",), _sides_and(), paired.read_implicit),
    Schema("ratings", ("prompt", "completions"), _RATINGS, _is_ratings, scored.read_ratings),
    Schema("openai", _OPENAI, (), _has(_OPENAI), trainers.read_openai),
    Schema("swift", ("messages", "rejected_response"), _SWIFT, _IS_SWIFT, trainers.read_swift),
    Schema(
        "torchtune",
        trainers.TORCHTUNE_SIDES,
        (),
        _has(trainers.TORCHTUNE_SIDES),
        trainers.read_torchtune,
    ),
    Schema(
        "output_list",
        ("instruction", "output"),
        ("input", "history"),
        _is_output_list,
        trainers.read_output_list,
    ),
    Schema("safe_rlhf", _SAFE_RLHF, (), _has(_SAFE_RLHF), compared.read_safe_rlhf),
    Schema(
        "alpaca_farm",
        _ALPACA_FARM,
        ("input", "history"),
        _has(_ALPACA_FARM),
        compared.read_alpaca_farm,
    ),
    Schema(
        "votes", _VOTED, ("voter", "model_a", "model_b", "time"), _has(_VOTED), compared.read_votes
    ),
    Schema("webgpt", _WEBGPT, (), _has(_WEBGPT), compared.read_webgpt),
    Schema("helpsteer2", _HELPSTEER2, (), _has(_HELPSTEER2), compared.read_helpsteer2),
    Schema(
        "stack_exchange", _STACK_EXCHANGE, (), _has(_STACK_EXCHANGE), compared.read_stack_exchange
    ),
    Schema("summaries", _SUMMARIES, (), _has(_SUMMARIES), compared.read_summaries),
    Schema("unpaired", _UNPAIRED, (), _has(_UNPAIRED), None),
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


def detect(first: Row, ignored: Collection[str] = ()) -> str:
    """The name of the schema (a key of SCHEMAS) that a row is in.

    Args:
        ignored: columns that are null in every row, and so decide nothing.

    Raises:
        Unreadable: a column is null, or a side empty, so that this row cannot tell.
        DataError: it is in none; the message shows its keys, the nearest schema and a mapping.
    """
    values = {key: value for key, value in first.values.items() if key not in ignored}
    name = _match(values) or _match({k: v for k, v in values.items() if v is not None})
    if name is None:
        missing = next((key for key, value in values.items() if value is None), None)
        if missing is not None:
            raise Unreadable(f"empty_{missing}", f"{missing} is null")
        raise DataError(no_schema(values), first.file, first.row)
    if name in ("implicit", "transcripts"):
        for side in SIDES:
            if not values[side]:
                raise Unreadable(f"empty_{side}", f"{side} is empty")
    return name


def _match(values: Values) -> str | None:
    return next((schema.name for schema in _ENTRIES if schema.matches(values)), None)


def contradiction(name: str, values: Values) -> str | None:
    """Why a later row shows that the first row's schema is not that of the set, or None."""
    if name not in ("implicit", "transcripts"):
        return None
    transcripts = all(is_transcript(values.get(side)) for side in SIDES)
    if values.get("prompt") is not None and not (name == "transcripts" and transcripts):
        return "has a prompt, but the first row had none; choose with --format explicit"
    if name == "implicit" and transcripts:
        return "is a transcript, but the first row was not; choose with --format transcripts"
    return None


def no_schema(values: Values) -> str:
    """That a row is in no known schema; with the --columns that would read it, if any would."""
    keys = ", ".join(map(repr, values)) or "none"
    named = f"the columns are those of no known schema: {keys}. "
    known = f"or choose with --format: {', '.join(SCHEMAS)}"
    guesses = [(schema, _guess_columns(schema, values)) for schema in _ENTRIES]
    guesses = [(schema, guess) for schema, guess in guesses if len(guess) == len(schema.columns)]
    for schema, guess in sorted(guesses, key=lambda item: item[0].name != "explicit"):
        renamed = {to: column for to, column in guess.items() if to != column}
        if _reads(schema, values, renamed):
            write = _as_option(renamed) if renamed else f"--format {schema.name}"
            nearest = f"The nearest is {schema.name} ({', '.join(schema.columns)}): write {write}, "
            return named + nearest + known
    explicit = SCHEMAS["explicit"]
    guess = _guess_columns(explicit, values)
    needed = {column: guess.get(column, "COLUMN") for column in explicit.columns}
    shape = f"prompt, chosen and rejected: name them with {_as_option(needed)}"
    return f"{named}A pair is {shape}, {known}"


def _as_option(mapping: Mapping[str, str]) -> str:
    return "--columns " + ",".join(f"{to}={column}" for to, column in mapping.items())


def _reads(schema: Schema, values: Values, mapping: Mapping[str, str]) -> bool:
    """Whether a row is found to be in the schema, and holds a pair, once columns are renamed."""
    row = Row("", 0, unpack_row(renamed(values, mapping)))
    if any("," in column or "=" in column for column in mapping.values()):
        return False
    if _match({k: v for k, v in row.values.items() if v is not None}) != schema.name:
        return False
    try:
        if schema.read is None:
            scored.AnswerGroups([]).read(row)
        else:
            schema.read(row)
    except (DataError, Unreadable):
        return False
    return True


def renamed(values: Values, mapping: Mapping[str, str]) -> dict[str, Any]:
    """The values under the schema's names; a renamed column no longer has its old one."""
    taken = set(mapping.values())
    new = {name: value for name, value in values.items() if name not in taken}
    for target, name in mapping.items():
        new.pop(target, None)
        if name in values:
            new[target] = values[name]
    return new


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
