"""The options of the chat template, the same for every verb that reads pairs or prompts."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

OPTIONS: dict[str, Any] = {
    name: Annotated[str | None, typer.Option(help=text)]
    for name, text in {
        "chat_template": "A file with a chat template in place of the model's.",
        "chat_template_kwargs": "Arguments of the chat template: enable_thinking=false.",
        "tools": "A JSON file with the tools of every prompt.",
        "documents": "A JSON file with documents that every prompt may use.",
        "template_date": "What the chat template takes for today, as YYYY-MM-DD.",
        "truncation": "Of what is too long: turns (the oldest go), tokens, or drop (the pair).",
        "score": "Of a side of several messages: all turns of the assistant, or the last.",
    }.items()
}


def takes_template_options(*left_out: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add the options to a verb, but for some; it gets those that are given as `template`."""
    options = {name: kind for name, kind in OPTIONS.items() if name not in left_out}

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        whole = inspect.signature(function, eval_str=True)

        @functools.wraps(function)
        def run(**given: Any) -> Any:
            template = {name: given.pop(name) for name in options}
            asked = {name: value for name, value in template.items() if value is not None}
            return function(**given, template=asked)

        kind = inspect.Parameter.KEYWORD_ONLY
        own = [each.replace(kind=kind) for each in whole.parameters.values()]
        parameters = [each for each in own if each.name != "template"]
        parameters += [
            inspect.Parameter(name, kind, default=None, annotation=option)
            for name, option in options.items()
        ]
        run.__signature__ = whole.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        del run.__wrapped__
        return run

    return add
