"""What a row gives to the chat template besides its messages: tools, documents, arguments."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from smoldpo.data.schemas.fields import kind, wrong
from smoldpo.data.sources import Row
from smoldpo.types import PreferencePair, TemplateArguments


def with_arguments(pair: PreferencePair, row: Row) -> PreferencePair:
    """The pair with what its row's columns give to the chat template; JSON text is read.

    Raises:
        DataError: a column that is no such thing.
    """
    kwargs = _parsed(row.values.get("chat_template_kwargs"))
    if kwargs is not None and not isinstance(kwargs, dict):
        raise wrong(row, f"'chat_template_kwargs' is {kind(kwargs)}, not an object")
    lists: dict[str, tuple[dict[str, Any], ...] | None] = {}
    for name in ("tools", "documents"):
        value = _parsed(row.values.get(name))
        value = [_parsed(item) for item in value] if isinstance(value, list) else value
        if value is not None and not (
            isinstance(value, list) and all(isinstance(item, dict) for item in value)
        ):
            raise wrong(row, f"{name!r} is {kind(value)}, not a list of objects")
        lists[name] = tuple(without_nulls(value)) if value else None
    given = without_nulls(kwargs or {})
    if not given and not any(lists.values()):
        return pair
    return replace(pair, arguments=TemplateArguments(given, **lists))


def _parsed(value: Any) -> Any:
    """JSON text as what it holds; any other value as it is, empty text as nothing."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except ValueError:
        return value


def without_nulls(value: Any) -> Any:
    """The value without the keys that columnar files fill with null."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value
