"""Drops: dialogues that no chat template was made for."""

from __future__ import annotations

from smoldpo.data.rules.excerpts import excerpt
from smoldpo.data.rules.sides import Finding, prompt_text
from smoldpo.types import PreferencePair

MAY_FOLLOW = {
    "user": ("", "assistant", "tool"),
    "assistant": ("", "user", "tool"),
    "tool": ("assistant", "tool"),
}
"""Who may have spoken before each role; "" is the beginning. A greeting may open a dialogue."""

INSTRUCTIONS = ("system", "developer")


def not_alternating(pair: PreferencePair) -> Finding | None:
    """Two turns of one speaker in a row; system prompts may stand anywhere."""
    if isinstance(pair.prompt, str):
        return None
    before = ""
    for number, message in enumerate(pair.prompt, 1):
        role = message["role"]
        if role in INSTRUCTIONS:
            continue
        if before not in MAY_FOLLOW[role]:
            return f"message {number} ({role}) follows {before or 'nothing'}", _last_words(pair)
        before = role
    return None


def not_user_last(pair: PreferencePair) -> Finding | None:
    """A prompt that ends with the assistant's own words, so that there is nothing to answer."""
    if isinstance(pair.prompt, str) or not pair.prompt:
        return None
    roles = [message["role"] for message in pair.prompt if message["role"] not in INSTRUCTIONS]
    if roles and roles[-1] in ("user", "tool"):
        return None
    return f"the prompt ends with the {roles[-1] if roles else 'system prompt'}", _last_words(pair)


def _last_words(pair: PreferencePair) -> str:
    said = prompt_text(pair.prompt)
    return excerpt(said, len(said))
