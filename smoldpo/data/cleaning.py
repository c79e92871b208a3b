"""Cleaning: rules that drop a pair, each with its name, so that every row is accounted for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

from smoldpo.types import PreferencePair


@dataclass(frozen=True)
class Touched:
    """A row that a rule dropped, and why."""

    file: str
    row: int
    rule: str
    action: str
    detail: str

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def _empty_prompt(pair: PreferencePair) -> str | None:
    if isinstance(pair.prompt, str):
        return None if pair.prompt.strip() else "the prompt is empty"
    if not pair.prompt:
        return "the prompt has no messages"
    says = pair.prompt[-1].get("content") or pair.prompt[-1].get("tool_calls")
    return None if says and str(says).strip() else "the prompt's last message is empty"


def _empty_chosen(pair: PreferencePair) -> str | None:
    return None if pair.chosen.strip() else "chosen is empty"


def _empty_rejected(pair: PreferencePair) -> str | None:
    return None if pair.rejected.strip() else "rejected is empty"


def _identical(pair: PreferencePair) -> str | None:
    return "chosen and rejected are the same" if pair.chosen == pair.rejected else None


RULES: dict[str, Callable[[PreferencePair], str | None]] = {
    "empty_prompt": _empty_prompt,
    "empty_chosen": _empty_chosen,
    "empty_rejected": _empty_rejected,
    "identical": _identical,
}
"""Each takes a pair and says what is wrong with it, or None."""


def check_pair(pair: PreferencePair) -> Touched | None:
    """The first rule that drops this pair, or None where it is kept."""
    for rule, says in RULES.items():
        detail = says(pair)
        if detail is not None:
            return Touched(pair.file, pair.row, rule, "drop", detail)
    return None
