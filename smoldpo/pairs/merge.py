"""`smoldpo pairs merge`: pairs of several origins in one file, each with its source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from smoldpo.data.cleaning.duplicates import side_hashes
from smoldpo.data.convert import convert
from smoldpo.data.schemas import SplitReader
from smoldpo.data.sources import Row, Split, open_source
from smoldpo.types import PreferencePair
from smoldpo.utils.errors import UsageError

PROVENANCE = "provenance"


@dataclass
class MergedPart:
    """One origin: how many rows were read, and how many of their pairs were written."""

    name: str
    source: str
    rows: int = 0
    pairs: int = 0
    repeated: int = 0
    """Pairs that stand in this or an earlier origin already."""
    opposite: int = 0
    """Pairs, written all the same, of which an earlier one says the opposite."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Rows that hold no pair, by rule: ties, mostly."""


@dataclass
class Merged:
    """What `merge_pairs` wrote."""

    output: Path
    pairs: int
    parts: list[MergedPart]

    def as_dict(self) -> dict[str, Any]:
        """What --json prints."""
        parts = [asdict(part) for part in self.parts]
        return {"output": str(self.output), "pairs": self.pairs, "parts": parts}


def merge_pairs(
    names: Sequence[str], output: Path, sources: Sequence[str] = (), overwrite: bool = False
) -> Merged:
    """Write the pairs of `names` one after another, once each, whole or not at all.

    A pair without a `source` of its own gets that of its file. Nothing is cleaned.

    Args:
        sources: one a name; by default the names without folder and ending.

    Raises:
        UsageError: no such file, the output is one of them or exists, or sources that cannot be
            told apart.
        DataError: a row that cannot be read, by file and row; or no pair at all.
    """
    if sources and len(sources) != len(names):
        raise UsageError(f"--source names {len(sources)} sources, and there are {len(names)} files")
    parts = [
        MergedPart(name, source)
        for name, source in zip(names, sources or map(_stem, names), strict=True)
    ]
    twice = [source for source, n in Counter(part.source for part in parts).items() if n > 1]
    if twice:
        raise UsageError(f"two files would have the source {twice[0]}; name them with --source")
    if any(Path(name).resolve() == output.resolve() for name in names):
        raise UsageError(f"--output {output}: is read as well; give another name")
    if output.exists() and not overwrite:
        raise UsageError(f"--output {output}: exists; give another name, or --overwrite")
    splits = [open_source(name).split(None) for name in names]
    known: dict[tuple[str, int], Any] = {}
    seen: set[tuple[int, int]] = set()

    def every() -> Iterator[PreferencePair]:
        for part, split in zip(parts, splits, strict=True):
            yield from _read(part, split, known, seen)

    def made_by(pair: PreferencePair) -> dict[str, Any]:
        found = known.get((pair.file, pair.row))
        return {} if found is None else {PROVENANCE: found}

    written = convert(every(), output, extra=made_by)
    return Merged(output, written.rows, parts)


def _read(
    part: MergedPart,
    split: Split,
    known: dict[tuple[str, int], Any],
    seen: set[tuple[int, int]],
) -> Iterator[PreferencePair]:
    """A part's pairs that were not seen yet, with their source."""
    reader = SplitReader(_noting(split, known))
    for pair in reader:
        ours, theirs = side_hashes(pair)
        if (ours, theirs) in seen:
            part.repeated += 1
            continue
        part.opposite += (theirs, ours) in seen
        seen.add((ours, theirs))
        part.pairs += 1
        yield pair if pair.source else replace(pair, source=part.source)
    part.rows = reader.rows_read
    part.left_out = dict(Counter(finding.rule for finding in reader.findings))


def _noting(split: Split, known: dict[tuple[str, int], Any]) -> Split:
    """The split; what its rows say of how they were made is noted as they are read."""

    def noting(rows: Callable[[], Iterator[Row]]) -> Callable[[], Iterator[Row]]:
        def read() -> Iterator[Row]:
            for row in rows():
                if row.values.get(PROVENANCE) is not None:
                    known[row.file, row.row] = row.values[PROVENANCE]
                yield row

        return read

    return replace(split, files=tuple(map(noting, split.files)))


def _stem(name: str) -> str:
    return Path(name).name.split(".")[0] or name
