"""Rows out of Arrow tables, with the cells decoded that hold JSON as text.

`datasets` gives a column whose cells are text here and a list there the type arrow.json: text that
holds JSON. Some writers keep that type in the features alone, which stand in the schema's metadata.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import Any

Decode = Callable[[Any], Any]

JSON_TYPE = "arrow.json"
FEATURES = b"huggingface"
"""Where `datasets` keeps its features, in a schema's metadata."""


def rows_of(table: Any) -> list[dict[str, Any]]:
    """The rows of a table or a record batch as dictionaries."""
    rows: list[dict[str, Any]] = table.to_pylist()
    for name, decode in _decoders(table.schema).items():
        for row in rows:
            row[name] = decode(row[name])
    return rows


def _decoders(schema: Any) -> dict[str, Decode]:
    """What to do to the cells of those columns in which JSON lies, at any depth."""
    features = _features(schema)
    found = {
        field.name: _of_type(field.type) or _of_feature(features.get(field.name))
        for field in schema
    }
    return {name: decode for name, decode in found.items() if decode is not None}


def _features(schema: Any) -> dict[str, Any]:
    with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
        features = json.loads((schema.metadata or {})[FEATURES])["info"]["features"]
        return features if isinstance(features, dict) else {}
    return {}


def _of_type(kind: Any) -> Decode | None:
    import pyarrow.types

    if getattr(kind, "extension_name", None) == JSON_TYPE:
        return _from_json
    if pyarrow.types.is_struct(kind):
        return _struct(
            {kind.field(at).name: _of_type(kind.field(at).type) for at in range(len(kind))}
        )
    nested = getattr(pyarrow.types, "is_list_view", pyarrow.types.is_list)
    lists = (pyarrow.types.is_list, pyarrow.types.is_large_list, pyarrow.types.is_fixed_size_list)
    if any(is_list(kind) for is_list in (*lists, nested)):
        return _list(_of_type(kind.value_type))
    return None


def _of_feature(feature: Any) -> Decode | None:
    """As `_of_type`, from a feature as `datasets` writes it down."""
    if isinstance(feature, list):
        return _list(_of_feature(feature[0])) if feature else None
    if not isinstance(feature, dict):
        return None
    if feature.get("_type") == "Json":
        return _from_json
    if isinstance(feature.get("_type"), str):
        return _list(_of_feature(feature["feature"])) if "feature" in feature else None
    return _struct({name: _of_feature(inner) for name, inner in feature.items()})


def _from_json(cell: Any) -> Any:
    """What a cell holds; a number, true, false and null stay text.

    `datasets` (5.2) writes text that happens to be JSON as it is, so that 007, true and null were
    texts. A number is read from its text where one is wanted.
    """
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(cell) if isinstance(cell, str) else cell
        return found if isinstance(found, (str, list, dict)) else cell
    return cell


def _list(decode: Decode | None) -> Decode | None:
    if decode is None:
        return None
    return lambda cell: [decode(item) for item in cell] if isinstance(cell, list) else cell


def _struct(decoders: dict[str, Decode | None]) -> Decode | None:
    known = {name: decode for name, decode in decoders.items() if decode is not None}
    if not known:
        return None

    def decoded(cell: Any) -> Any:
        if not isinstance(cell, dict):
            return cell
        return {name: known[name](v) if name in known else v for name, v in cell.items()}

    return decoded
