"""Numbers, lengths of time and secrets in text that people read: 61.2%, 3 min 20 s, 1h30m, ***."""

from __future__ import annotations

import os
import re
from typing import TypeGuard

PARTS = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?")
SECONDS = (3600.0, 60.0, 1.0)


def parse_duration(text: str) -> float:
    """Seconds of a text such as 90s, 20m or 1h30m.

    Raises:
        ValueError: it is written otherwise, or is no time at all.
    """
    found = PARTS.fullmatch(text.strip().lower())
    numbers = found.groups() if found else ()
    total = sum(float(n) * unit for n, unit in zip(numbers, SECONDS, strict=False) if n)
    if not total > 0:
        raise ValueError("give hours, minutes and seconds such as 90s, 20m or 1h30m")
    return total


def format_seconds(seconds: float) -> str:
    """As short as is useful: 0.4 s, 52 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


MISSING = "–"
"""Stands where there is no number."""


def _known(value: float | None) -> TypeGuard[float]:
    return value is not None and -1e300 < value < 1e300  # nan and infinity are not


def _written(value: float | None, form: str) -> str:
    """The number in a format of Python's, with a true minus."""
    return format(value, form).replace("-", "−") if _known(value) else MISSING


def percent(value: float | None, digits: int = 1) -> str:
    """0.612 as 61.2%."""
    return f"{value:.{digits}%}" if _known(value) else MISSING


def points(value: float | None) -> str:
    """A difference of two shares, 0.112, as +11.2."""
    return _written(100 * value, "+.1f") if _known(value) else MISSING


def signed(value: float | None, digits: int = 2) -> str:
    """With its sign, and a true minus."""
    return _written(value, f"+,.{digits}f")


def number(value: float | None, digits: int = 2) -> str:
    """With a true minus, and commas between thousands."""
    return _written(value, f",.{digits}f")


def count(value: float | None) -> str:
    """A whole number, with commas between thousands."""
    return _written(value, ",.0f")


def p_value(value: float | None) -> str:
    """As people print it: two digits that count, and no bare zero."""
    if not _known(value):
        return MISSING
    if value < 0.0001:
        return "< 0.0001"
    return f"{value:.2g}" if value < 0.095 else f"{value:.2f}"


def duration(seconds: float | None) -> str:
    """As `format_seconds`, with tenths below a minute: pages show what was measured."""
    if not _known(seconds):
        return MISSING
    return f"{seconds:.1f} s" if seconds < 60 else format_seconds(seconds)


HIDDEN = "[secret]"
VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_TOKEN")
PATTERNS = (
    re.compile(r"\bhf_[A-Za-z0-9]{16,}"),
    re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"),  # user:password@ in a URL
    re.compile(r"(?<=[?&])((?:access_)?token|api_?key|password|secret)=[^&\s'\"]+", re.IGNORECASE),
)


def redact(text: str) -> str:
    """The text, with the tokens of the environment and whatever looks like one hidden."""
    for name in VARIABLES:
        value = os.environ.get(name, "").strip()
        if len(value) >= 8:
            text = text.replace(value, HIDDEN)
    for pattern in PATTERNS:
        text = pattern.sub(HIDDEN, text)
    return text


def holds_secret(value: object) -> bool:
    """Whether a setting holds one; a list, or text."""
    return redact(str(value)) != str(value)


UNPRINTED = re.compile("[\ud800-\udfff\x00-\x1f\x7f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def common_length(a: str, b: str) -> int:
    """How many characters two texts begin with in common."""
    return next(
        (n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def escape_hidden(text: str) -> str:
    """`text` with characters that do not print, or that reorder others, written as escapes."""
    return UNPRINTED.sub(lambda match: match.group().encode("unicode_escape").decode(), text)
