"""A pair as a dialogue: the messages of its prompt and of its sides."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from smoldpo.types import Message, PreferencePair, Prompt
from smoldpo.utils.errors import DataError

INSTRUCTIONS = ("system", "developer")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Where a message holds what was thought before it was said."""


def as_messages(prompt: Prompt) -> tuple[Message, ...]:
    """A prompt as messages; text is what the user says."""
    return ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt


def said_by_assistant(turns: Sequence[Message]) -> str:
    """Everything that the assistant says in these turns: thoughts, texts and tool calls."""
    parts: list[str] = []
    for message in turns:
        if message["role"] == "assistant":
            values = [message.get(key) for key in (*REASONING_KEYS, "content")]
            parts += [value for value in values if isinstance(value, str) and value]
            if calls := message.get("tool_calls"):
                parts.append(json.dumps(calls, ensure_ascii=False))
    return "\n\n".join(parts)


def as_text(pair: PreferencePair) -> str:
    """The prompt of a model without a chat template."""
    if isinstance(pair.prompt, str) and not (pair.chosen_messages or pair.rejected_messages):
        return pair.prompt
    raise DataError(
        "holds a list of messages, but the model has no chat template; use a chat (Instruct) "
        "model, give a --chat-template, or a prompt that is text",
        pair.file,
        pair.row,
    )


def sides(pair: PreferencePair) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """Both sides as messages."""
    ours = pair.chosen_messages or ({"role": "assistant", "content": pair.chosen},)
    theirs = pair.rejected_messages or ({"role": "assistant", "content": pair.rejected},)
    return ours, theirs


def without_oldest_turn(pair: PreferencePair) -> PreferencePair | None:
    """The pair without its oldest exchange; None where only instructions and the question are left.

    A turn is what a user says with all that follows until the next one does.
    """
    messages = as_messages(pair.prompt)
    start = next((n for n, m in enumerate(messages) if m["role"] not in INSTRUCTIONS), None)
    if start is None:
        return None
    users = [n for n, m in enumerate(messages) if m["role"] == "user" and n > start]
    if not users:
        return None
    return replace(pair, prompt=messages[:start] + messages[users[0] :])
