"""Texts as rules compare them (normalised, hashed), and as people see them (excerpts)."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata

from smoldpo.types import Prompt
from smoldpo.utils.text import escape_hidden

WIDTH = 80
SURROGATE = re.compile("[\ud800-\udfff]")
NOT_WORDS = re.compile(r"[\W_]+")


def mend_unicode(text: str) -> str:
    """Halves of a surrogate pair become U+FFFD where they stand alone; a whole pair is joined."""
    if not SURROGATE.search(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def excerpt(text: str, at: int = 0, width: int = WIDTH) -> str:
    """About `width` characters of `text` around position `at`, on one line, safe to print."""
    start = max(0, min(at - width // 3, len(text) - width))
    piece = escape_hidden(text[start : start + width])
    return ("…" if start > 0 else "") + piece + ("…" if start + width < len(text) else "")


def tail(text: str) -> str:
    """The end of `text`, on one line."""
    return excerpt(text, len(text))


def first_difference(ours: str, theirs: str) -> int:
    """Where two texts stop being the same."""
    both = enumerate(zip(ours, theirs, strict=False))
    return next((at for at, (a, b) in both if a != b), min(len(ours), len(theirs)))


def prompt_text(prompt: Prompt) -> str:
    """What is said in a prompt, one message after another; system prompts are left out."""
    if isinstance(prompt, str):
        return prompt
    said = (message.get("content") for message in prompt if message.get("role") != "system")
    return "\n".join(text for text in said if isinstance(text, str))


def prompt_key(prompt: Prompt) -> str:
    """What makes two prompts the same: SHA-256 (hex) of their text, case and spacing aside."""
    return hashlib.sha256(json.dumps(_turns(prompt)).encode()).hexdigest()


def letters_and_digits(prompt: Prompt) -> str:
    """Prompts that differ in punctuation have the same."""
    return NOT_WORDS.sub("", " ".join(said for _, said in _turns(prompt)))


def _turns(prompt: Prompt) -> list[list[str]]:
    if isinstance(prompt, str):
        return [["user", normalize(prompt)]]
    return [[m["role"], normalize(m.get("content") or "")] for m in prompt if m["role"] != "system"]


def normalize(text: str) -> str:
    """`text` in NFKC, without case, and with single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def hash64(*parts: str) -> int:
    """A 64-bit hash of texts, the same in every process."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part.encode("utf-8", "surrogatepass"))
        digest.update(b"\xff")  # no UTF-8 text holds this byte: ("a", "bc") is not ("ab", "c")
    return int.from_bytes(digest.digest(), "little")
