"""load_pairs: clean preference pairs from any source, with the account of every row."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from smoldpo.data.cleaning import choose_rules
from smoldpo.data.load import load_split
from smoldpo.data.sources import open_source
from smoldpo.errors import UsageError
from smoldpo.library.given import Source, names_of, write_given
from smoldpo.types import PreferencePair


class Pairs(list[PreferencePair]):
    """Clean pairs, in their order.

    Attributes:
        account: rows read and kept, counts by rule of what was dropped, mended and warned about, and the rows
            that were touched, as in a run's data.json.
    """

    def __init__(self, pairs: Iterable[PreferencePair], account: dict[str, Any]):
        super().__init__(pairs)
        self.account = account


def load_pairs(
    data: Source,
    *,
    split: str | None = None,
    subset: str | None = None,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    rules_off: Iterable[str] = (),
) -> Pairs:
    """Read pairs as `smoldpo train` reads what it trains on: found schema, all cleaning rules.

    Args:
        data: builtin, a file, a folder, a hub id, or rows in memory.
        split: by default the one called train, or the only one.
        subset: of a hub dataset.
        format, columns: of the rows, where looking at them does not tell (docs/data-reading.md).
        rules_off: names of cleaning rules to leave out (docs/data.md).

    Raises:
        UsageError: no such source, split, schema or rule.
        DataError: a row that cannot be read, by file and row; or no pair is left.
    """
    names = names_of(data)
    if names is not None and len(names) != 1:
        raise UsageError(f"load_pairs takes one source, not {len(names)}")
    rules = choose_rules(tuple(rules_off))
    with tempfile.TemporaryDirectory() as folder:
        if names is None:
            path = Path(folder) / "pairs.jsonl"
            numbers = write_given(data, path)
            columns = {number: number for number in numbers} | dict(columns or {})
        name = names[0] if names else str(path)
        source = open_source(name, subset)
        chosen = source.split(split) if split else source.train
        loaded = load_split(chosen, name, format=format, columns=columns, rules=rules)
    account = loaded.account()
    if names is None:  # the file is gone, and was nobody's
        account["source"] = "pairs in memory"
        return Pairs((replace(pair, file="") for pair in loaded.pairs), account)
    return Pairs(loaded.pairs, account)
