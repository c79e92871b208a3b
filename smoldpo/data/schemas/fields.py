"""The cells of a row (text, messages, numbers), and the pair that is made of them.

`Unreadable` is a row of the right schema that holds no pair: it is counted and passed over.
`DataError` is a value of the wrong kind: it ends the reading, and names file, row and key.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from smoldpo.config.field_types import BETA_RANGE, LEAST_BETA, MOST_BETA
from smoldpo.data.dialogue import as_messages, said_by_assistant
from smoldpo.data.sources import Row
from smoldpo.types import (
    Message,
    PairNumbers,
    PreferencePair,
    Prompt,
)
from smoldpo.utils.errors import DataError

_SPEAKERS = {
    "system": "system",
    "developer": "developer",
    "user": "user human prompter",
    "assistant": "assistant gpt bot chatbot model function_call",
    "tool": "tool function function_response observation ipython",
}
ROLES = {name: role for role, names in _SPEAKERS.items() for name in names.split()}
"""Names of speakers found in published sets, and the role that chat templates know them by."""

SYSTEM_KEYS = ("system", "system_prompt")
SPEAKER_KEYS = ("role", "from")
TEXT_KEYS = ("content", "value")
NUMBERS = tuple(field.name for field in fields(PairNumbers) if field.name != "liked")
"""Columns of a pair's own weight, margin and β. They are read only where they are asked for: data
may have a `margin` that means another thing."""
MAX_DEPTH = 32
"""How deeply the extra values of a message (tool calls, ...) may be nested."""


class Unreadable(Exception):
    """A row in the right schema that holds no pair; `rule` is the reason it is counted under."""

    def __init__(self, rule: str, detail: str):
        self.rule = rule
        super().__init__(detail)


class MissingColumn(DataError):
    """A row without a column of its schema; `keys` are the names that it may have."""

    def __init__(self, row: Row, problem: str, *keys: str):
        self.keys = keys
        super().__init__(problem, row.file, row.row)


def wrong(row: Row, problem: str) -> DataError:
    """The error for a value of the wrong kind, with its file and row."""
    return DataError(problem, row.file, row.row)


def present(row: Row, *keys: str) -> str | None:
    """The first of `keys` whose value is there and not null, or None."""
    return next((key for key in keys if row.values.get(key) is not None), None)


def column(row: Row, *keys: str) -> str:
    """The first of `keys` that has a value, else that the row has at all, else the first."""
    return present(row, *keys) or next((key for key in keys if key in row.values), keys[0])


def require(row: Row, key: str) -> Any:
    """A column's value.

    Raises:
        Unreadable: it is null (`empty_<key>`).
        MissingColumn: there is no such column.
    """
    if key not in row.values:
        raise MissingColumn(row, f"the key {key!r} is missing", key)
    if row.values[key] is None:
        raise Unreadable(f"empty_{key}", f"{key} is null")
    return row.values[key]


def text(row: Row, key: str) -> str:
    """A column that must be text. Raises as `require`, and DataError when it is no text."""
    value = require(row, key)
    if not isinstance(value, str):
        raise wrong(row, f"{key!r} is {kind(value)}, not text")
    return value


def number(value: Any) -> float | None:
    """A score as a float, "3/10" included; None where there is none ("N/A", null, NaN, ...)."""
    if isinstance(value, bool) or value is None:
        return None
    given, stroke, most = value.partition("/") if isinstance(value, str) else (value, "", "")
    try:
        score = float(given) / (float(most) if stroke else 1.0)
    except (TypeError, ValueError, ArithmeticError):
        return None
    return score if math.isfinite(score) else None


def kind(value: Any) -> str:
    """A short description of a value for an error message: its type, and how it begins."""
    return f"a {type(value).__name__} ({reprlib.repr(value)[:60]})"


def text_or_messages(row: Row, key: str) -> str | list[Message]:
    """A column that holds text, one message, or a list of messages. Raises as `messages`."""
    value = require(row, key)
    return value if isinstance(value, str) else messages(row, key, value)


def dialogue(row: Row, key: str) -> tuple[Message, ...]:
    """A column that holds text (what the user says) or messages, as messages."""
    value = text_or_messages(row, key)
    return as_messages(value if isinstance(value, str) else tuple(value))


def messages(row: Row, key: str, value: Any) -> list[Message]:
    """`value` as messages with "role" and "content"; other keys stay as they are.

    Raises:
        DataError: not a list of messages.
        Unreadable: a message holds something that is not text (`not_text`), or null where its
            speaker or its text belongs (`empty_role`, `empty_content`).
    """
    items = [value] if isinstance(value, dict) else value
    if not isinstance(items, list | tuple):
        raise wrong(row, f"{key!r} is {kind(value)}, not text or messages")
    return [_message(row, f"{key!r}, message {at}", item) for at, item in enumerate(items, 1)]


def _message(row: Row, where: str, item: Any) -> Message:
    if not isinstance(item, dict):
        raise wrong(row, f"{where} is {kind(item)}, not an object with role and content")
    given = {key: value for key, value in item.items() if value is not None}
    name = next((given[key] for key in SPEAKER_KEYS if key in given), None)
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    if name is None and any(key in item for key in SPEAKER_KEYS):
        raise Unreadable("empty_role", f"{where} has a role that is null")
    if role is None:
        known = ", ".join(ROLES)
        raise wrong(row, f"{where} has the role {reprlib.repr(name)}; known: {known}")
    message: Message = {"role": role}
    content = next((given[key] for key in TEXT_KEYS if key in given), None)
    if content is not None:
        message["content"] = _content(row, where, content)
    elif not item.get("tool_calls"):
        if any(key in item for key in TEXT_KEYS):
            raise Unreadable("empty_content", f"{where} has a content that is null")
        raise wrong(row, f"{where} has no content")
    known_keys = (*SPEAKER_KEYS, *TEXT_KEYS)
    extra = {key: value for key, value in given.items() if key not in known_keys}
    if not _is_json(extra, MAX_DEPTH):
        problem = f"{where} holds a value that is no JSON, or is nested over {MAX_DEPTH} deep"
        raise wrong(row, problem)
    return message | extra


def _content(row: Row, where: str, content: Any) -> str:
    """A message's text; lists of text parts ({"type": "text", "text": ...}) are joined."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise wrong(row, f"{where} has a content that is {kind(content)}, not text")
    parts = []
    for part in content:
        said = part.get("text") if isinstance(part, dict) else None
        if not isinstance(said, str) or part.get("type", "text") != "text":
            raise Unreadable("not_text", f"{where} holds something that is not text")
        parts.append(said)
    return "".join(parts)


def _is_json(value: Any, depth: int) -> bool:
    if value is None or isinstance(value, str | int | float):
        return True
    if depth == 0:
        return False
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_json(v, depth - 1) for k, v in value.items())
    return isinstance(value, list | tuple) and all(_is_json(item, depth - 1) for item in value)


def _require_answer(turns: Sequence[Message]) -> None:
    if not turns:
        raise Unreadable("unparsable", "a side holds no message")
    if turns[-1]["role"] != "assistant":
        raise Unreadable(
            "unparsable", f"a side ends with the {turns[-1]['role']}, not the assistant"
        )


def join(
    row: Row, prompt: Prompt, chosen: str | list[Message], rejected: str | list[Message]
) -> PreferencePair:
    """The pair of a row, given its parts; a system column goes before the prompt.

    Sides that are whole dialogues bring their own prompt: what both begin with. They part where the
    assistant speaks, and may go on for several turns from there.

    Raises:
        Unreadable: the sides part elsewhere, or a side has no answer.
    """
    ours, theirs = _dialogue(prompt, chosen), _dialogue(prompt, rejected)
    if ours.prompt != theirs.prompt:  # one side alone brings its prompt
        ours, theirs = ours.with_prompt(), theirs.with_prompt()
    (told, turns), (also_told, others) = split_system(ours.turns), split_system(theirs.turns)
    if told and also_told and not alike(told, also_told):
        raise Unreadable("prompts_differ", "the sides' system turns differ")
    same = _common_turns(turns, others)
    left, right = turns[same:], others[same:]
    if left[0]["role"] != "assistant" or right[0]["role"] != "assistant":
        raise Unreadable("prompts_differ", "the messages before the assistant's differ")
    shared = (told or also_told) + turns[:same]
    before = as_messages(ours.prompt) + shared if shared else ours.prompt
    return make_pair(row, _with_system(row, before), left, right)


def alike(ours: Sequence[Message], theirs: Sequence[Message]) -> bool:
    """Whether two dialogues are the same, white space at the ends of their texts aside."""
    return [*map(_trimmed, ours)] == [*map(_trimmed, theirs)]


def _trimmed(message: Message) -> Message:
    return message | {"content": (message.get("content") or "").strip()}


def split_system(turns: Sequence[Message]) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """A leading system message (or none), and the messages behind it."""
    at = int(bool(turns) and turns[0]["role"] in ("system", "developer"))
    return tuple(turns[:at]), tuple(turns[at:])


@dataclass(frozen=True)
class _Dialogue:
    """A side: the row's prompt, and the turns behind it, which end with the assistant."""

    prompt: Prompt
    turns: tuple[Message, ...]

    def with_prompt(self) -> _Dialogue:
        """The same, all of it as turns."""
        return _Dialogue((), as_messages(self.prompt) + self.turns)


def _dialogue(prompt: Prompt, side: str | list[Message]) -> _Dialogue:
    """A side as a dialogue, given the row's prompt.

    A prompt column that is text (UltraFeedback) repeats a message of the dialogue; one that is
    messages may stand before it, and overlap with it.
    """
    if isinstance(side, str):
        return _Dialogue(prompt, ({"role": "assistant", "content": side},))
    turns = tuple(side)
    _require_answer(turns)
    if turns[0]["role"] == "assistant" and prompt != ():
        return _Dialogue(prompt, turns)
    if isinstance(prompt, str):
        told = [(message.get("content") or "").strip() for message in turns[:-1]]
        asked = prompt.strip()
        if asked and not any(said and (asked in said or said in asked) for said in told):
            raise Unreadable("prompts_differ", "the prompt's text is in no message of the sides")
        return _Dialogue((), turns)
    return _Dialogue((), _joined(prompt, turns))


def _common_turns(ours: Sequence[Message], theirs: Sequence[Message]) -> int:
    """How many messages both begin with; each keeps at least the last one."""
    most = min(len(ours), len(theirs)) - 1
    pairs = zip(ours[:most], theirs[:most], strict=True)
    return next((n for n, (a, b) in enumerate(pairs) if not alike([a], [b])), most)


def _joined(prompt: tuple[Message, ...], before: tuple[Message, ...]) -> tuple[Message, ...]:
    """A dialogue that stands in two columns: where one ends as the other begins, it stands once."""
    (told, turns), (also_told, others) = split_system(prompt), split_system(before)
    if told and also_told and not alike(told, also_told):
        raise Unreadable("two_system_prompts", "the prompt's and the sides' system turn differ")
    system = also_told or told
    if alike(others[: len(turns)], turns):
        return system + others
    overlap = range(min(len(turns), len(others)), 0, -1)
    same = next((n for n in overlap if alike(turns[-n:], others[:n])), 0)
    return system + turns + others[same:]


def _with_system(row: Row, prompt: Prompt) -> Prompt:
    key = present(row, *SYSTEM_KEYS)
    system = text(row, key) if key else ""
    if not system.strip():
        return prompt
    turns = as_messages(prompt)
    if turns and turns[0]["role"] == "system":
        if (turns[0].get("content") or "").strip() == system.strip():
            return turns
        raise Unreadable(
            "two_system_prompts", "the system column and the dialogue's own one differ"
        )
    return ({"role": "system", "content": system}, *turns)


Side = str | Sequence[Message]


def make_pair(row: Row, prompt: Prompt, chosen: Side, rejected: Side) -> PreferencePair:
    """A pair with where it was read, and its id, source and category where the row has them.

    A side that is one message of text alone becomes that text.
    """
    id, source, category = (row.values.get(key) for key in ("id", "source", "category"))
    (ours, our_turns), (theirs, their_turns) = (_side(side) for side in (chosen, rejected))
    return PreferencePair(
        prompt=prompt,
        chosen=ours,
        rejected=theirs,
        file=row.file,
        row=row.row,
        id=str(id) if isinstance(id, str | int) else "",
        source=source if isinstance(source, str) else "",
        category=category if isinstance(category, str) else "",
        chosen_messages=our_turns,
        rejected_messages=their_turns,
    )


def _side(side: Side) -> tuple[str, tuple[Message, ...] | None]:
    """What the assistant says in a side, and its messages where they hold more than one text."""
    if isinstance(side, str):
        return side, None
    turns = tuple(side)
    if len(turns) == 1 and set(turns[0]) == {"role", "content"}:
        return turns[0]["content"], None
    return said_by_assistant(turns), turns


TURN = re.compile(r"\n\n(Human|Assistant):")
SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def is_transcript(value: Any, open_turn: bool = False) -> bool:
    """Whether a value is text that begins with a speaker's mark and has the assistant's.

    `open_turn`: and ends where the assistant is to speak.
    """
    if not isinstance(value, str) or (open_turn and not value.rstrip().endswith("Assistant:")):
        return False
    marks = TURN.findall("\n\n" + value.lstrip())
    return value.lstrip().startswith(("Human:", "Assistant:")) and "Assistant" in marks


def parse_transcript(transcript: str) -> list[Message]:
    """Messages of a "Human: ... Assistant: ..." transcript; the speaker's marks start a paragraph.

    Raises:
        Unreadable: it does not begin with a speaker, or holds a single turn (`unparsable`).
    """
    parts = TURN.split("\n\n" + transcript.lstrip())
    if parts[0].strip():
        raise Unreadable("unparsable", "the transcript does not begin with 'Human:'")
    turns: list[Message] = [
        {"role": SPEAKERS[who], "content": said.strip()}
        for who, said in zip(parts[1::2], parts[2::2], strict=True)
    ]
    if len(turns) < 2:
        raise Unreadable("unparsable", "the transcript has no turn before the answer")
    return turns


def with_numbers(pair: PreferencePair, row: Row, names: Sequence[str]) -> PreferencePair:
    """The pair with the numbers that its row has under `names`.

    Raises:
        DataError: a row without such a number, or with one that is out of range.
    """
    found: dict[str, Any] = {}
    for name in names:
        given = row.values.get(name)
        value = number(given)
        if value is None:
            raise wrong(row, f"{name} must be a number, and is {kind(given)}")
        if name == "beta" and not LEAST_BETA <= value <= MOST_BETA:
            raise wrong(row, f"beta must be {BETA_RANGE}, and is {value:g}")
        if value < 0:
            raise wrong(row, f"{name} must be 0 or more, and is {value:g}")
        found[name] = value
    return replace(pair, numbers=PairNumbers(**found)) if found else pair
