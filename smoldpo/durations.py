"""Lengths of time as people write and read them: 90s, 20m, 1h30m."""

from __future__ import annotations

import re

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


def words(seconds: float) -> str:
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
