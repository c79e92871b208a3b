"""Messages that a cell holds as text or packed: taken out before a reader looks at the row.

    '[{"role": "user", ...}]'            JSON as text
    "[{'role': 'user', ...}]"            as Python prints it: str(), to_csv of pandas
    {"messages": [...], "tools": [...]}  inside an object, whose tools become the row's
    {"role": [...], "content": [...]}    column by column, as `datasets` stores a Sequence

A printed form that cannot be taken apart (cut off, broken) never becomes a text to learn from:
its row is set aside under `printed_messages`.
"""

from __future__ import annotations

import ast
import contextlib
import json
import math
import re
from typing import Any

from smoldpo.data.schemas.fields import MAX_DEPTH, ROLES, SPEAKER_KEYS, TEXT_KEYS, Unreadable
from smoldpo.types import PreferencePair

LISTS = ("messages", "conversations", "conversation")
"""Keys under which an object holds its messages."""
MAX_PRINTED = 4 * 2**20
"""Characters of a cell that are parsed as Python; longer ones are set aside."""
SPOKEN = ("system", "developer", "user", "assistant")
"""Speakers whose words are never the printed form of messages. What a tool returns may be."""

_QUOTE = r"\\?[\"']"
_SPEAKER = (
    rf"{_QUOTE}(?:role|from){_QUOTE}\s*:\s*{_QUOTE}(?:{'|'.join(map(re.escape, ROLES))}){_QUOTE}"
)
_TEXT = rf"{_QUOTE}(?:content|value|tool_calls|reasoning_content){_QUOTE}\s*:"
_OPENING = re.compile(r"\s*(?:array\()?[\"'\[({]")
_FIRST_KEY = re.compile(
    rf"[\s\"'\[(]*(?:array\(\[)?\s*\{{\s*{_QUOTE}(?:role|from|content|value){_QUOTE}\s*:"
)
_WRAPPED = re.compile(
    rf"[\s\"']*\{{\s*{_QUOTE}.*?{_QUOTE}(?:{'|'.join(LISTS)}){_QUOTE}\s*:\s*{_QUOTE}?\[\s*\{{|"
    rf"[\s\"']*\{{\s*{_QUOTE}(?:{'|'.join(LISTS)}){_QUOTE}\s*:\s*{_QUOTE}?\[\s*\{{",
    re.DOTALL,
)
_HAS_SPEAKER, _HAS_TEXT = re.compile(_SPEAKER, re.IGNORECASE), re.compile(_TEXT)
_STRING = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""
_BETWEEN = re.compile(rf"({_STRING})|\}}\s+(?=\{{)", re.DOTALL)
_BRACKETS = re.compile(rf"{_STRING}|([\[({{])|([\])}}])", re.DOTALL)
"""Brackets outside of strings; numpy prints no commas between the items of an array."""


def unpack_row(values: dict[str, Any]) -> dict[str, Any]:
    """A row with the messages in its cells unpacked; NaN, as pandas writes nothing, is null."""
    unpacked = dict(values)
    for name, value in values.items():
        if isinstance(value, float) and math.isnan(value):
            unpacked[name] = None
        elif isinstance(value, str | list | dict):
            unpacked[name] = unpack(value)
            _lift_tools(unpacked, value)
    return unpacked


def unpack(value: Any) -> Any:
    """The messages in a cell, or in the items of a list; any other value as it is."""
    if isinstance(value, str | dict):
        with contextlib.suppress(RecursionError):
            found = _messages_in(_parse(value) if isinstance(value, str) else value)
            return value if found is None else found
    if isinstance(value, list) and any(isinstance(item, str) for item in value):
        return [unpack(item) if isinstance(item, str) else item for item in value]
    return value


def refuse_printed(pair: PreferencePair) -> PreferencePair:
    """The pair.

    Raises:
        Unreadable: one of its texts is messages in print (`printed_messages`).
    """
    for name, value in (
        ("the prompt", pair.prompt),
        ("chosen", pair.chosen),
        ("rejected", pair.rejected),
        ("chosen", pair.chosen_messages or ()),
        ("rejected", pair.rejected_messages or ()),
    ):
        texts = [value] if isinstance(value, str) else _said(value)
        if any(map(is_printed, texts)):
            raise Unreadable(
                "printed_messages",
                f"{name} holds messages as text (JSON, or as Python prints them) that cannot be "
                "taken apart; write them as a list of messages",
            )
    return pair


def is_printed(text: str) -> bool:
    """Whether a text is messages as JSON or Python would print them, or begins like that."""
    if not _OPENING.match(text):
        return False
    if _FIRST_KEY.match(text) or _WRAPPED.match(text):
        return bool(_HAS_SPEAKER.search(text) and _HAS_TEXT.search(text))
    return _messages_in(_parse(text)) is not None


def _said(messages: Any) -> list[str]:
    texts = (m.get("content") for m in messages if m.get("role") in SPOKEN)
    return [text for text in texts if isinstance(text, str)]


def _lift_tools(row: dict[str, Any], packed: Any) -> None:
    """The tools of an object that also holds messages are the row's, unless it has its own."""
    whole = _parse(packed) if isinstance(packed, str) else packed
    if isinstance(whole, dict) and whole.get("tools") and _messages_in(whole) is not None:
        row.setdefault("tools", whole["tools"])


def _messages_in(value: Any) -> Any:
    """The message or messages that a parsed value is or holds, or None."""
    if isinstance(value, str):  # JSON inside JSON
        return _messages_in(_parse(value))
    if isinstance(value, list | tuple):
        return list(value) if value and all(map(_is_message, value)) else None
    if not isinstance(value, dict):
        return None
    if _is_message(value):
        return value
    columns = _from_columns(value)
    if columns is not None:
        return columns
    held = next((value[key] for key in LISTS if key in value), None)
    return _messages_in(held) if isinstance(held, str | list | tuple | dict) else None


def _is_message(item: Any) -> bool:
    if not isinstance(item, dict):
        return False
    speakers = [item[key] for key in SPEAKER_KEYS if isinstance(item.get(key), str)]
    told = any(key in item for key in (*TEXT_KEYS, "tool_calls"))
    return told and any(name.lower() in ROLES for name in speakers)


def _from_columns(value: dict[str, Any]) -> list[dict[str, Any]] | None:
    """{"role": [...], "content": [...]} as messages."""
    columns = {name: cells for name, cells in value.items() if isinstance(cells, list)}
    counts = {len(cells) for cells in columns.values()}
    if len(columns) != len(value) or len(counts) != 1:
        return None
    messages = [
        dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)
    ]
    return messages if messages and all(map(_is_message, messages)) else None


def _parse(text: str) -> Any:
    """What a text prints, in JSON or Python; None where it is neither."""
    if not _OPENING.match(text) or text.rstrip()[-1:] not in "]})\"'":
        return None
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text)
    if not (_HAS_SPEAKER.search(text) and _HAS_TEXT.search(text)) or len(text) > MAX_PRINTED:
        return None
    bare = text.strip()
    if bare.startswith("array(") and bare.endswith(")"):
        bare = bare.removeprefix("array(").removesuffix(")").rsplit(", dtype=", 1)[0]
    for printed in (bare, _BETWEEN.sub(lambda found: found[1] or "}, ", bare)):
        if _is_shallow(printed):
            with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
                return ast.literal_eval(printed)
    return None


def _is_shallow(text: str) -> bool:
    """Whether brackets nest at most MAX_DEPTH deep: the parser would run out of stack."""
    depth = 0
    for found in _BRACKETS.finditer(text):
        depth += bool(found[1]) - bool(found[2])
        if depth > MAX_DEPTH:
            return False
    return True
