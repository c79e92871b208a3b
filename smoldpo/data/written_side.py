"""A side of a pair as the chat template writes it: what is scored, and what is only read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from smoldpo.config.field_types import Score
from smoldpo.data.chat_template import (
    REWRITES,
    SWITCHES,
    TEMPLATE_ERRORS,
    ChatTemplate,
    Mismatch,
    reasoning_of,
)
from smoldpo.types import Message, TemplateArguments
from smoldpo.utils.errors import ModelError
from smoldpo.utils.text import common_length

Part = tuple[str, bool]
"""A piece of a rendered side, and whether it is scored."""
LAST = "--score last"
SHOWN = 60
"""Characters of a text that a mismatch shows."""
OPEN_MARK = re.compile(r"<[^<>\s]*\Z")
"""The beginning of a mark at the end of a text."""
ANOTHER = {
    "id": "smoldpo01",
    "type": "function",
    "function": {"name": "smoldpo_probe", "arguments": {"probe": "smoldpo"}},
}
"""A call that no dialogue has."""


@dataclass
class WrittenSide:
    """A side up to its last end of turn.

    Attributes:
        before: the dialogue before the first part. It is the prompt that a model in use is given,
            unless the template writes that otherwise once the dialogue goes on.
        parts: what follows, piece by piece.
        mismatches: ways in which what is scored is not what a model in use would write.
        notes: what the template leaves out.
    """

    before: str
    parts: list[Part] = field(default_factory=list)
    mismatches: list[Mismatch] = field(default_factory=list)
    notes: set[str] = field(default_factory=set)


def write_side(
    template: ChatTemplate,
    prompt: Sequence[Message],
    side: Sequence[Message],
    arguments: TemplateArguments,
    score: Score = "assistant",
    asked: str | None = None,
) -> WrittenSide:
    """Render a side turn by turn behind its prompt. Raises one of TEMPLATE_ERRORS.

    Where the template writes earlier turns otherwise once the dialogue goes on, the last turn alone
    is scored, behind the dialogue as a model in use is given it then. `asked`: the prompt as it is
    rendered, where that is known.
    """
    asked = template.render(prompt, True, arguments) if asked is None else asked
    made = WrittenSide(asked)
    at = asked
    for index, message in enumerate(side):
        if message["role"] != "assistant":
            continue
        so_far = [*prompt, *side[:index]]
        seen = template.render(so_far, True, arguments) if index else asked
        written = template.render([*so_far, message], False, arguments)
        if not seen.startswith(at):
            if score != "last":
                made.mismatches.append(_rewritten(at, seen))
            made.before = at = asked if seen.startswith(asked) else seen
            made.parts.clear()
        answer = template.answer(seen, written, message)
        if answer.mismatch:
            made.mismatches.append(answer.mismatch)
        if answer.prompt_differs:
            made.notes.add("template_rewrites_prompt")
        if (thought := reasoning_of(message)) and thought.strip() not in answer.text:
            made.notes.add("reasoning_not_written")
        content = str(message.get("content") or "")
        if content != content.strip() and content not in answer.text:
            made.notes.add("template_trims_answer")
        made.parts += [(seen[len(at) :], False), (answer.text, True)]
        at = seen + answer.text
    if score == "last":
        made.parts = [(text, False) for text, _ in made.parts[:-1]] + made.parts[-1:]
    if _leaves_tools_out(template, [*prompt, *side[:-1]], arguments):
        made.notes.add("tool_turns_not_written")
    return made


def setting_that_helps(
    template: ChatTemplate,
    prompt: Sequence[Message],
    side: Sequence[Message],
    arguments: TemplateArguments,
    mismatch: Mismatch,
) -> str | None:
    """The first argument of the template under which a side has no mismatch.

    For want of one, an argument under which it has that of rewritten turns alone: its last answer
    is what a model in use would write. `--score last` asks for no more than that.
    """
    fallback = LAST if mismatch.note == REWRITES else None
    for name in SWITCHES:
        if name not in template.variables or name in arguments.kwargs:
            continue
        for value in (False, True):
            try:
                changed = template.with_argument(name, value)
                found = write_side(changed, prompt, side, arguments).mismatches
            except (*TEMPLATE_ERRORS, ModelError):
                continue
            setting = f"{name}={str(value).lower()}"
            if not found:
                return setting
            if {each.note for each in found} == {REWRITES}:
                fallback = fallback or setting
    return fallback


def _rewritten(at: str, seen: str) -> Mismatch:
    """What the template writes otherwise once the dialogue goes on."""
    start = common_length(at, seen)
    if mark := OPEN_MARK.search(at[:start]):
        start = mark.start()
    return Mismatch(REWRITES, at[start : start + SHOWN], becomes=seen[start : start + SHOWN])


def _leaves_tools_out(
    template: ChatTemplate, messages: Sequence[Message], arguments: TemplateArguments
) -> bool:
    """Whether a template writes the same dialogue for other calls, or other results of tools."""
    for change in (_with_another_call, _with_another_result):
        changed = [change(message) for message in messages]
        if changed == list(messages):
            continue
        try:
            text = template.render(messages, True, arguments)
            if template.render(changed, True, arguments) == text:
                return True
        except TEMPLATE_ERRORS:  # it looks at them
            continue
    return False


def _with_another_call(message: Message) -> Message:
    made = message.get("tool_calls")
    return message | {"tool_calls": [ANOTHER]} if made else message


def _with_another_result(message: Message) -> Message:
    return message | {"content": ANOTHER["id"]} if message["role"] == "tool" else message
