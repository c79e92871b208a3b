"""The part of Go's template language that our Modelfiles are written in, rendered as Ollama does.

Text stands for itself. Between double braces stand `range $i, $m := .Messages`, `if`, `else if`,
`else`, `end`, a string or `$m.Content`; conditions are `eq`, `ne` and `and`, with parentheses. The
meaning is that of Go's text/template. Jinja renders it, once the words are put into its order.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from smoldpo.types import Message

ACTION = re.compile(r"\{\{ (.*?) \}\}", re.DOTALL)
RANGE = re.compile(r"range \$(\w+), \$(\w+) := \.(\w+)")
WORD = re.compile(r'"(?:[^"\\]|\\.)*"|[()]|[$\w.]+')
FUNCTIONS = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "and": lambda *given: all(given),
}


def literal(text: str) -> str:
    """Text in a template; double braces in it stand for themselves."""
    return text.replace("{{", '{{ "{{" }}')


def render(template: str, messages: Sequence[Message]) -> str:
    """What Ollama makes of the template.

    Neighbouring messages of one role are one to it, their texts joined by an empty line.

    Raises:
        ValueError, jinja2.TemplateError: what this part of the language does not have.
    """
    merged: list[dict[str, str]] = []
    for message in messages:
        role, content = str(message["role"]), str(message["content"])
        if merged and merged[-1]["Role"] == role:
            merged[-1]["Content"] += "\n\n" + content
        else:
            merged.append({"Role": role, "Content": content})
    return _compiled(template).render(Messages=merged)


@lru_cache(maxsize=4)
def _compiled(template: str) -> jinja2.Template:
    texts: list[str] = []
    functions = {f"go_{name}": function for name, function in FUNCTIONS.items()}
    environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)
    text = "".join(_as_jinja(template, texts))
    return environment.from_string(text, {"texts": texts, **functions})


def _as_jinja(template: str, texts: list[str]) -> Iterator[str]:
    """The template in Jinja's words; what stands for itself goes to `texts`."""
    ends: list[str] = []
    for number, part in enumerate(ACTION.split(template)):
        if number % 2 == 0:
            yield f"{{{{ {_kept(part, texts)} }}}}"
        elif found := RANGE.fullmatch(part):
            index, item, many = found.groups()
            ends.append("{% endfor %}")
            yield f"{{% for {item} in {many} %}}{{% set {index} = loop.index0 %}}"
        elif part.startswith("if "):
            ends.append("{% endif %}")
            yield f"{{% if {_expression(part[3:], texts)} %}}"
        elif part.startswith("else if "):
            yield f"{{% elif {_expression(part[8:], texts)} %}}"
        elif part == "else":
            yield "{% else %}"
        elif part == "end":
            yield ends.pop()
        else:
            yield f"{{{{ {_expression(part, texts)} }}}}"


def _kept(text: str, texts: list[str]) -> str:
    texts.append(text)
    return f"texts[{len(texts) - 1}]"


def _expression(text: str, texts: list[str]) -> str:
    words = WORD.findall(text)
    found = _call(words, texts)
    if words:
        raise ValueError(f"{text!r}: {words[0]!r} is too much")
    return found


def _call(words: list[str], texts: list[str]) -> str:
    """A value; or a function and what it is given, up to the end or a closing parenthesis."""
    if words[0] not in FUNCTIONS:
        return _value(words, texts)
    name, given = words.pop(0), []
    while words and words[0] != ")":
        given.append(_value(words, texts))
    return f"go_{name}({', '.join(given)})"


def _value(words: list[str], texts: list[str]) -> str:
    word = words.pop(0)
    if word == "(":
        found = _call(words, texts)
        words.pop(0)
        return found
    if word.startswith('"'):
        return _kept(json.loads(word), texts)
    if word.startswith("$") or word.isdecimal():
        return word.removeprefix("$")
    raise ValueError(f"{word!r} is not read")
