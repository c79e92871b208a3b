"""Readers of rows that say which answer is chosen and which rejected. See `schemas.SCHEMAS`."""

from __future__ import annotations

from smoldpo.data.rows import Row
from smoldpo.data.schemas.fields import (
    Unreadable,
    is_transcript,
    join,
    kind,
    make_pair,
    messages,
    number,
    parse_transcript,
    present,
    require,
    split_last,
    text,
    text_or_messages,
    wrong,
)
from smoldpo.types import Message, PreferencePair, Prompt

PROMPT_IS_TEXT = "text"
"""In the column `prompt_format`: `convert` marks a prompt with it that was text, not messages."""

SCORE_COLUMNS = (
    ("score_chosen", "score_rejected"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_score", "rejected_score"),
    ("chosen_avg_rating", "rejected_avg_rating"),
)
CHATML_PROMPTS = ("prompt", "input", "question", "instruction")
CHATML_SIDES = (("chosen", "chosen_response"), ("rejected", "rejected_response"))


def read_explicit(row: Row) -> PreferencePair:
    """prompt, chosen and rejected, each text or messages.

    Where a side is a whole dialogue, its last message is the answer and those before it the prompt.
    """
    value = text_or_messages(row, "prompt")
    prompt: Prompt = value if isinstance(value, str) else tuple(value)
    if row.values.get("prompt_format") == PROMPT_IS_TEXT:
        prompt = _as_text(prompt)
    return join(row, prompt, text_or_messages(row, "chosen"), text_or_messages(row, "rejected"))


def _as_text(prompt: Prompt) -> Prompt:
    """Undo what `convert` does to a prompt that is text: one user message with nothing else."""
    if isinstance(prompt, tuple) and len(prompt) == 1 and set(prompt[0]) == {"role", "content"}:
        return prompt[0]["content"] if prompt[0]["role"] == "user" else prompt
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
    for side in (chosen, rejected):
        if not split_last(side)[0]:
            raise Unreadable("unparsable", "there is no message before the answer")
    pair = join(row, (), chosen, rejected)
    if row.values.get("prompt_format") == PROMPT_IS_TEXT:
        return make_pair(row, _as_text(pair.prompt), pair.chosen, pair.rejected)
    return pair


def _common_prompt(chosen: str, rejected: str) -> int:
    """Length of the common beginning, cut back to a line or word edge so that no word is split.

    The white space at the edge goes to the completions: tokenizers join it to the following word.
    """
    same, beyond = 0, min(len(chosen), len(rejected)) + 1
    while beyond - same > 1:
        middle = (same + beyond) // 2
        if chosen[same:middle] == rejected[same:middle]:
            same = middle
        else:
            beyond = middle
    while same > 0 and not chosen[same - 1].isspace():
        ahead = {chosen[same : same + 1], rejected[same : same + 1]}
        if ahead != {""} and all(each == "" or each.isspace() for each in ahead):
            break
        same -= 1
    while same > 0 and chosen[same - 1].isspace():
        same -= 1
    return same


def read_transcripts(row: Row) -> PreferencePair:
    """Anthropic HH: two transcripts that differ in the last thing the assistant says."""
    return join(row, (), *(parse_transcript(text(row, key)) for key in ("chosen", "rejected")))


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
    """Explicit or implicit, with a score for each side: UltraFeedback-binarized, Argilla's mixes.

    A row whose scores are equal says nothing and is dropped (`tie`); one whose scores say the
    opposite is dropped too (`scores_disagree`).
    """
    check_scores(row)
    return (read_implicit if row.values.get("prompt") is None else read_explicit)(row)


def check_scores(row: Row) -> None:
    """Raise Unreadable where a row's own scores, or its status, do not support its choice."""
    for better, worse in SCORE_COLUMNS:
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
    asked = text(row, "instruction")
    extra = "" if row.values.get("input") is None else text(row, "input")
    request = f"{asked}\n{extra}" if extra else asked
    prompt = (*_history(row), {"role": "user", "content": request})
    return join(row, prompt, text_or_messages(row, "chosen"), text_or_messages(row, "rejected"))


def _history(row: Row) -> list[Message]:
    """history: [[what the user said, what the assistant said], ...]"""
    turns = row.values.get("history") or []
    dialogue = []
    for at, turn in enumerate(turns if isinstance(turns, list) else [turns], 1):
        if not (
            isinstance(turn, list)
            and len(turn) == 2
            and all(isinstance(said, str) for said in turn)
        ):
            raise wrong(row, f"'history', turn {at} is {kind(turn)}, not two texts")
        dialogue += [
            {"role": "user", "content": turn[0]},
            {"role": "assistant", "content": turn[1]},
        ]
    return dialogue


def read_conversations(row: Row) -> PreferencePair:
    """A dialogue in `conversations` (LLaMA-Factory) or `messages` (axolotl), and two answers."""
    key = present(row, "conversations", "messages") or "conversations"
    value = require(row, key)
    prompt = as_dialogue(row, key, value)
    return join(row, prompt, text_or_messages(row, "chosen"), text_or_messages(row, "rejected"))


def as_dialogue(row: Row, key: str, value: object) -> tuple[Message, ...]:
    """A value that is text (what the user says) or messages, as messages."""
    if isinstance(value, str):
        return ({"role": "user", "content": value},)
    return tuple(messages(row, key, value))


def read_orca(row: Row) -> PreferencePair:
    """Intel's Orca pairs: a system text that may be empty, a question and two answers."""
    prompt = ({"role": "user", "content": text(row, "question")},)
    return join(row, prompt, text_or_messages(row, "chosen"), text_or_messages(row, "rejected"))


def read_chatml(row: Row) -> PreferencePair:
    """The columns that axolotl's chatml and llama3 strategies read, under any of their names."""
    check_scores(row)
    key = present(row, *CHATML_PROMPTS)
    if key is None:
        names = ", ".join(CHATML_PROMPTS)
        if any(name in row.values for name in CHATML_PROMPTS):
            raise Unreadable("empty_prompt", f"each of {names} is null")
        raise wrong(row, f"has none of the prompt's keys: {names}")
    prompt = as_dialogue(row, key, row.values[key])
    chosen, rejected = (
        text_or_messages(row, present(row, *keys) or keys[0]) for keys in CHATML_SIDES
    )
    return join(row, prompt, chosen, rejected)


def looks_like_transcript_prompt(values: dict[str, object]) -> bool:
    """Whether `prompt` is a transcript that ends where the assistant is to speak."""
    prompt = values.get("prompt")
    return (
        isinstance(prompt, str) and is_transcript(prompt) and prompt.rstrip().endswith("Assistant:")
    )
