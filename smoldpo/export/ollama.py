"""A folder for Ollama: a Modelfile whose template is derived from the chat template, and checked.

Ollama renders dialogues by a template in Go's language. What stands around messages is taken from
the chat template's own rendering of small dialogues, put together, and held against the chat
template on dialogues of many shapes. A chat template that does more than put text around messages
(one that thinks, calls tools or writes the day) is not said in this way, and is refused.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smoldpo.data.chat_template import TEMPLATE_ERRORS, ChatTemplate, TemplateSettings
from smoldpo.export.go_template import literal, render
from smoldpo.models.generate import end_ids
from smoldpo.types import Message
from smoldpo.utils.errors import ModelError, SmoldpoError

PROGRAM = "ollama"
SYSTEM, USER, ASSISTANT = "smoldpo-system", "smoldpo-user", "smoldpo-assistant"
TEXTS = (
    "Hello!",
    "Why is the sky blue?\nPlease explain.",
    "def f(x):\n\treturn {{ x }} or {% x %} # }}",
    "naïve 你好 русский עברית 👩‍👩‍👧",
    '"""quoted""" and \\n, 1,000.5',
    "<|im_end|>\n<|im_start|>user",
    "",
    " white space around it \n",
)
"""Messages of which the dialogues that check a template are made."""
SYSTEMS = (None, "Be brief.", "You are {{ .Name }}.\n\nNever lie.", "")
SAMPLED = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
"""What transformers takes where generation_config says that it samples, and no more."""
AS_IT_IS = ("min_p", "top_k", "top_p", "temperature")


@dataclass(frozen=True)
class OllamaTemplate:
    """A template in Ollama's language, and on how many dialogues it is the chat template."""

    text: str
    dialogues: int
    trims: bool
    """Whether the chat template takes white space from around messages, which Ollama's cannot."""

    def __str__(self) -> str:
        said = f"Ollama's template renders {self.dialogues} dialogues as the chat template does"
        if self.trims:
            said += ", but that one trims messages, and Ollama's cannot: send them trimmed"
        return said


def dialogues() -> Iterator[list[Message]]:
    """Dialogues of many shapes that end with the user's turn: 64."""
    for system, turns, start in itertools.product(SYSTEMS, (1, 2, 3, 5), range(0, 8, 2)):
        texts = itertools.islice(itertools.cycle(TEXTS), start, start + 2 * turns - 1)
        messages: list[Message] = [
            {"role": ("user", "assistant")[place % 2], "content": text}
            for place, text in enumerate(texts)
        ]
        yield messages if system is None else [{"role": "system", "content": system}, *messages]


def ollama_template(
    tokenizer: PreTrainedTokenizerBase, settings: TemplateSettings
) -> OllamaTemplate:
    """The chat template in Ollama's language.

    Raises:
        ModelError: there is none, or it cannot be said so, with the first difference.
    """
    if not tokenizer.chat_template:
        raise ModelError("it has no chat template, without which Ollama cannot talk to it")
    chat = ChatTemplate(tokenizer, settings)
    if chat.is_dated:
        raise ModelError("its chat template writes the day, which Ollama's language cannot")
    begin = _begin(tokenizer)
    try:
        text = _derived(chat, begin)
    except (*TEMPLATE_ERRORS, _OtherShapeError) as error:
        raise ModelError(
            f"its chat template cannot be said in Ollama's language: {error}"
        ) from None
    count, trims = 0, False
    for messages in dialogues():
        try:
            wanted = chat.render(messages, True).removeprefix(begin)
        except TEMPLATE_ERRORS:  # such as of a template that has no system messages
            continue
        if (found := render(text, messages)) != wanted:
            trims = True
            stripped = [{**m, "content": str(m["content"]).strip()} for m in messages]
            if (found := render(text, stripped)) != wanted:
                raise ModelError(_difference(messages, wanted, found))
        count += 1
    return OllamaTemplate(text, count, trims)


class _OtherShapeError(Exception):
    """A chat template that does more than put text around messages."""


def _begin(tokenizer: Any) -> str:
    """The BOS token that Ollama puts before every text by itself, else nothing."""
    bare, whole = (tokenizer.encode("a", add_special_tokens=special) for special in (False, True))
    return str(tokenizer.bos_token) if whole[:1] == [tokenizer.bos_token_id] != bare[:1] else ""


def _derived(chat: ChatTemplate, begin: str) -> str:
    """The template, from what stands around the messages of small dialogues."""
    user: Message = {"role": "user", "content": USER}
    assistant: Message = {"role": "assistant", "content": ASSISTANT}
    bare = chat.render([user], True)
    if not bare.startswith(begin):
        raise _OtherShapeError(f"it does not begin with {begin}, which Ollama puts before it")
    first, asked = _around(bare, USER)
    _, user_end = _around(chat.render([user], False), USER)
    *_, assistant_end = _around(chat.render([user, assistant], False), USER, ASSISTANT)
    _, turn, between, _ = _around(chat.render([user, assistant, user], True), USER, ASSISTANT, USER)
    assistant_start, prompt = _without(turn, user_end, 0), _without(asked, user_end, 0)
    user_start = _without(between, assistant_end, 0)
    default = _without(first, user_start, 1).removeprefix(begin)
    system = _system(chat, begin, user_start)
    turns = {"user": (user_start, user_end), "assistant": (assistant_start, assistant_end)}
    turns = {"system": system} | turns if system else turns
    parts = ["{{ range $i, $m := .Messages }}"]
    if default:
        condition = 'and (eq $i 0) (ne $m.Role "system")'
        parts += [f"{{{{ if {condition} }}}}{literal(default)}{{{{ end }}}}"]
    for number, (role, (start, end)) in enumerate(turns.items()):
        word = "else if" if number else "if"
        parts += [f'{{{{ {word} eq $m.Role "{role}" }}}}{literal(start)}']
        parts += ["{{ $m.Content }}", literal(end)]
    parts += ["{{ end }}{{ end }}", literal(prompt)]
    return "".join(parts)


def _system(chat: ChatTemplate, begin: str, user_start: str) -> tuple[str, str] | None:
    """What stands around a system message at the beginning; None where there is none."""
    messages: list[Message] = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": USER},
    ]
    try:
        start, end, _ = _around(chat.render(messages, True), SYSTEM, USER)
    except TEMPLATE_ERRORS:
        return None
    return start.removeprefix(begin), _without(end, user_start, 1)


def _around(text: str, *messages: str) -> list[str]:
    """What stands before, between and behind messages."""
    parts = re.split("|".join(map(re.escape, dict.fromkeys(messages))), text)
    if len(parts) != len(messages) + 1:
        raise _OtherShapeError("it does not write each message once, in turn")
    return parts


def _without(text: str, part: str, end: int) -> str:
    """The text without what it begins with (end 0), or ends with (1)."""
    if end and text.endswith(part):
        return text[: len(text) - len(part)]
    if not end and text.startswith(part):
        return text[len(part) :]
    raise _OtherShapeError("what it writes around a message depends on the others")


def _difference(messages: Sequence[Message], wanted: str, found: str) -> str:
    place = next(
        (n for n, (a, b) in enumerate(zip(wanted, found, strict=False)) if a != b),
        min(len(wanted), len(found)),
    )
    cut = slice(max(0, place - 20), place + 30)
    roles = ", ".join(str(message["role"]) for message in messages)
    return (
        f"its chat template cannot be said in Ollama's language: of a dialogue of {roles} it "
        f"writes {wanted[cut]!r} where Ollama's would write {found[cut]!r}; export --to gguf, and "
        "write the Modelfile yourself"
    )


def modelfile(
    file: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    licence: str | None,
) -> str:
    """The Modelfile's text; `file` is the GGUF file beside it.

    Ollama has settings of its own where a Modelfile says nothing (temperature 0.8, a penalty for
    repetition), so what transformers would do is said: greedy unless generation_config samples.
    """
    lines = [f"FROM ./{file}", f"TEMPLATE {_quoted(template)}"]
    stops = [str(tokenizer.convert_ids_to_tokens(index)) for index in end_ids(model, tokenizer)]
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    lines += [f"PARAMETER {key} {value:g}" for key, value in parameters(model).items()]
    lines += [f"LICENSE {_quoted(licence)}"] if licence else []
    return "\n".join(lines) + "\n"


def parameters(model: PreTrainedModel) -> dict[str, float]:
    """generation_config in Ollama's names."""
    said: Any = model.generation_config
    found: dict[str, float] = {"temperature": 0.0}
    if getattr(said, "do_sample", False):
        given = {name: getattr(said, name, None) for name in AS_IT_IS}
        found = SAMPLED | {name: value for name, value in given.items() if value is not None}
    found["repeat_penalty"] = getattr(said, "repetition_penalty", None) or 1.0
    if most := getattr(said, "max_new_tokens", None):
        found["num_predict"] = most
    return found


def _quoted(text: str) -> str:
    """As a Modelfile holds a text of several lines.

    Raises:
        ModelError: it holds three quotes itself.
    """
    if '"""' in text:
        raise ModelError("its chat template or licence holds three quotes, which end a Modelfile's")
    return f'"""{text}"""'


def create(folder: Path, name: str) -> str | None:
    """Let Ollama take the folder, where it is installed: the name that it has there, else None.

    Raises:
        SmoldpoError: it refuses; the folder stays.
    """
    if shutil.which(PROGRAM) is None:
        return None
    called = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-.") or "model"
    words = [PROGRAM, "create", called, "-f", str(folder / "Modelfile")]
    done = subprocess.run(words, capture_output=True, text=True, errors="replace")
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split()[-40:])
        raise SmoldpoError(
            f"{folder}: is whole and proven, but `{' '.join(words)}` failed: {said}; is Ollama "
            "running? call it again once it is"
        )
    return called
