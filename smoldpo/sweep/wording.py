"""Settings of a trial, in words. No torch here."""

from __future__ import annotations

from typing import Any


def in_words(settings: dict[str, Any]) -> str:
    """A trial's settings in one line."""
    return ", ".join(f"{name} {value_in_words(value)}" for name, value in settings.items())


def value_in_words(value: Any) -> str:
    """One value, as it would be written on the command line."""
    if isinstance(value, list):
        return ",".join(map(value_in_words, value)) or "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    return "none" if value is None else str(value)
