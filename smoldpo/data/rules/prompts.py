"""What makes two prompts the same, and what makes them nearly the same."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata

from smoldpo.types import Prompt

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
