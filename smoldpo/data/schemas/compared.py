"""Readers of rows that hold two numbered answers and say which is better. See `schemas.SCHEMAS`."""

from __future__ import annotations

from smoldpo.data.schemas.fields import (
    Unreadable,
    as_messages,
    dialogue,
    join,
    kind,
    number,
    require,
    text,
    text_or_messages,
    wrong,
)
from smoldpo.data.schemas.paired import alpaca_prompt
from smoldpo.data.schemas.scored import TIES, helpsteer_prompt
from smoldpo.data.sources import Row
from smoldpo.types import PreferencePair, Prompt


def _pair(row: Row, prompt: Prompt, first: str, second: str, verdict: float) -> PreferencePair:
    """The pair of two answers, by their columns; the first is better where `verdict` is below 0."""
    answers = [text_or_messages(row, first), text_or_messages(row, second)]
    if verdict == 0:
        raise Unreadable("tie", "neither answer is preferred")
    return join(row, prompt, *(answers if verdict < 0 else reversed(answers)))


def _verdict(row: Row, key: str) -> float:
    """A number that says which answer is better.

    Raises:
        Unreadable: it is none (`unrated`).
    """
    value = number(require(row, key))
    if value is None:
        raise Unreadable("unrated", f"{key} is no number")
    return value


def read_safe_rlhf(row: Row) -> PreferencePair:
    """PKU-SafeRLHF: better_response_id is 0 or 1, the number of the more helpful answer.

    To learn the safer one: --columns better_response_id=safer_response_id.
    """
    better = _verdict(row, "better_response_id")
    if better == -1:
        raise Unreadable("tie", "better_response_id is -1: neither")
    if better not in (0, 1):
        raise wrong(row, f"'better_response_id' is {better:g}; it must be 0 or 1")
    return _pair(row, dialogue(row, "prompt"), "response_0", "response_1", 2 * better - 1)


def read_alpaca_farm(row: Row) -> PreferencePair:
    """AlpacaFarm: preference is 1 or 2, the number of the better output; 0 and 1.5 are ties."""
    value = _verdict(row, "preference")
    if value and not 1 <= value <= 2:
        raise wrong(row, f"'preference' is {value:g}; it must be 1 or 2")
    verdict = value - 1.5 if value else 0.0
    return _pair(row, alpaca_prompt(row), "output_1", "output_2", verdict)


def read_votes(row: Row) -> PreferencePair:
    """Votes on two answers, a and b: winner is a, b, or a tie (both_bad too)."""
    winner = require(row, "winner")
    if winner not in ("a", "b", *TIES):
        raise wrong(row, f"'winner' is {kind(winner)}; known: a, b, {', '.join(TIES)}")
    prompt = text_or_messages(row, "prompt")
    asked = prompt if isinstance(prompt, str) else tuple(prompt)
    return _pair(row, asked, "a", "b", {"a": -1, "b": 1}.get(winner, 0))


def read_webgpt(row: Row) -> PreferencePair:
    """WebGPT's comparisons: a question (its full_text), two answers and a score for each."""
    asked = require(row, "question")
    asked = asked.get("full_text") if isinstance(asked, dict) else asked
    if not isinstance(asked, str):
        raise wrong(row, f"'question' is {kind(asked)}, not text, nor an object with full_text")
    verdict = _verdict(row, "score_1") - _verdict(row, "score_0")
    return _pair(row, as_messages(asked), "answer_0", "answer_1", verdict)


def read_helpsteer2(row: Row) -> PreferencePair:
    """HelpSteer2's preferences: from -3 (response_1 is much better) to 3 (response_2)."""
    verdict = _verdict(row, "preference_strength")
    return _pair(row, helpsteer_prompt(row), "response_1", "response_2", verdict)


def read_stack_exchange(row: Row) -> PreferencePair:
    """stack-exchange-paired: response_j has more votes than response_k."""
    return _pair(row, as_messages(text(row, "question")), "response_j", "response_k", -1)


def read_summaries(row: Row) -> PreferencePair:
    """OpenAI's comparisons of summaries: `choice` is the number of the better of two.

    The prompt is text, in the form of the paper (Stiennon et al. 2020, table 4): SUBREDDIT, TITLE,
    POST (or ARTICLE) and TL;DR, each on a line of its own.
    """
    info, choice, summaries = (require(row, key) for key in ("info", "choice", "summaries"))
    if not isinstance(info, dict) or not isinstance(summaries, list) or len(summaries) != 2:
        raise wrong(row, "'info' must be an object and 'summaries' a list of two")
    texts = [item.get("text") if isinstance(item, dict) else item for item in summaries]
    if not all(isinstance(said, str | None) for said in texts):
        raise wrong(row, f"'summaries' is {kind(summaries)}, not two texts")
    if choice not in (0, 1):
        raise wrong(row, f"'choice' is {kind(choice)}; it must be 0 or 1")
    parts = [
        f"{name.upper()}: {'r/' * (name == 'subreddit')}{info[name]}"
        for name in ("subreddit", "title", "post", "article")
        if info.get(name)
    ]
    if not parts:
        raise Unreadable("empty_prompt", "info holds no post and no article")
    chosen, rejected = (texts[int(n)] or "" for n in (choice, 1 - choice))
    return join(row, "\n".join([*parts, "TL;DR:"]), chosen, rejected)
