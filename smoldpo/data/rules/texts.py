"""Mends: what is done to a text that holds something no reader ever meant to be there.

Each function takes a text and returns it mended; a text without the fault comes back as it was.
"""

from __future__ import annotations

import re
from collections.abc import Callable

SURROGATE = re.compile("[\ud800-\udfff]")
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
"""C0 controls but for tab, line feed and carriage return; and DEL."""
BIDI = re.compile("[\u202a-\u202e\u2066-\u2069]")
"""Embeddings, overrides and isolates. Marks that right-to-left text needs (U+200E, U+200F) stay."""

ANYTHING = re.compile(f"{SURROGATE.pattern}|{CONTROL.pattern}|{BIDI.pattern}")

RESIDUE = re.compile(
    r"\n(?:\n(?:Human|Assistant)"
    r"|(?:Human|Assistant|User)[ \t]*:"
    r"|\#\#\#[ \t]*(?:Human|Assistant|User|Instruction|Input|Response)[ \t]*:?)\Z"
)
"""The mark of a next turn that never came. Without a colon it counts after an empty line only."""
TAIL = 60


def mend_unicode(text: str) -> str:
    """Halves of a surrogate pair become U+FFFD where they stand alone; a whole pair is joined."""
    if not SURROGATE.search(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def mend_controls(text: str) -> str:
    """NUL and other control characters are taken out."""
    return CONTROL.sub("", text)


def mend_bidi(text: str) -> str:
    """Characters that make text run the other way are taken out."""
    return BIDI.sub("", text)


def mend_residue(answer: str) -> str:
    """The mark of a next turn at an answer's end is cut off, with the white space before it."""
    # Only the last characters are looked at, again and again: fast, whatever the text before.
    left = answer.rstrip()
    found = RESIDUE.search(left[-TAIL:])
    if not found:
        return answer
    while found:
        left = left[: max(0, len(left) - TAIL) + found.start()].rstrip()
        found = RESIDUE.search(left[-TAIL:])
    return left


EVERYWHERE: dict[str, Callable[[str], str]] = {
    "invalid_unicode": mend_unicode,
    "control_characters": mend_controls,
    "bidi_controls": mend_bidi,
}
"""Mends for every text of a pair, in this order."""

ANSWERS: dict[str, Callable[[str], str]] = {"transcript_residue": mend_residue}
"""Mends for answers alone; they come after the others, which may bring such a residue to light."""
