"""A pair's own weight, margin and β, from columns of its row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

from smoldpo.data.formats.values import kind, number
from smoldpo.data.sources import Row
from smoldpo.errors import DataError
from smoldpo.types import PairNumbers, PreferencePair

NUMBERS = tuple(field.name for field in fields(PairNumbers))
"""Columns that are read only where they are asked for: data may have a `margin` that means another thing."""


def with_numbers(pair: PreferencePair, row: Row, names: Sequence[str]) -> PreferencePair:
    """The pair with the numbers that its row has under `names`.

    Raises:
        DataError: a row without such a number, or with one that is out of range.
    """
    if not names:
        return pair
    found = {name: _checked(name, row) for name in names}
    return replace(pair, numbers=PairNumbers(**found))


def _checked(name: str, row: Row) -> float:
    given = row.values.get(name)
    value = number(given)
    if value is None:
        raise DataError(f"{name} must be a number, and is {kind(given)}", row.file, row.row)
    if value < 0 or (name == "beta" and value == 0):
        least = "above 0" if name == "beta" else "0 or more"
        raise DataError(f"{name} must be {least}, and is {value:g}", row.file, row.row)
    return value
