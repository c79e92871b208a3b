"""The cells of a row (text, messages, numbers), and the pair that is made of them.

`Unreadable` is a row of the right schema that holds no pair: it is counted and passed over.
`DataError` is a value of the wrong kind: it ends the reading, and names file, row and key.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from smoldpo.data.cleaning.text import mend_unicode
from smoldpo.data.sources import Row
from smoldpo.types import Message, PairNumbers, PreferencePair, Prompt
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
NUMBERS = tuple(field.name for field in fields(PairNumbers))
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


def as_messages(prompt: Prompt) -> tuple[Message, ...]:
    """A prompt as messages; text is what the user says."""
    return ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt


def split_last(turns: list[Message]) -> tuple[tuple[Message, ...], str]:
    """The messages before the last, and what the assistant says in it.

    Raises:
        Unreadable: the last message is not what the assistant says (`unparsable`).
    """
    if not turns:
        raise Unreadable("unparsable", "a side holds no message")
    last = turns[-1]
    if last["role"] != "assistant":
        raise Unreadable("unparsable", f"a side ends with the {last['role']}, not the assistant")
    if "content" not in last or last.get("tool_calls"):
        raise Unreadable("unparsable", "the answer is a tool call, not text")
    return tuple(turns[:-1]), last["content"]


def join(
    row: Row, prompt: Prompt, chosen: str | list[Message], rejected: str | list[Message]
) -> PreferencePair:
    """The pair of a row, given its parts; a system column goes before the prompt.

    Sides that are whole dialogues bring their own prompt.

    Raises:
        Unreadable: the sides' prompts differ, or a side has no answer.
    """
    (ours, chosen_text), (theirs, rejected_text) = (_side(prompt, s) for s in (chosen, rejected))
    common = _common(ours, theirs)
    return make_pair(row, _with_system(row, common), chosen_text, rejected_text)


def _common(ours: Prompt, theirs: Prompt) -> Prompt:
    """The prompt that both sides answer: one that has no system turn takes the other's."""
    if ours == theirs:
        return ours
    if isinstance(ours, str) or isinstance(theirs, str):
        ours, theirs = as_messages(ours), as_messages(theirs)
    (told, turns), (also_told, other) = split_system(ours), split_system(theirs)
    if not alike(turns, other) or (told and also_told and not alike(told, also_told)):
        raise Unreadable("prompts_differ", "the messages before the last one differ")
    return ours if told or not also_told else theirs


def alike(ours: Sequence[Message], theirs: Sequence[Message]) -> bool:
    """Whether two dialogues are the same, white space at the ends of their texts aside."""
    return [*map(_trimmed, ours)] == [*map(_trimmed, theirs)]


def _trimmed(message: Message) -> Message:
    return message | {"content": (message.get("content") or "").strip()}


def split_system(turns: Sequence[Message]) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """A leading system message (or none), and the messages behind it."""
    at = int(bool(turns) and turns[0]["role"] in ("system", "developer"))
    return tuple(turns[:at]), tuple(turns[at:])


def _side(prompt: Prompt, side: str | list[Message]) -> tuple[Prompt, str]:
    """A side's own prompt and completion, given the row's prompt.

    A prompt column that is text (UltraFeedback) repeats a message of the dialogue; one that is
    messages may stand before it, and overlap with it.
    """
    if isinstance(side, str):
        return prompt, side
    before, answer = split_last(side)
    if not before:
        return prompt, answer
    if isinstance(prompt, str):
        told = [(message.get("content") or "").strip() for message in before]
        asked = prompt.strip()
        if asked and not any(said and (asked in said or said in asked) for said in told):
            raise Unreadable("prompts_differ", "the prompt's text is in no message of the sides")
        return before, answer
    return _joined(prompt, before), answer


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


def make_pair(row: Row, prompt: Prompt, chosen: str, rejected: str) -> PreferencePair:
    """A pair with where it was read, and its id, source and category where the row has them."""
    id, source, category = (row.values.get(key) for key in ("id", "source", "category"))
    return PreferencePair(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        file=row.file,
        row=row.row,
        id=mend_unicode(str(id)) if isinstance(id, str | int) else "",
        source=mend_unicode(source) if isinstance(source, str) else "",
        category=mend_unicode(category) if isinstance(category, str) else "",
    )


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
    found = {}
    for name in names:
        given = row.values.get(name)
        value = number(given)
        if value is None:
            raise wrong(row, f"{name} must be a number, and is {kind(given)}")
        if value < 0 or (name == "beta" and value == 0):
            least = "above 0" if name == "beta" else "0 or more"
            raise wrong(row, f"{name} must be {least}, and is {value:g}")
        found[name] = value
    return replace(pair, numbers=PairNumbers(**found)) if found else pair
