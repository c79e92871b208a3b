"""Text to token ids. What people wrote never becomes a control token of the chat template.

Control tokens that are written out in a text are replaced by private marks before the template is
rendered, and spelled out, as ordinary text, when the rendered dialogue is encoded.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Callable, Iterable

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from smoldpo.utils.text import common_length

HIDDEN = re.compile("\ue000(\\d+)\ue001")
THINKING_TAGS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),
)
"""Around what a model thinks before it answers. Answers may hold them: models write them."""
ANCHORS = ("\n", ":", "x")


class TextEncoder:
    """Encodes rendered dialogues and plain texts with one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, marks: Iterable[str] = ()):
        """`marks`: added tokens that the template writes around turns, special or not."""
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        control = {token.content for token in added.values() if token.special} | set(marks)
        self._ids_of_control = {id for id, token in added.items() if token.content in control}
        tags = {tag for pair in THINKING_TAGS for tag in pair}
        self._hidden = _any_of(control, or_else=HIDDEN.pattern)
        self._hidden_in_answers = _any_of(control - tags, or_else=HIDDEN.pattern)
        self._added = _any_of(token.content for token in added.values())
        self._anchor = self._find_anchor()

    def hide(self, text: str, hidden: list[str], answer: bool = False) -> str:
        """The text with private marks for control tokens; `hidden` remembers what they stand for.

        In an `answer` the tags of thinking stay: the model is to write them.
        """

        def mark(match: re.Match[str]) -> str:
            hidden.append(match.group())
            return f"\ue000{len(hidden) - 1}\ue001"

        return (self._hidden_in_answers if answer else self._hidden).sub(mark, text)

    def encode(self, text: str, hidden: list[str], behind_text: bool = False) -> list[int]:
        """The token ids of a text from `hide`, or of a template's rendering of such texts.

        `behind_text`: without the space that some tokenizers put before a first text.
        """
        if not HIDDEN.search(text) or not hidden:
            return self._ids_behind_text(text) if behind_text else self._ids(text)
        # Each section with the added token before it, which decides how the section begins.
        starts = [0, *(match.start() for match in self._added.finditer(text)), len(text)]
        ids: list[int] = []
        for start, end in itertools.pairwise(sorted(set(starts))):
            section = text[start:end]
            token = self._added.match(section)
            lead = token.group() if token else ""
            inner = not lead and (start > 0 or behind_text)
            if HIDDEN.search(section):
                spelled = HIDDEN.sub(lambda m: _spelled(m, hidden), section[len(lead) :])
                spaced = self._is_spaced_behind(lead) if lead else not inner
                ids += (self._ids(lead) if lead else []) + self._literal(spelled, spaced)
            else:
                ids += self._ids_behind_text(section) if inner else self._ids(section)
        return ids

    def continuation(
        self, before: str, before_ids: list[int], text: str, hidden: list[str]
    ) -> tuple[list[int], bool]:
        """The ids of `text` behind `before`, and whether the tokenizer would merge across.

        Where it would not, `before` and `text` together have these ids as one text, too.
        """
        whole = self.encode(before + text, hidden)
        rest = whole[len(before_ids) :]
        swallowed = bool(text) and not rest  # by an unknown token, which stands for any text
        unknown = before_ids[-1:] == [self.tokenizer.unk_token_id] and not before.endswith(
            str(self.tokenizer.unk_token)  # as an end of turn: OLMo 2's is both
        )
        if whole[: len(before_ids)] == before_ids and not swallowed and not unknown:
            return rest, False
        return self.encode(text, hidden, behind_text=True), True

    def shared_start(self, a: str, b: str) -> str:
        """What two rendered dialogues both begin with, up to its last added token.

        There both split into tokens, so that what they share has the same ids in each.
        """
        shared = a[: common_length(a, b)]
        end = max((match.end() for match in self._added.finditer(shared)), default=0)
        return shared[:end]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _find_anchor(self) -> str:
        """A text behind which another begins without the space that stands before a first one.

        "" for tokenizers that put no space before the first text (most; Llama 2's does).
        """
        alone = self._ids("x")
        for anchor in ANCHORS:
            ids, both = self._ids(anchor), self._ids(f"{anchor}x")
            if both[: len(ids)] == ids and len(both) > len(ids):
                return "" if both[len(ids) :] == alone else anchor
        return ""

    def _ids_behind_text(self, text: str) -> list[int]:
        return _without_anchor(self._ids, self._anchor, text)

    def _is_spaced_behind(self, token: str) -> bool:
        """Whether a text behind an added token begins as a first text does."""
        return not self._anchor or self._ids(f"{token}x")[1:] == self._ids("x")

    def _literal(self, text: str, spaced: bool) -> list[int]:
        """The ids of a text in which no added token is looked for; never a control token."""
        ids = _without_anchor(self._plain_ids, "" if spaced else self._anchor, text)
        if self._ids_of_control.isdisjoint(ids):
            return ids
        return [id for letter in text for id in self._ids_behind_text(letter)]

    def _plain_ids(self, text: str) -> list[int]:
        if self._plain is None:  # a tokenizer in Python: it leaves special ones alone if asked
            return self.tokenizer(
                text, add_special_tokens=False, split_special_tokens=True, verbose=False
            )["input_ids"]
        return self._plain.encode(text, add_special_tokens=False).ids

    @functools.cached_property
    def _plain(self) -> Tokenizer | None:
        """The same tokenizer without added tokens."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        return Tokenizer.from_str(json.dumps(json.loads(backend.to_str()) | {"added_tokens": []}))


def _spelled(match: re.Match[str], hidden: list[str]) -> str:
    number = int(match.group(1))
    return hidden[number] if number < len(hidden) else match.group()


def _without_anchor(encode: Callable[[str], list[int]], anchor: str, text: str) -> list[int]:
    """The ids of `text` as they are behind `anchor`."""
    before, both = encode(anchor) if anchor else [], encode(anchor + text)
    rest = both[len(before) :]
    return rest if both[: len(before)] == before and (rest or not text) else encode(text)


def _any_of(texts: Iterable[str], or_else: str = "(?!)") -> re.Pattern[str]:
    """Any of the texts that are more than white space, the longest first, or a pattern."""
    written = sorted({text for text in texts if text.strip()}, key=len, reverse=True)
    return re.compile("|".join([*map(re.escape, written), or_else]))
