r"""From texts to token ids: chat template, boundary, end of turn, truncation.

    prompt_ids                          chosen_ids / rejected_ids
    <template with generation prompt>   <answer's tokens> <end of turn>
    \_____ the same for both sides ___/ \______ all of it is scored _____/

* The prompt is tokenised once and shared by both sides; the answer's tokens follow it. Where the
  tokenizer would have merged characters across that boundary the pair carries "boundary_merge".
* The template's own end of the assistant's turn, up to and including its first special token, is
  scored; what the template puts after it (a newline, often) is left away.
* A model without a chat template reads plain text: at most one BOS before it, EOS after it once.
* Truncation keeps completions: the prompt loses its oldest tokens first; a completion that does not
  fit even then loses its end, and gets no end of turn.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from smoldpo.data.template_sandbox import TemplateLimitError, render
from smoldpo.types import (
    NO_NUMBERS,
    Advance,
    Message,
    PreferencePair,
    Prompt,
    TokenizedPair,
    no_progress,
)
from smoldpo.utils.errors import DataError, ModelError, UsageError

PROBE = "smoldpo probe"
TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    TemplateLimitError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What a template that is wrong, or hostile, may raise: it is a program."""
PRIVATE = re.compile("\ue000(\\d+)\ue001")


@dataclass(frozen=True)
class TurnShape:
    """What a chat template does around an answer, found by rendering one."""

    end_of_turn: str
    trims: bool
    agrees: bool
    """Whether the answer stands right behind the generation prompt when the whole is rendered."""


class PairTokenizer:
    """Tokenises pairs for one model and one `max_length`, and counts what happened on the way."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int):
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.is_chat = bool(tokenizer.chat_template)
        self.turn = _probe_turn(tokenizer) if self.is_chat else None
        self.notes: Counter[str] = Counter()
        added = tokenizer.added_tokens_decoder.values()
        control = sorted((token.content for token in added if token.special), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, control)) or "(?!)")
        self._bos = _leading_bos(tokenizer)

    def tokenize(self, pair: PreferencePair) -> TokenizedPair:
        """One pair as token ids.

        Raises:
            DataError: the template refuses the dialogue, or the prompt has no tokens.
        """
        notes: set[str] = set()
        if self.is_chat:
            prompt_ids, (chosen_ids, rejected_ids) = self._chat(pair, notes)
        else:
            prompt_ids, (chosen_ids, rejected_ids) = self._plain(pair, notes)
        if not prompt_ids:
            raise DataError("the prompt has no tokens", pair.file, pair.row)
        tokenized = self._truncate(pair.id, prompt_ids, chosen_ids, rejected_ids, notes)
        if pair.numbers != NO_NUMBERS:
            tokenized = replace(tokenized, numbers=pair.numbers)
        self.notes.update(notes)
        return tokenized

    def tokenize_all(
        self, pairs: Iterable[PreferencePair], advance: Advance = no_progress
    ) -> list[TokenizedPair]:
        """Every pair, in order."""
        tokenized = []
        for pair in pairs:
            tokenized.append(self.tokenize(pair))
            advance(1)
        return tokenized

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """A prompt alone, ready for the model to answer."""
        pair = PreferencePair(prompt, "", "")
        return (self._chat if self.is_chat else self._plain)(pair, set())[0]

    def _chat(
        self, pair: PreferencePair, notes: set[str]
    ) -> tuple[list[int], tuple[list[int], list[int]]]:
        assert self.turn is not None
        forged: list[str] = []
        messages = _as_messages(pair.prompt)
        messages = [
            _map_content(message, lambda text: self._hide(text, forged)) for message in messages
        ]
        try:
            rendered = render(self.tokenizer, messages, add_generation_prompt=True)
        except TEMPLATE_ERRORS as error:
            raise DataError(
                f"the model's chat template refuses this dialogue: {error}", pair.file, pair.row
            ) from None
        prompt_ids = self._encode(rendered, forged)
        completions = []
        for side in (pair.chosen, pair.rejected):
            answer = self._hide(side.strip() if self.turn.trims else side, forged)
            completion = self._encode(answer + self.turn.end_of_turn, forged)
            if not forged and self._encode(rendered + answer, forged) != prompt_ids + self._encode(
                answer, forged
            ):
                notes.add("boundary_merge")
            completions.append(completion)
        if forged:
            notes.add("forged_control_token")
        if not self.turn.agrees:
            notes.add("template_puts_text_before_answer")
        return prompt_ids, (completions[0], completions[1])

    def _plain(
        self, pair: PreferencePair, notes: set[str]
    ) -> tuple[list[int], tuple[list[int], list[int]]]:
        if not isinstance(pair.prompt, str):
            raise DataError(
                "the prompt is a list of messages, but the model has no chat template; "
                "use a chat (Instruct) model, or a prompt that is text",
                pair.file,
                pair.row,
            )
        forged: list[str] = []
        prompt = self._hide(pair.prompt, forged)
        prompt_ids = self._encode(prompt, forged)
        completions = []
        for side in (pair.chosen, pair.rejected):
            answer = self._hide(side, forged)
            completion = self._encode(answer, forged)
            if not forged and self._encode(prompt + answer, forged) != prompt_ids + completion:
                notes.add("boundary_merge")
            completions.append([*completion, self._eos()])
        if forged:
            notes.add("forged_control_token")
        return self._bos + prompt_ids, (completions[0], completions[1])

    def _eos(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise ModelError(
                "the tokenizer has no end-of-sequence token, so no answer could ever end"
            )
        return self.tokenizer.eos_token_id

    def _hide(self, text: str, forged: list[str]) -> str:
        """Replace control tokens written out in `text` by private marks; `forged` remembers them.

        Text that people wrote must never become a control token: a forged end of turn would split a
        message in two. The template sees the marks, and `_encode` spells the texts out again.
        """

        def mark(match: re.Match[str]) -> str:
            forged.append(match.group())
            return f"\ue000{len(forged) - 1}\ue001"

        return self._control.sub(mark, text)

    def _encode(self, text: str, forged: list[str]) -> list[int]:
        if not forged:
            return self._ids(text)
        ids: list[int] = []
        for index, piece in enumerate(PRIVATE.split(text)):
            is_mark = index % 2 == 1 and int(piece) < len(forged)
            ids += (
                self._ids(forged[int(piece)], split_special=True) if is_mark else self._ids(piece)
            )
        return ids

    def _ids(self, text: str, split_special: bool = False) -> list[int]:
        return self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=split_special, verbose=False
        )["input_ids"]

    def _truncate(
        self, id: str, prompt: list[int], chosen: list[int], rejected: list[int], notes: set[str]
    ) -> TokenizedPair:
        room = max(1, self.max_length - max(len(chosen), len(rejected)))
        if len(prompt) > room:
            prompt = prompt[-room:]
            notes.add("prompt_truncated")
        room = self.max_length - len(prompt)
        if len(chosen) > room:
            notes.add("chosen_truncated")
        if len(rejected) > room:
            notes.add("rejected_truncated")
        return TokenizedPair(
            id, tuple(prompt), tuple(chosen[:room]), tuple(rejected[:room]), frozenset(notes)
        )


def require_room(pairs: Sequence[TokenizedPair], positions: int | None) -> None:
    """Refuse pairs that are longer than the model was made for.

    Raises:
        UsageError: the longest one has more tokens than the model has positions.
    """
    longest = max((pair.longest for pair in pairs), default=0)
    if positions is not None and longest > positions:
        raise UsageError(
            f"the longest pair has {longest:,} tokens, but the model only {positions:,} positions; "
            f"give --max-length {positions} (or less)"
        )


def _as_messages(prompt: Prompt) -> list[Message]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def _map_content(message: Message, change: Any) -> Message:
    content = message.get("content")
    return message if content is None else message | {"content": change(content)}


def _probe_turn(tokenizer: PreTrainedTokenizerBase) -> TurnShape:
    """Render a small dialogue and look at what stands around the answer.

    Raises:
        ModelError: the template fails, or leaves the answer out.
    """
    question: list[Message] = [{"role": "user", "content": "question"}]
    answered = [*question, {"role": "assistant", "content": f" {PROBE} "}]
    try:
        prompt = render(tokenizer, question, add_generation_prompt=True)
        whole = render(tokenizer, answered, add_generation_prompt=False)
    except TEMPLATE_ERRORS as error:
        raise ModelError(f"the model's chat template cannot be used: {error}") from None
    before, found, after = whole.rpartition(PROBE)
    if not found:
        raise ModelError("the model's chat template leaves the assistant's answer out")
    trims = not (before.endswith(" ") and after.startswith(" "))
    after = after.removeprefix("" if trims else " ")
    before = before if trims else before[:-1]
    return TurnShape(_end_of_turn(tokenizer, after), trims, agrees=before == prompt)


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, after: str) -> str:
    """The text behind an answer up to its first special token; EOS where the template has none."""
    specials = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    ends = [after.find(token) + len(token) for token in specials if token in after]
    if ends:
        return after[: min(ends)]
    if tokenizer.eos_token is None:
        raise ModelError("the chat template ends no turn, and the tokenizer has no EOS token")
    return tokenizer.eos_token


def _leading_bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before plain text of its own accord: [bos] or nothing."""
    ids = tokenizer("x")["input_ids"]
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and ids[:1] == [bos] else []
