"""load_pairs: clean preference pairs from any source, with the account of every row."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from smoldpo.config.load import load_yaml
from smoldpo.data.cleaning.cleaner import choose_rules
from smoldpo.data.convert import convert
from smoldpo.data.load import load_split
from smoldpo.data.schemas.fields import NUMBERS
from smoldpo.data.sources import open_source
from smoldpo.training.run_folder import IN_MEMORY_PAIRS
from smoldpo.types import NO_NUMBERS, PreferencePair
from smoldpo.utils.errors import SmoldpoError, UsageError
from smoldpo.utils.files import sha256_of, write_text


class Pairs(list[PreferencePair]):
    """Clean pairs, in their order.

    Attributes:
        account: rows read and kept, counts by rule of what was dropped, mended and warned about,
            and the rows that were touched, as in a run's data.json.
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
    names = source_names(data)
    if names is not None and len(names) != 1:
        raise UsageError(f"load_pairs takes one source, not {len(names)}")
    rules = choose_rules(tuple(rules_off))
    with tempfile.TemporaryDirectory() as folder:
        if names is None:
            path = Path(folder) / "pairs.jsonl"
            numbers = write_in_memory_pairs(cast("Iterable[Any]", data), path)
            columns = {number: number for number in numbers} | dict(columns or {})
        name = names[0] if names else str(path)
        chosen = open_source(name, subset).split(split)
        loaded = load_split(chosen, name, format=format, columns=columns, rules=rules)
    account = loaded.account.model_dump()
    if names is None:  # the file is gone, and was nobody's
        account["source"] = "pairs in memory"
        return Pairs((replace(pair, file="") for pair in loaded.pairs), account)
    return Pairs(loaded.pairs, account)


Row = Mapping[str, Any]
Source = str | Path | Iterable[str | Path] | Iterable[Row] | Iterable[PreferencePair]
"""Names of sources, or the pairs themselves: rows of any known schema, or PreferencePairs."""


def source_names(data: Source) -> list[str] | None:
    """The names of sources, or None where `data` holds the pairs themselves."""
    if isinstance(data, str | Path):
        return [str(data)]
    items = data if isinstance(data, Sequence) else None
    if items and all(isinstance(item, str | Path) for item in items):
        return [str(item) for item in items]
    return None


@contextlib.contextmanager
def in_memory_pairs(
    folder: Path, given: Mapping[str, Iterable[Any]]
) -> Iterator[dict[str, tuple[str, list[str]]]]:
    """Pairs by their setting (data, eval_data), written to a run folder: path and columns of each.

    A file is named by what it holds, so that the file of a run that is to be replaced stays until
    the new run has begun. Where the block fails before that, nothing that was written for it is
    left.
    """
    pairs_folder = folder / IN_MEMORY_PAIRS
    before = set(pairs_folder.iterdir()) if pairs_folder.is_dir() else set()
    missing = [path for path in (pairs_folder, *pairs_folder.parents) if not path.exists()]
    try:
        yield {name: _by_content(items, pairs_folder, name) for name, items in given.items()}
    except BaseException:
        known = _sources(folder / "config.yaml")
        for path in set(pairs_folder.iterdir()) - before if pairs_folder.is_dir() else ():
            if str(path) not in known:
                path.unlink(missing_ok=True)
        for path in missing:
            with contextlib.suppress(OSError):  # something lies in it
                path.rmdir()
        raise


def _by_content(items: Iterable[Any], pairs_folder: Path, setting: str) -> tuple[str, list[str]]:
    pairs_folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=pairs_folder) as staging:
        staged = Path(staging) / "pairs.jsonl"
        numbers = write_in_memory_pairs(items, staged, setting)
        word = "pairs" if setting == "data" else "eval"
        path = pairs_folder / f"{word}-{sha256_of(staged)[:8]}.jsonl"
        staged.replace(path)
    return str(path), numbers


def _sources(config: Path) -> list[str]:
    """What a run folder's configuration reads, of pairs; nothing where there is none yet."""
    try:
        settings = load_yaml(config) if config.is_file() else {}
    except SmoldpoError:
        return []
    data = settings.get("data")
    return [*(data if isinstance(data, list) else [data]), settings.get("eval_data")]


def write_in_memory_pairs(data: Iterable[Any], path: Path, setting: str = "data") -> list[str]:
    """Write rows or pairs as JSONL, and return which of weight, margin and beta its rows have.

    Raises:
        UsageError: nothing was given, things of several kinds, or a value that JSON cannot hold.
        DataError: a pair that would not be read back as it is.
    """
    items = list(data)
    if not items:
        raise UsageError(f"{setting}: the list is empty; give pairs, or the name of a source")
    path.parent.mkdir(parents=True, exist_ok=True)
    if all(isinstance(item, PreferencePair) for item in items):
        return _write_pairs(items, path)
    for number, item in enumerate(items, 1):
        if not isinstance(item, Mapping):
            raise UsageError(
                f"{setting}: item {number} is {type(item).__name__}; give a list of dictionaries, "
                "or of PreferencePairs, or of names, and of one kind alone"
            )
    write_text(path, "".join(_line(item, number, setting) for number, item in enumerate(items, 1)))
    return []


def _line(row: Row, number: int, setting: str) -> str:
    try:
        return json.dumps(dict(row), ensure_ascii=True, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise UsageError(f"{setting}: row {number} cannot be written as JSON: {error}") from None


def _write_pairs(pairs: list[PreferencePair], path: Path) -> list[str]:
    numbers = [name for name in NUMBERS if any(_own(pair, name) for pair in pairs)]
    if "beta" in numbers:
        for number, pair in enumerate(pairs, 1):
            if pair.numbers.beta is None:
                raise UsageError(
                    f"pair {number} has no beta of its own, and others have: give all one"
                )
    convert(pairs, path, numbers=numbers)
    return numbers


def _own(pair: PreferencePair, name: str) -> bool:
    return bool(getattr(pair.numbers, name) != getattr(NO_NUMBERS, name))
