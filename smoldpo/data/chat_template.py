"""A model's chat template with everything that it reads: messages, arguments, tools, the day.

What is scored must be what the model would write in use. So each answer is taken from the
template's own rendering of prompt and answer, behind the prompt as a model in use is given it, and
where the two do not go together, a `Mismatch` says how.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from smoldpo.data.dialogue import REASONING_KEYS
from smoldpo.data.template_sandbox import TemplateLimitError, render, variables
from smoldpo.data.text_encoder import THINKING_TAGS
from smoldpo.types import NO_ARGUMENTS, Message, TemplateArguments
from smoldpo.utils.errors import ModelError, UsageError, nearest
from smoldpo.utils.text import common_length

QUESTION, ANSWER = "smoldpo question", "smoldpo probe"
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
_BLOCKS = (rf"{re.escape(start)}\s*({re.escape(end)}\s*)?" for start, end in THINKING_TAGS)
THINKING_AT_END = re.compile(rf"({'|'.join(_BLOCKS)})\Z")
"""A thinking block that is open, or empty and closed, at the end of a prompt."""
_EMPTY = (rf"({re.escape(start)})?\s*{re.escape(end)}" for start, end in THINKING_TAGS)
THINKING_BLOCK = re.compile(rf"\s*({'|'.join(_EMPTY)})\s*")
"""One without thoughts, whole or its end. What else stands before an answer a model writes, too."""
SWITCHES = ("enable_thinking", "thinking")
"""Arguments by which templates turn thinking on and off."""

ADDS = "template_puts_text_before_answer"
OPENS = "prompt_opens_thinking"
CLOSES = "prompt_closes_thinking"
CHANGES = "template_changes_answer"
REWRITES = "template_rewrites_turns"
MISMATCHES = {
    ADDS: "the chat template puts {text} before the answer when it renders the finished dialogue, "
    "and not into the prompt that a model in use is given; training leaves it out",
    OPENS: "the prompt that a model in use is given ends in an open thinking block ({text}), "
    "which the answer does not close",
    CLOSES: "the prompt that a model in use is given ends in a thinking block that is empty and "
    "closed, and the answer brings thinking of its own",
    CHANGES: "the chat template does not write the answer as it stands: {text}",
    REWRITES: "the chat template writes earlier turns otherwise once the dialogue goes on "
    "({text} becomes {becomes}), so that of a side of several turns only the last answer is scored",
}
"""How what is scored can differ from what a model in use would write, by the name of the note."""


@dataclass(frozen=True)
class TemplateSettings:
    """What the chat template reads besides messages, for all rows alike.

    Attributes:
        date: the day that it takes for today; None: the day on which the tokenizer is made.
        kwargs: arguments by name, such as enable_thinking.
        tools: JSON schemas of functions.
        documents: what the assistant may look things up in.
    """

    date: datetime.date | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    tools: tuple[dict[str, Any], ...] = ()
    documents: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Mismatch:
    """A way in which what is scored is not what the model would write, and what helps."""

    note: str
    text: str = ""
    setting: str | None = None
    """The template argument that makes both agree, or the option that asks for no more than it is
    scored, as it is written on the command line."""
    becomes: str = ""
    """Of what is rewritten: as what."""

    def __str__(self) -> str:
        shown = {"text": self.text, "becomes": self.becomes}
        quoted = {name: json.dumps(text, ensure_ascii=False) for name, text in shown.items()}
        return MISMATCHES[self.note].format(**quoted)

    @property
    def advice(self) -> str:
        """What to do."""
        if self.setting and self.setting.startswith("--"):
            return f"{self.setting} asks for no more than that"
        if self.setting:
            return f"--chat-template-kwargs {self.setting} makes both agree"
        return "no argument of the template makes both agree; give another --chat-template"


@dataclass(frozen=True)
class WrittenAnswer:
    """An assistant's turn as the template writes it, its end included.

    Attributes:
        text: what is scored.
        mismatch: the way in which that is not what a model in use would write.
        prompt_differs: the template writes what stands before the answer otherwise once the answer
            is there. It is scored behind what a model in use is given.
    """

    text: str
    mismatch: Mismatch | None = None
    prompt_differs: bool = False


class ChatTemplate:
    """Renders dialogues, and takes answers from the renderings.

    Attributes:
        end_of_turn: what the template writes behind an answer, up to its first control token.
        ends_turns: False where that is the tokenizer's EOS, since the template has no such token.
        behind_turn: what it writes behind that, such as a line break.
        marks: added tokens that it writes around turns.
        day: what it takes for today.
        is_dated: whether it asks.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: TemplateSettings):
        """Render a small dialogue and look at what stands around its turns.

        Raises:
            ModelError: the template fails, or leaves the answer out.
            UsageError: it does not read an argument that the settings have.
        """
        self._tokenizer, self.settings = tokenizer, settings
        self.day = settings.date or datetime.date.today()
        try:
            self.variables = variables(tokenizer.get_chat_template(tools=None))
        except TEMPLATE_ERRORS as error:
            raise ModelError(f"the model's chat template cannot be used: {error}") from None
        self.is_dated = "strftime_now" in self.variables
        self._require_read()
        self._probe()

    def facts(self) -> dict[str, Any]:
        """What the template was given besides messages, for the record; {} where nothing was."""
        given: dict[str, Any] = {"date": self.day.isoformat()} if self.is_dated else {}
        if self.settings.kwargs:
            given["kwargs"] = dict(self.settings.kwargs)
        return given | {
            name: list(value)
            for name in ("tools", "documents")
            if (value := getattr(self.settings, name))
        }

    def _require_read(self) -> None:
        for name in self.settings.kwargs:
            if name not in self.variables:
                raise UsageError(
                    f"--chat-template-kwargs {name}: the model's chat template reads no such "
                    f"argument{nearest(name, self.variables)}"
                )
        for name in ("tools", "documents"):
            if getattr(self.settings, name) and name not in self.variables:
                raise UsageError(f"--{name}: the model's chat template reads no {name}")

    def _probe(self) -> None:
        question: Message = {"role": "user", "content": QUESTION}
        answer: Message = {"role": "assistant", "content": ANSWER}
        try:
            self.render([question], True)
            whole = self.render([question, answer], False)
            longer = self.render([question, answer, question], False)
        except TEMPLATE_ERRORS as error:
            raise ModelError(f"the model's chat template cannot be used: {error}") from None
        _, found, after = whole.rpartition(ANSWER)
        if not found:
            raise ModelError("the model's chat template leaves the assistant's answer out")
        added = {token.content for token in self._tokenizer.added_tokens_decoder.values()}
        tags = {tag for pair in THINKING_TAGS for tag in pair}
        self._added = {text for text in added - tags if text.strip()}
        ends = [after.find(text) + len(text) for text in self._added if text in after]
        self.ends_turns = bool(ends)
        if not ends and self._tokenizer.eos_token is None:
            raise ModelError("the chat template ends no turn, and the tokenizer has no EOS token")
        self.end_of_turn = after[: min(ends)] if ends else str(self._tokenizer.eos_token)
        self.behind_turn = after[min(ends) :] if ends else ""
        self._behind = after
        around = longer.replace(ANSWER, "").replace(QUESTION, "")
        self.marks = {text for text in self._added if text in around}

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        arguments: TemplateArguments = NO_ARGUMENTS,
    ) -> str:
        """The dialogue as the template writes it. Raises one of TEMPLATE_ERRORS."""
        given = dict(self.settings.kwargs) | arguments.kwargs
        for name in ("tools", "documents"):
            own = getattr(arguments, name)
            if value := getattr(self.settings, name) if own is None else own:
                given[name] = list(value)
        return render(
            self._tokenizer,
            [_as_template_reads(message) for message in messages],
            add_generation_prompt,
            self.day,
            **given,
        )

    def unread(self, arguments: TemplateArguments) -> list[str]:
        """What a row gives and the template does not read."""
        names = [*arguments.kwargs]
        names += [name for name in ("tools", "documents") if getattr(arguments, name)]
        return [name for name in names if name not in self.variables]

    def answer(self, seen: str, written: str, message: Message) -> WrittenAnswer:
        """What the model is to write in an assistant's turn.

        Args:
            seen: the dialogue so far, as a model in use is given it.
            written: the dialogue so far with this turn.
            message: the turn.
        """
        start = self._start(seen, written)
        text, mismatch = self._answer(seen, written, message, start)
        ahead = start is not None and written[:start] != seen[:start]
        return WrittenAnswer(text, mismatch, ahead)

    def _answer(
        self, seen: str, written: str, message: Message, start: int | None
    ) -> tuple[str, Mismatch | None]:
        content = str(message.get("content") or "")
        said = content.strip()
        whole = (content if content in written else said) + self.end_of_turn
        opened = _open_tags(seen)
        found: Mismatch | None = None
        text = whole if start is None else self._up_to_end(written[start:])
        told = said.removeprefix(opened[0]) if opened else said
        thought = reasoning_of(message)
        lead = "" if thought or _thinks(said) else _empty_block(text)
        if start is None:
            if not _thinks(said):
                found = Mismatch(CHANGES, written[common_length(seen, written) :])
        elif _letters(told) not in _letters(text):
            if _thinks(said):  # which the template takes from turns that are past
                text = whole
            else:
                found = Mismatch(CHANGES, text)
        elif lead:
            if opened and opened[1] in lead and written.startswith(seen):
                return text, Mismatch(OPENS, opened[0])  # the answer closes the prompt's block
            found, text = Mismatch(ADDS, lead), text[len(lead) :]
        if opened and text.lstrip().startswith(opened[0]):  # the tag stands in the prompt already
            text = text.lstrip().removeprefix(opened[0]).removeprefix("\n")
        if opened and thought and thought not in text:  # taken from past turns, as DeepSeek's does
            return f"{thought.strip()}\n{opened[1]}\n\n{whole.lstrip()}", None
        if any(name not in text for name in _called(message)):
            return text, Mismatch(CHANGES, text)
        if opened and opened[1] not in text:
            return text, Mismatch(OPENS, opened[0])
        if _closed_empty(seen) and (said.startswith(OPENING) or thought):
            return text, Mismatch(CLOSES)
        return text, found

    def _start(self, seen: str, written: str) -> int | None:
        """Where in `written` the assistant's turn begins; None: that cannot be told.

        That is behind what the model is given, a thinking block at its end aside. A template that
        writes what is before otherwise once the answer is there, as Mistral's does with
        instructions, begins the turn with the same marks all the same.
        """
        for start in (seen, THINKING_AT_END.sub("", seen)):
            if written.startswith(start):
                return len(start)
        end = max((seen.rfind(mark) for mark in self.marks), default=-1)
        mark = seen[end:]
        if end < 0 or seen.count(mark) != written.count(mark):
            return None
        return written.rfind(mark) + len(mark)

    def _up_to_end(self, text: str) -> str:
        """A rendered turn up to its end of turn: the usual one, or the last control token."""
        if not self.ends_turns:
            return text.removesuffix(self._behind) + self.end_of_turn
        if (at := text.find(self.end_of_turn)) >= 0:
            return text[: at + len(self.end_of_turn)]
        end = max((text.rfind(mark) + len(mark) for mark in self._added if mark in text), default=0)
        if end and not text[end:].strip():
            return text[:end]
        return text + str(self._tokenizer.eos_token or "")

    def with_argument(self, name: str, value: Any) -> ChatTemplate:
        """The same template with one argument more."""
        kwargs = {**self.settings.kwargs, name: value}
        return ChatTemplate(self._tokenizer, replace(self.settings, kwargs=kwargs))


OPENING = tuple(start for start, _ in THINKING_TAGS)


def reasoning_of(message: Message) -> str:
    """What an assistant's message has thought, in a field of its own; "" where it has none."""
    found = (message.get(key) for key in REASONING_KEYS)
    return next((text for text in found if isinstance(text, str) and text.strip()), "")


def _called(message: Message) -> list[str]:
    """The names of the functions that a message calls."""
    calls = [call for call in message.get("tool_calls") or () if isinstance(call, dict)]
    inner = [call.get("function", call) for call in calls]
    return [call["name"] for call in inner if isinstance(call, dict) and call.get("name")]


def _thinks(said: str) -> bool:
    """Whether an answer's text has thinking in it."""
    return any(close in said for _, close in THINKING_TAGS)


def _empty_block(text: str) -> str:
    """The thinking block without thoughts that a turn begins with, and the lines behind it."""
    block = THINKING_BLOCK.match(text)
    return block.group().rstrip(" \t") if block else ""


def _letters(text: str) -> str:
    return "".join(text.split())


def _as_template_reads(message: Message) -> Message:
    """A message as templates expect it: a content, and tool calls with objects for arguments.

    OpenAI's form has the arguments as JSON text, which templates would write as a quoted string.
    """
    message = {"content": "", **message}
    calls = message.get("tool_calls")
    if isinstance(calls, list | tuple):
        message["tool_calls"] = [_parsed_call(call) for call in calls]
    return message


def _parsed_call(call: Any) -> Any:
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return call | {"function": _parsed_call(call["function"])}
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except ValueError:
            return call
        if isinstance(parsed, dict):
            return call | {"arguments": parsed}
    return call


def _open_tags(seen: str) -> tuple[str, str] | None:
    """The tags of the thinking block that a prompt ends in, where it is open."""
    end = seen.rstrip()
    return next((tags for tags in THINKING_TAGS if end.endswith(tags[0])), None)


def _closed_empty(seen: str) -> bool:
    """Whether a prompt ends in a thinking block that is empty and closed."""
    return any(
        re.search(f"{re.escape(start)}\\s*{re.escape(end)}\\s*\\Z", seen)
        for start, end in THINKING_TAGS
    )
