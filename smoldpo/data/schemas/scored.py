"""Readers of rows that hold answers and a verdict: scores, votes, labels.

Each pairs the best answer with the worst. A row whose verdict prefers neither is dropped under
`tie`, a row without a verdict under `unrated`.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from smoldpo.data.schemas.cells import refuse_printed
from smoldpo.data.schemas.fields import (
    Unreadable,
    as_messages,
    column,
    dialogue,
    is_transcript,
    join,
    kind,
    messages,
    number,
    parse_transcript,
    present,
    require,
    text,
    text_or_messages,
    wrong,
)
from smoldpo.data.schemas.paired import prompt_column
from smoldpo.data.sources import Row
from smoldpo.types import Message, PairNumbers, PreferencePair

PROMPT_KEYS = ("prompt", "instruction", "input", "question", "context")
ANSWER_LISTS = ("completions", "generations", "responses", "answers")
ANSWER_TEXTS = ("response", "text", "content", "completion", "answer", "output")
SCORE_LISTS = ("ratings", "scores", "rating", "score")
RANK_LISTS = ("ranks", "ranking", "rank")
ANSWER_SCORES = ("fine-grained_score", "annotations", "score", "rating", "overall_score", "rank")
"""In order of trust: UltraFeedback's overall_score is wrong for some of its answers."""
ROW_SCORES = ("helpfulness", "overall_score", "score", "rating", "label")

HELPSTEER_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")
THUMBS = {"up": True, "down": False, "true": True, "false": False}
"""Labels of unpaired rows in words."""
ALONE = "the only answer for its prompt; --loss-type kto takes answers by themselves"
TIES = ("tie", "tie (bothbad)", "both_bad", "bothbad")


def read_ratings(row: Row) -> PreferencePair:
    """Several scored answers in one row: the first of the best against the first of the worst."""
    prompt_key = prompt_column(row, PROMPT_KEYS)
    if prompt_key is None:
        raise Unreadable("empty_prompt", "the prompt is null")
    prompt = _asked(row, prompt_key)
    key = column(row, *ANSWER_LISTS)
    answers = require(row, key)
    if not isinstance(answers, list):
        raise wrong(row, f"{key!r} is {kind(answers)}, not a list of answers")
    texts = [
        _answer_text(row, f"{key!r}, answer {at}", answer) for at, answer in enumerate(answers, 1)
    ]
    scores = _scores(row, answers)
    rated = [(score, said) for score, said in zip(scores, texts, strict=True) if score is not None]
    if len(rated) < 2:
        raise Unreadable("unrated", f"{len(rated)} of {len(answers)} answers have a score")
    (high, best), (low, worst) = max(rated, key=_score), min(rated, key=_score)
    if high == low:
        raise Unreadable("tie", f"all answers have the score {high:g}")
    return join(row, prompt, best, worst)


def _asked(row: Row, key: str) -> tuple[Message, ...]:
    """The prompt's messages; Nectar's is a transcript that ends in "Assistant:"."""
    if is_transcript(row.values[key], open_turn=True):
        return tuple(parse_transcript(row.values[key].rstrip())[:-1])
    return dialogue(row, key)


def _score(item: tuple[float, Any]) -> float:
    return item[0]


def _answer_text(row: Row, where: str, answer: Any) -> str | list[Message]:
    said = answer
    if isinstance(answer, dict) and "role" not in answer:
        said = next((answer[key] for key in ANSWER_TEXTS if answer.get(key) is not None), None)
    if isinstance(said, list | dict):
        return messages(row, where, said)
    if said is not None and not isinstance(said, str):
        raise wrong(row, f"{where} is {kind(said)}, not text")
    return said or ""


def _scores(row: Row, answers: list[Any]) -> Sequence[float | None]:
    """A score an answer: from a list beside them, from inside, or the mean of their ratings."""
    beside = present(row, *SCORE_LISTS, *RANK_LISTS)
    if beside is not None:
        values = row.values[beside]
        if not isinstance(values, list) or len(values) != len(answers):
            raise wrong(
                row, f"{beside!r} is {kind(values)}, not one number an answer ({len(answers)})"
            )
        return [_from_rank(value) if beside in RANK_LISTS else number(value) for value in values]
    inside = [answer if isinstance(answer, dict) else {} for answer in answers]
    readers = {"annotations": _mean_rating, "rank": _from_rank}
    for key in ANSWER_SCORES:
        read = readers.get(key, number)
        scores = [read(answer.get(key)) for answer in inside]
        if sum(score is not None for score in scores) >= 2:
            return scores
    return [None] * len(answers)


def _from_rank(rank: Any) -> float | None:
    """The best has the lowest rank (Nectar: 1, NeMo RL: 0)."""
    place = number(rank)
    return None if place is None else -place


def _mean_rating(annotations: Any) -> float | None:
    """UltraFeedback's annotations: {aspect: {"Rating": "4", ...}}; "N/A" does not count."""
    aspects = annotations.values() if isinstance(annotations, dict) else ()
    ratings = [number(aspect.get("Rating")) for aspect in aspects if isinstance(aspect, dict)]
    known = [rating for rating in ratings if rating is not None]
    return sum(known) / len(known) if known else None


def read_shp(row: Row) -> PreferencePair:
    """Stanford SHP: labels is 1 where people prefer A and 0 where they prefer B.

    score_ratio is the preferred comment's votes over the other's; where it is 1 the row is a tie.
    """
    prompt = as_messages(text(row, "history"))
    a, b = text(row, "human_ref_A"), text(row, "human_ref_B")
    label = number(require(row, "labels"))
    if label not in (0, 1):
        raise wrong(row, f"'labels' is {kind(row.values['labels'])}; it must be 1 (A) or 0 (B)")
    ratio = number(row.values.get("score_ratio"))
    if ratio is not None and ratio <= 1:
        raise Unreadable("tie", f"score_ratio is {ratio:g}: both comments have as many votes")
    return join(row, prompt, *((a, b) if label == 1 else (b, a)))


def read_helpsteer3(row: Row) -> PreferencePair:
    """HelpSteer3: overall_preference goes from -3 (response1 much better) to 3 (response2)."""
    prompt = dialogue(row, "context")
    first, second = text(row, "response1"), text(row, "response2")
    preference = number(require(row, "overall_preference"))
    if preference is None:
        raise Unreadable("unrated", "overall_preference is no number")
    if preference == 0:
        raise Unreadable("tie", "overall_preference is 0")
    return join(row, prompt, *((first, second) if preference < 0 else (second, first)))


def read_arena(row: Row) -> PreferencePair:
    """Arena votes: two answers and a winner. Votes for neither are ties.

    Where two models talked for several turns, each side is all that came from their first answers
    on.
    """
    winner = _winner(row)
    if winner is None:
        raise Unreadable("tie", "the vote is a tie")
    dialogues = [_arena_dialogue(row, side) for side in "ab"]
    chosen, rejected = dialogues if winner == "a" else reversed(dialogues)
    return join(row, (), chosen, rejected)


def _winner(row: Row) -> str | None:
    """ "a", "b", or None for a tie."""
    if "winner" not in row.values:
        votes = {side: row.values.get(f"winner_model_{side}") for side in "ab"}
        won = (side for side, vote in votes.items() if _is_yes(vote))
        return next(won, None)
    value = require(row, "winner")
    if value in ("model_a", "model_b"):
        return value[-1]
    if value in TIES:
        return None
    raise wrong(row, f"'winner' is {kind(value)}; known: model_a, model_b, {', '.join(TIES)}")


def _is_yes(vote: Any) -> bool:
    """1 and True, and the texts "1", "True" and "true": CSV files write all of them."""
    return vote is True or vote in ("True", "true") or number(vote) == 1


def _arena_dialogue(row: Row, side: str) -> list[Message]:
    key = f"conversation_{side}"
    if key in row.values:
        return messages(row, key, require(row, key))
    asked, said = _turns(row, "prompt"), _turns(row, f"response_{side}")
    if len(asked) != len(said):
        raise Unreadable("unparsable", f"{len(asked)} prompts and {len(said)} answers")
    return [
        {"role": role, "content": content}
        for turn in zip(asked, said, strict=True)
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]


def _turns(row: Row, key: str) -> list[str]:
    """What was said in turn; the set with winner_model_a/b keeps JSON lists in its cells."""
    value = require(row, key)
    if isinstance(value, str) and "winner" not in row.values:
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    turns = value if isinstance(value, list) else [row.values[key]]
    if not all(isinstance(turn, str | None) for turn in turns):
        raise wrong(row, f"{key!r} is {kind(value)}, not text or a list of texts")
    return [turn or "" for turn in turns]


class AnswerGroups:
    """HelpSteer: one answer a row; rows that follow each other with one prompt make one pair.

    The best by `helpfulness` (or overall_score, score, rating, TRL's label) stands against the
    worst; the pair carries the row of the chosen answer. Every other row of the group goes to
    `skipped`.
    """

    LARGEST = 256
    """Answers held for one prompt; a longer group is cut here, so that memory stays bounded."""

    def __init__(self, skipped: list[tuple[Row, str, str]]):
        self._skipped = skipped
        self._rows: list[tuple[float, Row]] = []
        self._prompt: tuple[Message, ...] = ()

    def read(self, row: Row) -> list[PreferencePair]:
        """The pair of the group that this row ends, if any."""
        prompt = helpsteer_prompt(row)
        _response(row)
        key = present(row, *ROW_SCORES)
        score = _verdict(row.values[key]) if key else None
        if score is None:
            raise Unreadable("unrated", f"none of {', '.join(ROW_SCORES)} is a number")
        ends = prompt != self._prompt or len(self._rows) >= self.LARGEST
        done = self.finish() if ends else []
        self._rows.append((score, row))
        self._prompt = prompt
        return done

    def finish(self) -> list[PreferencePair]:
        """The pair of the group still open, if it makes one."""
        rated, self._rows = self._rows, []
        if not rated:
            return []
        (high, best), (low, worst) = max(rated, key=_score), min(rated, key=_score)
        for _, row in rated:
            if len(rated) == 1:
                self._skipped.append((row, "unpaired", ALONE))
            elif high == low:
                self._skipped.append((row, "tie", f"all {len(rated)} answers have {high:g}"))
            elif row is not best and row is not worst:
                detail = "neither the best nor the worst answer for its prompt"
                self._skipped.append((row, "unpaired", detail))
        if high == low:
            return []
        try:
            pair = join(best, self._prompt, _response(best), _response(worst))
            return [refuse_printed(pair)]
        except Unreadable as reason:
            self._skipped += [(row, reason.rule, str(reason)) for row in (best, worst)]
            return []


def _response(row: Row) -> str | list[Message]:
    """The answer of a row; in TRL's unpaired form it is called completion."""
    return text_or_messages(row, column(row, "response", "completion"))


def _verdict(value: Any) -> float | None:
    """A score, or TRL's label: whether people liked the answer."""
    if isinstance(value, str) and value.strip().lower() in THUMBS:
        return float(THUMBS[value.strip().lower()])
    return float(value) if isinstance(value, bool) else number(value)


def read_thumb(row: Row) -> PreferencePair:
    """An unpaired row by itself: its completion against none, on the side that the label says.

    So rules that compare pairs hold for it, too: the same completion liked and disliked is
    contradictory.
    """
    said = require(row, "label")
    liked = _verdict(said)
    if liked not in (0, 1):
        raise wrong(row, f"'label' is {kind(said)}; known: true, false, 1, 0, up, down")
    answer = _response(row)
    pair = join(row, helpsteer_prompt(row), *((answer, "") if liked else ("", answer)))
    return replace(pair, numbers=PairNumbers(liked=bool(liked)))


def helpsteer_prompt(row: Row) -> tuple[Message, ...]:
    """Earlier turns stand in HelpSteer2's prompt as "<extra_id_1>Assistant\\n" and "...User\\n"."""
    prompt = text_or_messages(row, "prompt")
    if not isinstance(prompt, str):
        return tuple(prompt)
    opening, *turns = HELPSTEER_TURN.split(prompt)
    roles = ["user", *(who.lower() for who in turns[::2])]
    said = [opening, *turns[1::2]]
    return tuple({"role": r, "content": s} for r, s in zip(roles, said, strict=True))
