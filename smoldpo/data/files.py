"""The rows of one file, one by one. Nothing but `.json` is ever held whole.

    .jsonl .ndjson .json .csv .tsv    text in UTF-8, each also as .gz
    .parquet .arrow                   columns; .arrow in the stream or the file form

A file or row that cannot be read raises DataError with the file and the row. A line longer than
MAX_LINE is refused after that many bytes, so neither a file without line ends nor a gzip bomb fills
the memory.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any

from smoldpo.data.arrow_rows import rows_of
from smoldpo.utils.errors import DataError, whole_reason

Numbered = Iterator[tuple[int, Any]]
"""(row number from 1, values) of every row."""
Reader = Callable[[Path], Numbered]

MAX_LINE = 64 * 2**20
"""Bytes of one line, which is one row of JSONL."""
MAX_JSON = 512 * 2**20
"""Bytes of a .json file, which is held in memory whole."""
MAX_DEPTH = 100
"""Lists and objects in each other; deeper ones would break whatever walks over a row later."""
BATCH = 64
"""Rows of a column file that are held as Python objects at a time."""
BOMB_SIZE, BOMB_RATIO = 256 * 2**20, 100
"""A Parquet column chunk that unpacks to more than this, and this many times over, is a bomb."""


def kind_of(path: Path) -> str:
    """The suffix that says how a file is read: ".jsonl", ".csv.gz", ...; "" where none does."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        inner = Path(path.stem).suffix.lower()
        return inner + suffix if inner in TEXT_KINDS else ""
    return suffix if suffix in KINDS else ""


def read_file(path: Path) -> Numbered:
    """(row number from 1, values) of every row of a file; each row is a dictionary.

    Raises:
        DataError: the file or a row in it cannot be read.
    """
    reader = KINDS.get(kind_of(path).removesuffix(".gz"))
    if reader is None:
        raise DataError(f"files of this kind cannot be read; give {kinds()}", file=str(path))
    number = 0
    try:
        for number, values in reader(path):
            if not isinstance(values, dict):
                kind = type(values).__name__
                hint = "; a JSON list belongs into a .json file" if kind == "list" else ""
                raise DataError(f"holds a {kind}, not an object with keys{hint}", str(path), number)
            yield number, values
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        problem = f"is a damaged or cut-off gzip file ({error}) after row {number}"
        raise DataError(problem, file=str(path)) from None
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", file=str(path)) from None


def kinds() -> str:
    """The kinds of file there are, for messages."""
    return f"{', '.join(KINDS)} (text also as .gz)"


def _open(path: Path) -> IO[bytes] | gzip.GzipFile:
    """A file's bytes, unpacked from .gz."""
    return gzip.GzipFile(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def _lines(
    stream: IO[bytes] | gzip.GzipFile, path: Path, first: int = 1, are_rows: bool = True
) -> Iterator[tuple[int, str]]:
    """(line number, text) of a stream's lines, each of at most MAX_LINE bytes."""
    number = first - 1
    while line := stream.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            problem = f"line {number} is longer than {MAX_LINE >> 20} MiB; split or remove it"
            raise DataError(problem, str(path), number if are_rows else None)
        yield number, _decode(line, path, number, are_rows)


def _decode(data: bytes, path: Path, line: int | None, is_row: bool = True) -> str:
    """The text of a file (`line` is None) or of one of its lines; without the mark at its start."""
    try:
        return data.decode("utf-8-sig" if line in (None, 1) else "utf-8")
    except UnicodeDecodeError as error:
        at = f"at byte {error.start}" + (f" of line {line}" if line else "")
        problem = f"is not UTF-8 text ({error.reason} {at}); save it as UTF-8"
        raise DataError(problem, str(path), line if is_row else None) from None


def _read_jsonl(path: Path) -> Numbered:
    with _open(path) as stream:
        yield from _json_lines(_lines(stream, path), path)


def _json_lines(lines: Iterable[tuple[int, str]], path: Path) -> Numbered:
    for number, line in lines:
        if not line.isspace():
            yield number, _parse_json(line, path, number)


def _parse_json(text: str, path: Path, row: int | None) -> Any:
    try:
        value = json.loads(text)
        if text.count("[") + text.count("{") > MAX_DEPTH and _is_deep(value):
            raise RecursionError
        return value
    except (ValueError, RecursionError) as error:
        at = str(error)
        if isinstance(error, json.JSONDecodeError):
            line = "" if row else f"line {error.lineno}, "
            at = f"{error.msg} at {line}column {error.colno}"
        elif isinstance(error, RecursionError):
            at = f"nested more than {MAX_DEPTH} deep"
        hint = "mend or remove this row" if row else "mend it, or give JSONL (one object a line)"
        raise DataError(f"broken JSON: {at}; {hint}", str(path), row) from None


def _is_deep(value: Any) -> bool:
    """Whether lists and objects stand in each other more than MAX_DEPTH deep."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        inner = [each.values() if isinstance(each, dict) else each for each in level]
        level = [item for items in inner for item in items if isinstance(item, dict | list)]
        if not level:
            return False
    return True


def _read_json(path: Path) -> Numbered:
    """A list of rows, an object that holds one list of rows, or (as hubs have it) JSONL."""
    with _open(path) as stream:
        opening = stream.readline(MAX_LINE + 1)
        following = stream.readline(MAX_LINE + 1)
        if following.strip() and _is_object(opening):
            lines = [(1, _decode(opening, path, 1)), (2, _decode(following, path, 2))]
            yield from _json_lines(chain(lines, _lines(stream, path, first=3)), path)
            return
        data = opening + following
        data += stream.read(max(0, MAX_JSON + 1 - len(data)))
    if len(data) > MAX_JSON:
        problem = f"is larger than {MAX_JSON >> 20} MiB and would be held whole"
        raise DataError(f"{problem}; convert it to JSONL", file=str(path))
    text = _decode(data, path, None)
    if not text.strip():
        return
    rows = _parse_json(text, path, None)
    if isinstance(rows, dict):
        lists = [value for value in rows.values() if isinstance(value, list)]
        rows = lists[0] if len(lists) == 1 and len(rows) == 1 else [rows]
    if not isinstance(rows, list):
        raise DataError("the top of the file must be a list of rows", file=str(path))
    yield from enumerate(rows, 1)


def _is_object(line: bytes) -> bool:
    """Whether a line is a whole JSON object by itself."""
    with contextlib.suppress(ValueError, RecursionError):
        return isinstance(json.loads(line.decode("utf-8-sig")), dict)
    return False


def _read_csv(path: Path) -> Numbered:
    csv.field_size_limit(MAX_LINE)
    tabs = kind_of(path).startswith(".tsv")
    with _open(path) as stream:
        lines = (line for _, line in _lines(stream, path, are_rows=False))
        opening = next(lines, "")
        spaced = not tabs and any(name.startswith(" ") for name in opening.split(",")[1:])
        reader = csv.reader(
            chain([opening] if opening else [], lines),
            delimiter="\t" if tabs else ",",
            strict=True,
            skipinitialspace=spaced,
        )
        try:
            header = next(reader, [])
            header = [name.strip() for name in header] if spaced else header
            twice = next((name for name in header if header.count(name) > 1), None)
            if twice is not None:
                raise DataError(f"the header has the column {twice!r} twice", file=str(path))
            for number, cells in enumerate(filter(None, reader), 1):
                if len(cells) != len(header):
                    problem = (
                        f"has {len(cells)} cells, the header {len(header)}; "
                        "quote cells that contain the delimiter"
                    )
                    raise DataError(problem, str(path), number)
                yield number, dict(zip(header, map(csv_cell, cells), strict=True))
        except csv.Error as error:
            raise DataError(f"broken CSV near line {reader.line_num}: {error}", str(path)) from None


def csv_cell(cell: str) -> Any:
    """A cell is text; JSON messages in it ([{"role": ...}]) are read, as CSV has no lists."""
    if cell.startswith(("[{", "{")) and cell.rstrip().endswith(("}]", "}")):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(cell)
            items = value if isinstance(value, list) else [value]
            if all(isinstance(item, dict) and ("role" in item or "from" in item) for item in items):
                return value
    return cell


COLUMN_ERRORS = (ValueError, TypeError, KeyError, OverflowError, MemoryError, OSError)
"""What pyarrow raises for damaged files: its own errors derive from these."""


def _columns_reader(kind: str, batches: Callable[[Path], Iterator[Any]]) -> Reader:
    """A reader of rows, given one of Arrow record batches."""

    def read(path: Path) -> Numbered:
        number = 0
        try:
            for batch in batches(path):
                batch.validate(full=True)  # damaged offsets would crash the process further on
                for start in range(0, batch.num_rows, BATCH):
                    for values in rows_of(batch.slice(start, BATCH)):
                        number += 1
                        yield number, values
        except COLUMN_ERRORS as error:
            after = f" after row {number}" if number else ""
            problem = f"is not a readable {kind} file{after}: {whole_reason(error)}"
            raise DataError(problem, file=str(path)) from None

    return read


def _parquet_batches(path: Path) -> Iterator[Any]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        metadata = file.metadata
        for group in range(metadata.num_row_groups):
            for column in range(metadata.num_columns):
                chunk = metadata.row_group(group).column(column)
                size, packed = chunk.total_uncompressed_size, max(1, chunk.total_compressed_size)
                if size > BOMB_SIZE and size > BOMB_RATIO * packed:
                    raise DataError(
                        f"the column {chunk.path_in_schema!r} unpacks from {packed:,} to {size:,} "
                        "bytes; files that grow so much are not read",
                        file=str(path),
                    )
        yield from file.iter_batches(batch_size=BATCH)


def _arrow_batches(path: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.ipc

    with pyarrow.memory_map(str(path)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        if is_file:
            file = pyarrow.ipc.open_file(source)
            yield from map(file.get_batch, range(file.num_record_batches))
        else:
            yield from pyarrow.ipc.open_stream(source)


TEXT_KINDS: dict[str, Reader] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
}
KINDS = TEXT_KINDS | {
    ".parquet": _columns_reader("Parquet", _parquet_batches),
    ".arrow": _columns_reader("Arrow", _arrow_batches),
}
