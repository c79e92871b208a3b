"""Readers of the forms that other trainers ask for. See `schemas.SCHEMAS`."""

from __future__ import annotations

from smoldpo.data.schemas.fields import (
    Unreadable,
    column,
    dialogue,
    join,
    kind,
    messages,
    present,
    require,
    text,
    text_or_messages,
    wrong,
)
from smoldpo.data.schemas.paired import alpaca_prompt, history
from smoldpo.data.sources import Row
from smoldpo.types import Message, PreferencePair

OPENAI_SIDES = ("preferred_output", "non_preferred_output")
SWIFT_REJECTED = ("rejected_response", "rejected_messages")
TORCHTUNE_SIDES = ("chosen_conversations", "rejected_conversations")


def read_openai(row: Row) -> PreferencePair:
    """OpenAI's preference form, also Together's: the messages in `input`, and two outputs."""
    chosen, rejected = (text_or_messages(row, key) for key in OPENAI_SIDES)
    return join(row, dialogue(row, "input"), chosen, rejected)


def read_swift(row: Row) -> PreferencePair:
    """ms-swift: the last answer in `messages` is the chosen one.

    The rejected one is text in `rejected_response`, or the last of `rejected_messages`. Instead of
    `messages` there may be history, query and response, as in its older versions.
    """
    if present(row, "messages") or "query" not in row.values:
        chosen = messages(row, "messages", require(row, "messages"))
    else:
        chosen = [*history(row), {"role": "user", "content": text(row, "query")}]
        chosen.append(_answer(text(row, "response")))
    rejected = text_or_messages(row, column(row, *SWIFT_REJECTED))
    if isinstance(rejected, str):
        rejected = [_answer(rejected)]
    if len(rejected) == 1:
        rejected = [*chosen[:-1], *rejected]
    return join(row, (), chosen, rejected)


def _answer(said: str) -> Message:
    return {"role": "assistant", "content": said}


def read_output_list(row: Row) -> PreferencePair:
    """LLaMA-Factory until 2024: `output` is the chosen answer and then the rejected one."""
    output = require(row, "output")
    if not isinstance(output, list):
        raise wrong(row, f"'output' is {kind(output)}, not a list of two answers")
    if len(output) != 2:
        raise Unreadable(
            "unparsable", f"output holds {len(output)} answers; which is better is said of two"
        )
    if not all(isinstance(said, str) for said in output):
        raise wrong(row, f"'output' is {kind(output)}, not two texts")
    return join(row, alpaca_prompt(row), *output)


def read_torchtune(row: Row) -> PreferencePair:
    """torchtune: two dialogues that begin alike, under names of its own."""
    return join(row, (), *(messages(row, key, require(row, key)) for key in TORCHTUNE_SIDES))
