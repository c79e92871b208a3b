"""Short pieces of text for people to look at: what a rule saw, safe to print anywhere."""

from __future__ import annotations

import re

WIDTH = 80
HIDDEN = re.compile("[\ud800-\udfff\x00-\x1f\x7f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """`text` with characters that do not print, or that reorder others, written as escapes."""
    return HIDDEN.sub(lambda match: _escape(match.group()), text)


def _escape(character: str) -> str:
    code = ord(character)
    short = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return short.get(character) or (f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}")


def excerpt(text: str, at: int = 0, width: int = WIDTH) -> str:
    """About `width` characters of `text` around position `at`, on one line."""
    start = max(0, min(at - width // 3, len(text) - width))
    piece = visible(text[start : start + width])
    return ("…" if start > 0 else "") + piece + ("…" if start + width < len(text) else "")


def tail(text: str, width: int = WIDTH) -> str:
    """The end of `text`, on one line."""
    return excerpt(text, len(text), width)


def first_difference(ours: str, theirs: str) -> int:
    """Where two texts stop being the same."""
    for index, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        if one != other:
            return index
    return min(len(ours), len(theirs))
