"""Short pieces of text for people to look at: what a rule saw, safe to print anywhere."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata

from smoldpo.types import Prompt

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


# What makes two prompts the same, and what makes them nearly the same.


NOT_WORDS = re.compile(r"[\W_]+")


def prompt_key(prompt: Prompt) -> str:
    """What makes two prompts the same: SHA-256 (hex) of their text, case and spacing aside."""
    return hashlib.sha256(json.dumps(_turns(prompt)).encode()).hexdigest()


def bare_words(prompt: Prompt) -> str:
    """A prompt's letters and digits alone; prompts that differ in punctuation have the same."""
    return NOT_WORDS.sub("", " ".join(said for _, said in _turns(prompt)))


def _turns(prompt: Prompt) -> list[list[str]]:
    if isinstance(prompt, str):
        return [["user", plain(prompt)]]
    return [[m["role"], plain(m.get("content") or "")] for m in prompt if m["role"] != "system"]


def plain(text: str) -> str:
    """`text` without case, and with single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def number_of(*parts: str) -> int:
    """A 64-bit hash of texts, the same in every process."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part.encode("utf-8", "surrogatepass"))
        digest.update(b"\xff")  # no UTF-8 text holds this byte: ("a", "bc") is not ("ab", "c")
    return int.from_bytes(digest.digest(), "little")
