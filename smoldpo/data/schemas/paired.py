"""Readers of rows that say which answer is chosen and which rejected. See `schemas.SCHEMAS`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from smoldpo.data.cleaning.text import first_difference
from smoldpo.data.schemas.fields import (
    MissingColumn,
    Unreadable,
    as_messages,
    column,
    dialogue,
    join,
    kind,
    number,
    parse_transcript,
    present,
    text,
    text_or_messages,
    wrong,
)
from smoldpo.data.sources import Row
from smoldpo.types import Message, PreferencePair, Prompt

PROMPT_IS_TEXT = "text"
"""In the column `prompt_format`: `convert` marks a prompt with it that was text, not messages."""

SCORE_WORDS = frozenset({"score", "rating", "reward", "grade", "points"})
MEANS = frozenset({"avg", "mean", "average", "overall", "final", "total"})
SCORE_COLUMNS = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("rating_chosen", "rating_rejected"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_reward", "rejected_reward"),
    ("chosen_avg_rating", "rejected_avg_rating"),
)
"""The usual names of a score for each side; `score_columns` finds others made like them."""
DIALOGUES = ("conversations", "messages", "trajectory")
"""LLaMA-Factory's name for a dialogue, axolotl's, UltraInteract's."""
CHATML_PROMPTS = ("prompt", "input", "question", "instruction")


def _with_sides(row: Row, prompt: Prompt) -> PreferencePair:
    """The pair of a prompt and the columns chosen and rejected, each text or messages."""
    return join(row, prompt, text_or_messages(row, "chosen"), text_or_messages(row, "rejected"))


def read_explicit(row: Row) -> PreferencePair:
    """prompt, chosen and rejected, each text or messages.

    Where a side is a whole dialogue, its last message is the answer and those before it the prompt;
    such a row needs no prompt of its own.
    """
    if row.values.get("prompt") is None and not any(
        isinstance(row.values.get(side), str | None) for side in ("chosen", "rejected")
    ):
        return read_implicit(row)
    value = text_or_messages(row, "prompt")
    return _with_sides(row, _restore_text(row, value if isinstance(value, str) else tuple(value)))


def _restore_text(row: Row, prompt: Prompt) -> Prompt:
    """Undo what `convert` does to a prompt that is text: one user message with nothing else."""
    if row.values.get("prompt_format") != PROMPT_IS_TEXT or isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and set(prompt[0]) == {"role", "content"} and prompt[0]["role"] == "user":
        return prompt[0]["content"]
    return prompt


def read_implicit(row: Row) -> PreferencePair:
    """chosen and rejected, which begin alike: messages up to the last one, or a common text."""
    chosen, rejected = text_or_messages(row, "chosen"), text_or_messages(row, "rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        cut = _common_prompt(chosen, rejected)
        if not chosen[:cut].strip():
            raise Unreadable("unparsable", "chosen and rejected have no common beginning")
        return join(row, chosen[:cut], chosen[cut:], rejected[cut:])
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise wrong(row, "'chosen' or 'rejected' is text, the other messages; make them alike")
    pair = join(row, (), chosen, rejected)
    if not pair.prompt:
        raise Unreadable("unparsable", "there is no message before the answer")
    return replace(pair, prompt=_restore_text(row, pair.prompt))


def _common_prompt(chosen: str, rejected: str) -> int:
    """Length of the common beginning, cut back to a line or word edge so that no word is split.

    The white space at the edge goes to the completions: tokenizers join it to the following word.
    """
    same = first_difference(chosen, rejected)
    while same > 0 and not chosen[same - 1].isspace():
        ahead = {chosen[same : same + 1], rejected[same : same + 1]}
        if ahead != {""} and all(each == "" or each.isspace() for each in ahead):
            break
        same -= 1
    return len(chosen[:same].rstrip())


def read_transcripts(row: Row) -> PreferencePair:
    """Anthropic HH: two transcripts that differ in the last thing the assistant says.

    A `prompt` beside them is text that they repeat.
    """
    prompt = text(row, "prompt") if present(row, "prompt") else ()
    ours, theirs = (parse_transcript(text(row, key)) for key in ("chosen", "rejected"))
    if ours[:-1] != theirs[:-1]:
        raise Unreadable("prompts_differ", "the turns before the last one differ")
    return join(row, prompt, ours, theirs)


def read_transcript_prompt(row: Row) -> PreferencePair:
    """HH with a prompt: a transcript that ends in "Assistant:", and the two ways it goes on."""
    transcript = text(row, "prompt")
    answers = [text(row, key) for key in ("chosen", "rejected")]
    opening = transcript.rstrip()
    if not opening.endswith("Assistant:"):
        raise Unreadable("unparsable", "the prompt does not end with 'Assistant:'")
    *prompt, last = parse_transcript(opening)
    if last != {"role": "assistant", "content": ""}:
        raise Unreadable("unparsable", "the prompt's last turn is not an open one of the assistant")
    chosen, rejected = (answer.removeprefix(opening).strip() for answer in answers)
    return join(row, tuple(prompt), chosen, rejected)


def read_scored(row: Row) -> PreferencePair:
    """Explicit or implicit, with a score for each side: UltraFeedback, Argilla's mixes."""
    return (read_implicit if row.values.get("prompt") is None else read_explicit)(row)


def score_columns(names: Iterable[str]) -> list[tuple[str, str]]:
    """The chosen and the rejected answer's score, as (column, column), of those that have both."""
    every = set(names)
    pairs = ((name, name.replace("chosen", "rejected")) for name in every if "chosen" in name)
    return sorted((ours, theirs) for ours, theirs in pairs if theirs in every and _scores(ours))


def _scores(name: str) -> bool:
    words = {*re.split(r"[^a-z]+", name)} - {"chosen"} - MEANS
    return bool(words) and words <= SCORE_WORDS


def check_scores(row: Row) -> None:
    """Refuse a row whose own scores, or whose status, do not support its choice.

    Raises:
        Unreadable: equal scores (`tie`), or scores that say the opposite (`scores_disagree`).
    """
    for better, worse in score_columns(row.values):
        high, low = number(row.values.get(better)), number(row.values.get(worse))
        if high is None or low is None:
            continue
        if high == low:
            raise Unreadable("tie", f"{better} and {worse} are both {high:g}")
        if high < low:
            raise Unreadable("scores_disagree", f"{better} is {high:g}, {worse} is {low:g}")
    if row.values.get("status") == "tie":
        raise Unreadable("tie", "the status column says that it is a tie")


def read_alpaca(row: Row) -> PreferencePair:
    """LLaMA-Factory's alpaca style: history, then instruction and input as one user message."""
    return _with_sides(row, alpaca_prompt(row))


def alpaca_prompt(row: Row) -> tuple[Message, ...]:
    """`history`, then `instruction` and `input`, on lines of their own, as one user message."""
    asked = text(row, "instruction")
    extra = text(row, "input") if row.values.get("input") else ""
    said = f"{asked}\n{extra}" if extra else asked
    return (*history(row), {"role": "user", "content": said})


def history(row: Row) -> list[Message]:
    """The turns in `history`: [[what the user said, what the assistant said], ...]."""
    given = row.values.get("history") or []
    turns: list[Message] = []
    for at, turn in enumerate(given if isinstance(given, list) else [given], 1):
        texts = isinstance(turn, list) and all(isinstance(said, str) for said in turn)
        if not texts or len(turn) != 2:
            raise wrong(row, f"'history', turn {at} is {kind(turn)}, not two texts")
        for role, said in zip(("user", "assistant"), turn, strict=True):
            turns.append({"role": role, "content": said})
    return turns


def read_conversations(row: Row) -> PreferencePair:
    """A dialogue in one of DIALOGUES, and two answers."""
    key = column(row, *DIALOGUES)
    return _with_sides(row, dialogue(row, key))


def read_orca(row: Row) -> PreferencePair:
    """Intel's Orca pairs: a system text that may be empty, a question and two answers."""
    return _with_sides(row, as_messages(text(row, "question")))


def read_chatml(row: Row) -> PreferencePair:
    """The columns that axolotl's chatml and llama3 strategies read, under any of their names."""
    key = prompt_column(row, CHATML_PROMPTS)
    if key is None:
        raise Unreadable("empty_prompt", f"each of {', '.join(CHATML_PROMPTS)} is null")
    prompt = dialogue(row, key)
    chosen, rejected = (
        text_or_messages(row, present(row, side, f"{side}_response") or side)
        for side in ("chosen", "rejected")
    )
    return join(row, prompt, chosen, rejected)


def prompt_column(row: Row, names: tuple[str, ...]) -> str | None:
    """The first of a prompt's `names` that is not null; None where all are.

    Raises:
        DataError: there is none of them.
    """
    key = present(row, *names)
    if key is None and not any(name in row.values for name in names):
        raise MissingColumn(row, f"has none of the prompt's keys: {', '.join(names)}", *names)
    return key
