"""One reader a schema: from a row's columns to a PreferencePair.

    explicit     prompt, chosen, rejected: each text or messages      (TRL, UltraFeedback)
    implicit     chosen, rejected: both begin with the same prompt     (TRL)
    transcripts  chosen, rejected: "\\n\\nHuman: ...\\n\\nAssistant: ..."  (Anthropic HH-RLHF)

The schema is chosen by looking at the first row, and stated. A value of the wrong kind is an error
that names its row; a row that has the right kind but no pair in it raises `Unreadable` and is counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from smoldpo.data.sources import Row
from smoldpo.errors import DataError
from smoldpo.types import Message, PreferencePair, Prompt

Reader = Callable[[Row], PreferencePair]

ROLES = ("system", "user", "assistant", "tool", "developer")
TURN = re.compile(r"\n\n(Human|Assistant):")


class Unreadable(Exception):
    """A row in the right schema that holds no pair; `rule` is the reason it is counted under."""

    def __init__(self, rule: str, detail: str):
        self.rule = rule
        super().__init__(detail)


def detect(first: Row) -> str:
    """The name of the schema (a key of READERS) that the first row is in.

    Raises:
        DataError: it is in none; the message shows the row's keys and what was looked for.
    """
    values = first.values
    missing = [key for key in ("chosen", "rejected") if key not in values]
    if missing:
        keys = ", ".join(map(repr, values)) or "none"
        raise DataError(
            f"needs the columns 'chosen' and 'rejected' (and 'prompt', unless both begin with it); "
            f"missing: {', '.join(map(repr, missing))}; the row's keys are: {keys}",
            first.file,
            first.row,
        )
    if values.get("prompt") is not None:
        return "explicit"
    if isinstance(values["chosen"], str) and _is_transcript(values["chosen"]):
        return "transcripts"
    return "implicit"


def _is_transcript(text: str) -> bool:
    return text.lstrip().startswith(("Human:", "Assistant:")) and bool(TURN.search("\n\n" + text))


def read_explicit(row: Row) -> PreferencePair:
    """prompt, chosen and rejected, each text or messages.

    Where a side is a whole dialogue (UltraFeedback), its last message is the completion and the
    messages before it are the prompt.
    """
    prompt = _prompt(row)
    chosen, rejected = _side(row, "chosen"), _side(row, "rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _pair(row, prompt, chosen, rejected)
    dialogues = [_as_dialogue(row, side, prompt) for side in (chosen, rejected)]
    (chosen_prompt, chosen_text), (rejected_prompt, rejected_text) = dialogues
    if chosen_prompt != rejected_prompt:
        raise Unreadable("prompts_differ", "the messages before the last one differ")
    return _pair(row, chosen_prompt, chosen_text, rejected_text)


def _as_dialogue(row: Row, side: str | list[Message], prompt: Prompt) -> tuple[Prompt, str]:
    """A side's own prompt and completion, given the row's prompt."""
    if isinstance(side, str):
        return prompt, side
    before, text = _split_last(row, side)
    if not before:
        return prompt, text
    if isinstance(prompt, tuple) and before[: len(prompt)] != prompt:
        return prompt + before, text
    return before, text


def read_implicit(row: Row) -> PreferencePair:
    """chosen and rejected, which begin alike: messages up to the last one, or a common text."""
    chosen, rejected = _side(row, "chosen"), _side(row, "rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        cut = _common_prompt(chosen, rejected)
        if not chosen[:cut].strip():
            raise Unreadable("unparsable", "chosen and rejected have no common beginning")
        return _pair(row, chosen[:cut], chosen[cut:], rejected[cut:])
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise DataError("one side is text, the other messages; make them alike", row.file, row.row)
    (prompt, chosen_text), (other, rejected_text) = (
        _split_last(row, side) for side in (chosen, rejected)
    )
    if prompt != other:
        raise Unreadable("prompts_differ", "the messages before the last one differ")
    if not prompt:
        raise Unreadable("unparsable", "there is no message before the answer")
    return _pair(row, prompt, chosen_text, rejected_text)


def _common_prompt(chosen: str, rejected: str) -> int:
    """Length of the common beginning, cut back to a line or word edge so that no word is split.

    The white space at the edge goes to the completions: tokenizers join it to the following word.
    """
    same = 0
    for ours, theirs in zip(chosen, rejected, strict=False):
        if ours != theirs:
            break
        same += 1
    while same > 0 and not (
        chosen[same - 1 : same + 1].strip() == "" or chosen[same : same + 1].isspace()
    ):
        same -= 1
    while same > 0 and chosen[same - 1].isspace():
        same -= 1
    return same


def read_transcripts(row: Row) -> PreferencePair:
    """Anthropic HH: two transcripts that differ in the last thing the assistant says."""
    sides = {}
    for key in ("chosen", "rejected"):
        text = _side(row, key)
        if not isinstance(text, str):
            raise DataError(f"{key!r} is a list of messages, not a transcript", row.file, row.row)
        sides[key] = parse_transcript(text)
    (prompt, chosen), (other, rejected) = (_split_last(row, sides[key]) for key in sides)
    if prompt != other:
        raise Unreadable("prompts_differ", "the turns before the last answer differ")
    return _pair(row, prompt, chosen, rejected)


def parse_transcript(text: str) -> list[Message]:
    """Messages of a "Human: ... Assistant: ..." transcript; the speaker's marks start a line.

    Raises:
        Unreadable: it does not begin with a speaker, or does not end with the assistant.
    """
    parts = TURN.split("\n\n" + text.lstrip())
    if parts[0].strip():
        raise Unreadable("unparsable", "the transcript does not begin with 'Human:'")
    roles = {"Human": "user", "Assistant": "assistant"}
    messages = [
        {"role": roles[who], "content": said.strip()}
        for who, said in zip(parts[1::2], parts[2::2], strict=True)
    ]
    if messages[-1]["role"] != "assistant":
        raise Unreadable("unparsable", "the transcript does not end with what the assistant says")
    if len(messages) == 1:
        raise Unreadable("unparsable", "the transcript has no turn before the answer")
    return messages


def _prompt(row: Row) -> Prompt:
    prompt = _side(row, "prompt")
    return prompt if isinstance(prompt, str) else tuple(prompt)


def _side(row: Row, key: str) -> str | list[Message]:
    """A column's value, checked to be text or messages."""
    value = row.values.get(key)
    if isinstance(value, str):
        return value
    if value is None:
        if key in row.values:
            raise Unreadable(f"empty_{key}", f"{key} is null")
        raise DataError(f"the key {key!r} is missing", row.file, row.row)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        kind = type(value).__name__
        raise DataError(
            f"{key!r} is a {kind} ({str(value)[:40]}), not text or messages", row.file, row.row
        )
    return [_message(row, key, number, item) for number, item in enumerate(value, 1)]


def _message(row: Row, key: str, number: int, item: Any) -> Message:
    where = f"{key!r}, message {number}"
    if not isinstance(item, dict):
        raise DataError(f"{where} is a {type(item).__name__}, not an object", row.file, row.row)
    role, content = item.get("role"), item.get("content")
    if role not in ROLES:
        raise DataError(f"{where} has the role {role!r}; known: {', '.join(ROLES)}", row.file, row.row)
    if not isinstance(content, str) and not (content is None and item.get("tool_calls")):
        kind = type(content).__name__
        raise DataError(f"{where} has a content of {kind}, not text", row.file, row.row)
    return {name: value for name, value in item.items() if value is not None}


def _split_last(row: Row, messages: list[Message]) -> tuple[tuple[Message, ...], str]:
    """The messages before the last, and what the assistant says in it."""
    if not messages:
        raise Unreadable("unparsable", "a side holds no message")
    last = messages[-1]
    if last["role"] != "assistant":
        raise Unreadable("unparsable", f"a side ends with the {last['role']}, not the assistant")
    if "content" not in last:
        raise Unreadable("unparsable", "the answer is a tool call, not text")
    return tuple(messages[:-1]), last["content"]


def _pair(row: Row, prompt: Prompt, chosen: str, rejected: str) -> PreferencePair:
    values = row.values
    return PreferencePair(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        file=row.file,
        row=row.row,
        id=str(values["id"]) if isinstance(values.get("id"), str | int) else "",
        source=str(values.get("source") or ""),
        category=str(values.get("category") or ""),
    )


READERS: dict[str, Reader] = {
    "explicit": read_explicit,
    "implicit": read_implicit,
    "transcripts": read_transcripts,
}
