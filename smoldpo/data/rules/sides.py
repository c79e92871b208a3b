"""Drops: pairs that teach nothing, because a text is missing or both answers say the same.

Each function takes a pair and says what is wrong with it, or None.
"""

from __future__ import annotations

import re

from rapidfuzz import fuzz

from smoldpo.data.rules.excerpts import excerpt, first_difference
from smoldpo.types import PreferencePair, Prompt

NUMBER = re.compile(r"\d+")

Finding = tuple[str, str]
"""What is wrong, and the piece of text that shows it."""


def empty_prompt(pair: PreferencePair) -> Finding | None:
    if isinstance(pair.prompt, str):
        return None if pair.prompt.strip() else ("the prompt is empty", excerpt(pair.prompt))
    if not pair.prompt:
        return "the prompt has no messages", ""
    says = pair.prompt[-1].get("content") or pair.prompt[-1].get("tool_calls")
    return None if says and str(says).strip() else ("the prompt's last message is empty", "")


def empty_chosen(pair: PreferencePair) -> Finding | None:
    return None if pair.chosen.strip() else ("chosen is empty", excerpt(pair.rejected))


def empty_rejected(pair: PreferencePair) -> Finding | None:
    return None if pair.rejected.strip() else ("rejected is empty", excerpt(pair.chosen))


def identical(pair: PreferencePair) -> Finding | None:
    """The same text on both sides, white space at the ends aside."""
    if pair.chosen.strip() != pair.rejected.strip():
        return None
    return "chosen and rejected are the same", excerpt(pair.chosen)


def near_identical(pair: PreferencePair, threshold: float) -> Finding | None:
    """Sides that are alike to `threshold` (Indel similarity, 0 to 1), but for one that counts.

    Where the sides hold different numbers they are not alike, however long the rest: a wrong
    figure is a real reason to reject an answer.
    """
    alike = fuzz.ratio(pair.chosen, pair.rejected, score_cutoff=100 * threshold)
    if not alike or NUMBER.findall(pair.chosen) != NUMBER.findall(pair.rejected):
        return None
    at = first_difference(pair.chosen, pair.rejected)
    both = f"{excerpt(pair.chosen, at, 40)} / {excerpt(pair.rejected, at, 40)}"
    return f"chosen and rejected are {min(alike, 99.9):.1f}% alike", both


def prompt_text(prompt: Prompt) -> str:
    """What is said in a prompt, one message after another; system prompts are left out."""
    if isinstance(prompt, str):
        return prompt
    said = (message.get("content") for message in prompt if message.get("role") != "system")
    return "\n".join(text for text in said if isinstance(text, str))
