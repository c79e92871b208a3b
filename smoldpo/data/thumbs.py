"""Single answers with a thumb up or down, as losses of unpaired data (KTO) take them.

A row is read as a pair of its answer against none (`read_thumb`), so that cleaning holds for it;
here it becomes what is trained on: the answer as `chosen`, and as `rejected` another prompt's
answer, from which KTO estimates how far the policy has moved (its KL term). `numbers.liked` says
which kind the answer is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from smoldpo.data.cleaning.text import prompt_key
from smoldpo.types import Message, PreferencePair


def as_thumbs(pairs: Sequence[PreferencePair]) -> list[PreferencePair]:
    """Single answers against none, chosen or rejected; a pair becomes two of them."""
    found = []
    for pair in pairs:
        if pair.numbers.liked is not None:
            found.append(pair)
            continue
        up, down = (replace(pair.numbers, liked=liked) for liked in (True, False))
        found += [
            replace(pair, rejected="", rejected_messages=None, numbers=up, id=f"{pair.id}-up"),
            replace(pair, chosen="", chosen_messages=None, numbers=down, id=f"{pair.id}-down"),
        ]
    return found


def with_partners(thumbs: Sequence[PreferencePair], group: int) -> list[PreferencePair]:
    """Each answer as `chosen` beside the answer before it in its group, the first beside the last.

    As TRL's KTOTrainer has it, whose groups are its batches: what each prompt's answers are for the
    loss, the same answers are, once each, for its KL term. A last group of one joins the one before
    it.

    Raises:
        ValueError: there are fewer than two answers.
    """
    if len(thumbs) < 2:
        raise ValueError("KTO needs two answers at the least")
    starts = list(range(0, len(thumbs), max(2, group)))
    if len(thumbs) - starts[-1] == 1 and len(starts) > 1:
        starts.pop()
    found = []
    for start, end in zip(starts, [*starts[1:], len(thumbs)], strict=True):
        some = thumbs[start:end]
        for at, thumb in enumerate(some):
            (text, turns), (other, others) = _answer(thumb), _answer(some[at - 1])
            found.append(
                replace(
                    thumb,
                    chosen=text,
                    chosen_messages=turns,
                    rejected=other,
                    rejected_messages=others,
                )
            )
    return found


def _answer(thumb: PreferencePair) -> tuple[str, tuple[Message, ...] | None]:
    """The text and the messages of a single answer."""
    if thumb.numbers.liked:
        return thumb.chosen, thumb.chosen_messages
    return thumb.rejected, thumb.rejected_messages


def as_pairs(thumbs: Sequence[PreferencePair]) -> list[PreferencePair]:
    """Of each prompt with answers of both kinds the first liked against the first other one."""
    found: dict[str, dict[bool, PreferencePair]] = {}
    for thumb in thumbs:
        liked = bool(thumb.numbers.liked)
        found.setdefault(prompt_key(thumb.prompt), {}).setdefault(liked, thumb)
    return [
        replace(
            both[True],
            rejected=both[False].rejected,
            rejected_messages=both[False].rejected_messages,
            numbers=replace(both[True].numbers, liked=None),
        )
        for both in found.values()
        if len(both) == 2
    ]


def held_out(evaluation: Sequence[PreferencePair], group: int) -> list[PreferencePair]:
    """What to evaluate on: pairs, where at least half of the answers are of prompts with both kinds
    (or were pairs); else the answers by themselves, of which at least one of each kind is needed.
    """
    thumbs = [pair for pair in evaluation if pair.numbers.liked is not None]
    pairs = [pair for pair in evaluation if pair.numbers.liked is None] + as_pairs(thumbs)
    if 4 * len(pairs) >= 2 * len(thumbs) or len(thumbs) < 2:
        return pairs
    return with_partners(as_thumbs(evaluation), group)
