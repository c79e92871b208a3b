r"""From texts to token ids: chat template, boundary, end of turn, truncation.

    prompt_ids                          chosen_ids / rejected_ids
    <template with generation prompt>   <answer's tokens> <end of turn>
    \_____ the same for both sides ___/ \______ all of it is scored _____/

* The prompt is tokenised once and shared by both sides; the answer's tokens follow it. Where the
  tokenizer would have merged characters across that boundary the pair carries "boundary_merge".
* An answer is what the template writes behind the generation prompt, up to and including its end of
  turn; what it puts after that (a newline, often) is left away. See data/chat_template.py.
* Of a side of several messages the assistant's turns are scored, and what tools and users say
  between them is not.
* A model without a chat template reads plain text: at most one BOS before it, EOS after it once.
* Truncation keeps completions: the dialogue loses its oldest turns, then the prompt its oldest
  tokens; a completion that does not fit even then loses its end, and gets no end of turn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase

from smoldpo.config.field_types import Score, Truncate
from smoldpo.data.chat_template import TEMPLATE_ERRORS, ChatTemplate, Mismatch, TemplateSettings
from smoldpo.data.dialogue import as_messages, as_text, sides, without_oldest_turn
from smoldpo.data.text_encoder import HIDDEN, TextEncoder
from smoldpo.data.written_side import Part, WrittenSide, setting_that_helps, write_side
from smoldpo.types import (
    NO_ARGUMENTS,
    Advance,
    Message,
    PreferencePair,
    Prompt,
    TemplateArguments,
    TokenizedPair,
    no_progress,
)
from smoldpo.utils.errors import DataError, ModelError, UsageError

TOO_LONG, SAME, UNSCORED = "too_long", "same_tokens", "nothing_scored_after_truncation"
REFUSED = "not_tokenizable"


@dataclass(frozen=True)
class Tokenization:
    """How pairs become tokens, beside the tokenizer.

    Attributes:
        max_length: tokens of prompt and completion together.
        template: what the chat template reads besides messages.
        truncation: of a dialogue that is too long: `turns`, the oldest whole turns go, then tokens;
            `tokens`, the prompt's oldest; `drop`, the pair is left out.
        score: of a side of several messages: every turn of the `assistant`, or the `last`.
    """

    max_length: int
    template: TemplateSettings = field(default_factory=TemplateSettings)
    truncation: Truncate = "turns"
    score: Score = "assistant"


@dataclass
class FoundMismatch:
    """A mismatch, the first pair that has it, and how many have it."""

    mismatch: Mismatch
    file: str
    row: int
    pairs: int = 0

    def __str__(self) -> str:
        where = f"{self.file}, row {self.row}" if self.file else "the first one"
        return f"{self.mismatch} ({self.pairs:,} pairs; {where}). {self.mismatch.advice}"


class PairTokenizer:
    """Tokenises pairs for one model, and counts what happened on the way.

    Attributes:
        notes: pairs by what happened to them, such as "prompt_truncated".
        left_out: pairs that `select` left out, by the reason.
        refused: why the chat template refuses the first pair of those that it does.
        mismatches: ways in which what is scored is not what the model would write in use.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, how: Tokenization | int):
        """`how`: all of it, or max_length alone.

        Raises:
            ModelError, UsageError: as `ChatTemplate`; or the settings need a chat template, and the
                model has none.
        """
        self.tokenizer = tokenizer
        self.how = how if isinstance(how, Tokenization) else Tokenization(how)
        self.is_chat = bool(tokenizer.chat_template)
        self.template = ChatTemplate(tokenizer, self.how.template) if self.is_chat else None
        if self.template is None and self.how.template != TemplateSettings(self.how.template.date):
            raise UsageError(
                "the model has no chat template to give arguments, tools or documents to; give one "
                "with --chat-template"
            )
        self._encoder = TextEncoder(tokenizer, self.template.marks if self.template else ())
        self._bos = _leading_bos(tokenizer)
        self.notes: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()
        self.refused: DataError | None = None
        self.mismatches: dict[str, FoundMismatch] = {}

    def tokenize(self, pair: PreferencePair) -> TokenizedPair:
        """One pair as token ids.

        Raises:
            DataError: the template refuses the dialogue, or the prompt has no tokens.
        """
        notes: set[str] = set()
        tokenized = self._tokens(pair, notes)
        self.notes.update(tokenized.notes)
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

    def select(
        self, pairs: Iterable[PreferencePair], advance: Advance = no_progress
    ) -> tuple[list[PreferencePair], list[TokenizedPair]]:
        """The pairs that can be learned from, and their tokens; the others are counted.

        Left out are pairs whose sides are the same tokens after truncation: they have no gradient;
        and those that the chat template refuses. With `truncation` drop, those are left out that
        are too long.

        Raises:
            DataError: the template refuses all of them; the message is the first one's.
        """
        chosen, tokens = [], []
        for pair in pairs:
            advance(1)
            try:
                tokenized = self.tokenize(pair)
            except DataError as error:
                self.refused = self.refused or error
                self.left_out[REFUSED] += 1
                continue
            if (reason := self._reason_to_leave_out(tokenized)) is None:
                chosen.append(pair)
                tokens.append(tokenized)
            else:
                self.left_out[reason] += 1
        if self.refused and not chosen:
            raise self.refused
        return chosen, tokens

    def left_out_in_words(self) -> str:
        """How many pairs `select` left out, by reason; of those that are refused the first."""
        counts = (f"{n:,} {why.replace('_', ' ')}" for why, n in self.left_out.items())
        first = f"; the first: {self.refused}" if self.refused else ""
        return ", ".join(counts) + first

    def refusal(self, pair: PreferencePair) -> str | None:
        """Why the chat template refuses a pair, or None; nothing is tokenised."""
        try:
            if self.template is None:
                as_text(pair)
                return None
            before = [*as_messages(pair.prompt)]
            self._shared_prompt(pair, self._write(pair, before, sides(pair)))
        except DataError as error:
            return str(error)
        return None

    def _reason_to_leave_out(self, pair: TokenizedPair) -> str | None:
        if self.how.truncation == "drop" and pair.notes & CUT:
            return TOO_LONG
        if UNSCORED in pair.notes:
            return UNSCORED
        ours, theirs = pair.completions
        return SAME if ours == theirs else None

    def prompt_ids(self, prompt: Prompt, arguments: TemplateArguments = NO_ARGUMENTS) -> list[int]:
        """A prompt alone, ready for the model to answer; never truncated."""
        hidden: list[str] = []
        pair = PreferencePair(prompt, "", "", arguments=arguments)
        if self.template is None:
            text = self._encoder.hide(as_text(pair), hidden)
            return self._bos + self._encoder.encode(text, hidden)
        messages = [self._hide(message, hidden) for message in as_messages(prompt)]
        return self._encoder.encode(self._render(pair, messages, True), hidden)

    def ids_behind_answer(self) -> list[int]:
        """What the chat template puts behind an answer's end of turn: a line break, often."""
        return self._encoder.encode(self.template.behind_turn, []) if self.template else []

    def _tokens(self, pair: PreferencePair, notes: set[str]) -> TokenizedPair:
        if self.template is None:
            return self._finish(pair, *self._plain(pair, notes), notes)
        prompt, ours = self._chat(pair, notes)
        if self.how.truncation == "turns":
            while (shorter := without_oldest_turn(pair)) and self._is_too_long(prompt, ours):
                pair, notes = shorter, notes - {"boundary_merge"} | {"turns_dropped"}
                prompt, ours = self._chat(pair, notes)
        return self._finish(pair, prompt, ours, notes)

    def _is_too_long(self, prompt: list[int], both: Sequence[_Side]) -> bool:
        return len(prompt) + max(len(side.ids) for side in both) > self.how.max_length

    def _chat(self, pair: PreferencePair, notes: set[str]) -> tuple[list[int], list[_Side]]:
        assert self.template is not None
        hidden: list[str] = []
        before = [self._hide(message, hidden) for message in as_messages(pair.prompt)]
        messages = [
            [self._hide(message, hidden, answer=True) for message in side] for side in sides(pair)
        ]
        notes.update(f"{name}_not_read" for name in self.template.unread(pair.arguments))
        written = self._write(pair, before, messages)
        for side, made in zip(messages, written, strict=True):
            notes.update(made.notes)
            for mismatch in made.mismatches:
                self._report(pair, mismatch, before, side, notes)
        prompt = self._shared_prompt(pair, written)
        prompt_ids = self._encoder.encode(prompt, hidden)
        encoded = []
        for made in written:
            parts = [(made.before[len(prompt) :], False), *made.parts]
            encoded.append(self._encode(prompt, prompt_ids, parts, hidden, notes))
        if hidden:
            notes.add("forged_control_token")
        if not self.template.ends_turns:
            notes.add("template_ends_no_turn")
        return prompt_ids, encoded

    def _shared_prompt(self, pair: PreferencePair, written: Sequence[WrittenSide]) -> str:
        """What stands before both sides, where the template gives them different beginnings, too.

        Then the rest of each beginning is read as a part of its side, and not scored.
        """
        ours, theirs = (side.before for side in written)
        if ours == theirs:
            return ours
        if shared := self._encoder.shared_start(ours, theirs):
            return shared
        raise DataError(
            "the chat template writes the whole prompt otherwise once the dialogue goes on, so "
            "that both sides have no prompt in common; give another --chat-template, or sides of "
            "one turn",
            pair.file,
            pair.row,
        )

    def _write(
        self, pair: PreferencePair, before: list[Message], both: Sequence[Sequence[Message]]
    ) -> list[WrittenSide]:
        assert self.template is not None
        asked = self._render(pair, before, True)
        how = (pair.arguments, self.how.score, asked)
        try:
            return [write_side(self.template, before, side, *how) for side in both]
        except TEMPLATE_ERRORS as error:
            raise self._refusal(pair, error) from None

    def _encode(
        self,
        prompt: str,
        prompt_ids: list[int],
        parts: list[Part],
        hidden: list[str],
        notes: set[str],
    ) -> _Side:
        text, ids, scored = prompt, list(prompt_ids), []
        for part, is_scored in parts:
            if not part:
                continue
            more, merged = self._encoder.continuation(text, ids, part, hidden)
            if merged:
                notes.add("boundary_merge")
            text, ids = text + part, ids + more
            scored += [is_scored] * len(more)
        return _Side(ids[len(prompt_ids) :], scored)

    def _plain(self, pair: PreferencePair, notes: set[str]) -> tuple[list[int], list[_Side]]:
        hidden: list[str] = []
        prompt = self._encoder.hide(as_text(pair), hidden)
        prompt_ids = self._encoder.encode(prompt, hidden)
        encoded = []
        for text in (pair.chosen, pair.rejected):
            parts = [(self._encoder.hide(text, hidden), True)]
            side = self._encode(prompt, prompt_ids, parts, hidden, notes)
            encoded.append(_Side([*side.ids, self._eos()], [*side.scored, True]))
        if hidden:
            notes.add("forged_control_token")
        return self._bos + prompt_ids, encoded

    def _eos(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise ModelError(
                "the tokenizer has no end-of-sequence token, so no answer could ever end"
            )
        return self.tokenizer.eos_token_id

    def _hide(self, message: Message, hidden: list[str], answer: bool = False) -> Message:
        """A message without control tokens in its texts.

        Text that people wrote must never become a control token: a forged end of turn would split a
        message in two.
        """

        def change(value: object) -> object:
            if isinstance(value, str):
                return self._encoder.hide(value, hidden, answer or message["role"] == "assistant")
            if isinstance(value, dict):
                return {key: change(item) for key, item in value.items()}
            return [change(item) for item in value] if isinstance(value, list | tuple) else value

        return {k: v if k == "role" else change(v) for k, v in message.items()}

    def _render(self, pair: PreferencePair, messages: list[Message], in_use: bool) -> str:
        assert self.template is not None
        try:
            return self.template.render(messages, in_use, pair.arguments)
        except TEMPLATE_ERRORS as error:
            raise self._refusal(pair, error) from None

    @staticmethod
    def _refusal(pair: PreferencePair, error: Exception) -> DataError:
        problem = f"the model's chat template refuses this dialogue: {error}"
        return DataError(problem, pair.file, pair.row)

    def _report(
        self,
        pair: PreferencePair,
        mismatch: Mismatch,
        before: list[Message],
        side: list[Message],
        notes: set[str],
    ) -> None:
        """Count a mismatch, once a pair; for the first of its kind, look for what helps."""
        found = self.mismatches.get(mismatch.note)
        if found is None:
            assert self.template is not None
            setting = setting_that_helps(self.template, before, side, pair.arguments, mismatch)
            text, becomes = (HIDDEN.sub("", t)[:200] for t in (mismatch.text, mismatch.becomes))
            mismatch = replace(mismatch, text=text, becomes=becomes, setting=setting)
            found = self.mismatches[mismatch.note] = FoundMismatch(mismatch, pair.file, pair.row)
        if mismatch.note not in notes:
            found.pairs += 1
        notes.add(mismatch.note)

    def _finish(
        self, pair: PreferencePair, prompt: list[int], both: Sequence[_Side], notes: set[str]
    ) -> TokenizedPair:
        """The pair cut to max_length."""
        if not prompt:
            raise DataError("the prompt has no tokens", pair.file, pair.row)
        limit = self.how.max_length
        room = max(1, limit - max(len(side.ids) for side in both))
        if len(prompt) > room:
            prompt = prompt[-room:]
            notes.add("prompt_truncated")
        room = limit - len(prompt)
        cut = [_Side(side.ids[:room], side.scored[:room]) for side in both]
        for name, side, whole in zip(("chosen", "rejected"), cut, both, strict=True):
            if len(side.ids) < len(whole.ids):
                notes.add(f"{name}_truncated")
        if not all(any(side.scored) for side in cut):
            notes.add(UNSCORED)
        masks = [tuple(side.scored) if any(side.scored) else None for side in cut]
        chosen, rejected = (tuple(side.ids) for side in cut)
        return TokenizedPair(
            pair.id,
            tuple(prompt),
            chosen,
            rejected,
            notes=frozenset(notes),
            numbers=pair.numbers,
            chosen_scored=masks[0],
            rejected_scored=masks[1],
        )


CUT = frozenset({"prompt_truncated", "chosen_truncated", "rejected_truncated"})


@dataclass(frozen=True)
class _Side:
    """A completion's ids, and which of them are scored."""

    ids: list[int]
    scored: list[bool]


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


def _leading_bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before plain text of its own accord: [bos] or nothing."""
    ids = tokenizer("x")["input_ids"]
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and ids[:1] == [bos] else []
