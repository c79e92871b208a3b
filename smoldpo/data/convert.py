"""Preference pairs out to a file, in the schemas that other tools read.

    conversational  prompt: messages, chosen and rejected: [the answer's message]      (TRL)
    text            prompt, chosen, rejected: text                                     (TRL)
    implicit        chosen and rejected: messages that begin with the prompt's         (TRL)
    transcripts     chosen and rejected: "\\n\\nHuman: ...\\n\\nAssistant: ..."            (HH)
    conversations   conversations, chosen, rejected: from and value               (LLaMA-Factory)
    orca            system, question, chosen, rejected: text                           (Intel)

`conversational` and `implicit` hold every pair without loss; a prompt that is text rather than
messages is one user message there, and marked by `prompt_format`. Every row is read back before
it is written, and a layout that would change the pair is an error that names the row. The one
exception is counted in what `convert` returns: cells of CSV and TSV that a spreadsheet would run as
a formula get a ' before them, and keep it when they are read again.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from smoldpo.data.dialogue import sides
from smoldpo.data.schemas import PairReader, Unreadable
from smoldpo.data.schemas.cells import refuse_printed, unpack
from smoldpo.data.schemas.fields import TURN, as_messages
from smoldpo.data.schemas.paired import PROMPT_IS_TEXT
from smoldpo.data.sources import Row
from smoldpo.types import NO_ARGUMENTS, Message, PreferencePair
from smoldpo.utils.errors import DataError, UsageError, nearest

Values = dict[str, Any]
Columns = Mapping[str, str]
"""What each column holds: text, a number, messages (role, content), a turn (from, value), turns."""
FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""With one of these a spreadsheet takes a cell for a formula."""
PARQUET_ROWS = 1000
FROM = {"user": "human", "assistant": "gpt", "tool": "observation"}


@dataclass(frozen=True)
class Converted:
    """What was written: rows, and the CSV cells that got a ' before them."""

    rows: int
    escaped: int


class _NotRepresentable(Exception):
    """Why a layout cannot hold a pair."""


def convert(
    pairs: Iterable[PreferencePair],
    out_path: Path,
    to: str = "conversational",
    numbers: Sequence[str] = (),
    extra: Callable[[PreferencePair], Values] | None = None,
) -> Converted:
    """Write `pairs` to `out_path` (.jsonl, .json, .csv, .tsv or .parquet), whole or not at all.

    One pair is held at a time (.parquet: a thousand). Text goes out as it came in. `numbers` are
    those of a pair's own (weight, margin, beta) that get a column, under their own names; `extra`
    gives further columns, which JSON files alone can hold.

    Raises:
        UsageError: an unknown layout or kind of file.
        DataError: a pair that the layout or the file cannot hold, by its file and row; or there is
            no pair at all.
    """
    if to not in LAYOUTS:
        raise UsageError(f"--to {to}: unknown{nearest(to, LAYOUTS)}; known: {', '.join(LAYOUTS)}")
    write = WRITERS.get(out_path.suffix.lower())
    if write is None:
        raise UsageError(f"{out_path}: the name must end with {', '.join(WRITERS)}")
    rows = _Rows(pairs, to, numbers, extra)
    staging = out_path.with_name(f".{out_path.name}.{os.getpid()}")
    try:
        out_path.parent.mkdir(parents=True, exist_ok=True)
        try:
            escaped = write(rows, staging)
            if not rows.count:
                raise DataError("there is no pair to write", file=str(out_path))
            staging.replace(out_path)
        finally:
            staging.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"cannot be written: {error.strerror or error}", str(out_path)) from None
    return Converted(rows.count, escaped)


class _Rows:
    """Pairs, each with its row in a layout; counts them."""

    def __init__(
        self,
        pairs: Iterable[PreferencePair],
        to: str,
        numbers: Sequence[str],
        extra: Callable[[PreferencePair], Values] | None,
    ):
        self.pairs, self.to, self.numbers, self.extra = pairs, to, numbers, extra
        self.count = 0

    @property
    def columns(self) -> Columns:
        named = dict.fromkeys(("id", "source", "category"), "text")
        return {**LAYOUTS[self.to].columns, **named, **dict.fromkeys(self.numbers, "number")}

    def __iter__(self) -> Iterator[tuple[PreferencePair, Values]]:
        layout = LAYOUTS[self.to]
        for pair in self.pairs:
            try:
                refuse_printed(pair)
                values = layout.write(pair)
                _read_back(layout, values, pair)
            except Unreadable:
                problem = "holds text that would be read as messages (JSON, or as Python prints it)"
                raise _refused(pair, problem) from None
            except _NotRepresentable as reason:
                hint = "" if layout.marks_text else "; --to conversational can"
                problem = f"--to {self.to} cannot hold this pair: {reason}{hint}"
                raise _refused(pair, problem) from None
            named = {key: getattr(pair, key) for key in ("id", "source", "category")}
            values |= {key: value for key, value in named.items() if value}
            values |= self.extra(pair) if self.extra else {}
            self.count += 1
            yield pair, values | {key: getattr(pair.numbers, key) for key in self.numbers}


def _refused(pair: PreferencePair, problem: str) -> DataError:
    return DataError(problem, pair.file or None, pair.row or None)


def _read_back(layout: Layout, values: Values, pair: PreferencePair) -> None:
    """Refuse a row that would not be read as the pair that was written."""
    try:
        (again,) = PairReader(layout.format).read(Row(pair.file, pair.row, values))
    except (DataError, Unreadable) as error:
        raise _NotRepresentable(f"it would not be read again ({error})") from None
    if _content(again) != _content(pair):
        raise _NotRepresentable(
            "its text would read differently (white space at an edge, or a speaker's mark inside)"
        )
    if layout.marks_text and isinstance(again.prompt, str) != isinstance(pair.prompt, str):
        raise _NotRepresentable("a text prompt and a prompt of messages would become alike")


def _content(pair: PreferencePair) -> tuple[Any, ...]:
    sides = (pair.chosen, pair.rejected, pair.chosen_messages, pair.rejected_messages)
    return as_messages(pair.prompt), *sides, pair.arguments


def _sides(pair: PreferencePair, write: Callable[[str], Any] = str) -> Values:
    if pair.chosen_messages or pair.rejected_messages:
        raise _NotRepresentable("a side holds several messages, tool calls or thinking")
    if pair.arguments != NO_ARGUMENTS:
        raise _NotRepresentable("it has tools, documents or arguments for the chat template")
    return {"chosen": write(pair.chosen), "rejected": write(pair.rejected)}


def _side_messages(pair: PreferencePair, before: Sequence[Message] = ()) -> Values:
    """Both sides as messages, and what the row gives to the chat template."""
    ours, theirs = ([*before, *side] for side in sides(pair))
    arguments = asdict(pair.arguments)
    given = {"chat_template_kwargs": arguments.pop("kwargs"), **arguments}
    return {"chosen": ours, "rejected": theirs} | {k: v for k, v in given.items() if v}


def _text_mark(pair: PreferencePair) -> Values:
    return {"prompt_format": PROMPT_IS_TEXT} if isinstance(pair.prompt, str) else {}


def _conversational(pair: PreferencePair) -> Values:
    prompt = {"prompt": list(as_messages(pair.prompt))}
    return prompt | _side_messages(pair) | _text_mark(pair)


def _implicit(pair: PreferencePair) -> Values:
    return _side_messages(pair, as_messages(pair.prompt)) | _text_mark(pair)


def _text(pair: PreferencePair) -> Values:
    prompt = pair.prompt if isinstance(pair.prompt, str) else _question(_plain(pair))
    return {"prompt": prompt} | _sides(pair)


def _orca(pair: PreferencePair) -> Values:
    system, turns = _without_system(_plain(pair))
    return {"system": system, "question": _question(turns)} | _sides(pair)


def _transcripts(pair: PreferencePair) -> Values:
    names = {"user": "Human", "assistant": "Assistant"}
    prompt = ""
    for message in _plain(pair):
        if message["role"] not in names:
            raise _NotRepresentable(f"a transcript has no {message['role']} turn")
        if TURN.search("\n\n" + message["content"].lstrip()):
            raise _NotRepresentable("a message holds a speaker's mark")
        prompt += f"\n\n{names[message['role']]}: {message['content']}"
    return _sides(pair, lambda said: f"{prompt}\n\nAssistant: {said}")


def _conversations(pair: PreferencePair) -> Values:
    system, turns = _without_system(_plain(pair))
    for message in turns:
        if message["role"] not in FROM:
            raise _NotRepresentable(f"it has no place for a {message['role']} message there")
    values = {"conversations": [{"from": FROM[m["role"]], "value": m["content"]} for m in turns]}
    values |= _sides(pair, lambda said: {"from": "gpt", "value": said})
    return values | ({"system": system} if system else {})


def _plain(pair: PreferencePair) -> tuple[Message, ...]:
    """The prompt's messages, where they hold role and content and nothing else."""
    prompt = as_messages(pair.prompt)
    for at, message in enumerate(prompt, 1):
        extra = sorted(set(message) - {"role", "content"})
        if extra or "content" not in message:
            what = f"also holds {', '.join(extra)}" if extra else "has no content"
            raise _NotRepresentable(f"message {at} {what}")
    return prompt


def _without_system(prompt: tuple[Message, ...]) -> tuple[str, tuple[Message, ...]]:
    """A leading system message's text, and the messages after it."""
    if prompt and prompt[0]["role"] == "system":
        return prompt[0]["content"], prompt[1:]
    return "", prompt


def _question(turns: tuple[Message, ...]) -> str:
    """What the user says, where that is all there is."""
    roles = [message["role"] for message in turns]
    if roles != ["user"]:
        given = ", ".join(roles) or "nothing"
        raise _NotRepresentable(f"it has room for one question, and the prompt is: {given}")
    return turns[0]["content"]


@dataclass(frozen=True)
class Layout:
    """How a pair is written, and the schema by which it is read again.

    `marks_text`: whether text prompts are told from messages, so that every pair comes back whole.
    """

    format: str
    write: Callable[[PreferencePair], Values]
    columns: Columns
    marks_text: bool = False


_TEXTS = {"chosen": "text", "rejected": "text"}
_MESSAGES = {"chosen": "messages", "rejected": "messages", "prompt_format": "text"}
_TURNS = {"conversations": "turns", "chosen": "turn", "rejected": "turn", "system": "text"}
LAYOUTS: dict[str, Layout] = {
    "conversational": Layout(
        "explicit", _conversational, {"prompt": "messages", **_MESSAGES}, marks_text=True
    ),
    "text": Layout("explicit", _text, {"prompt": "text", **_TEXTS}),
    "implicit": Layout("implicit", _implicit, _MESSAGES, marks_text=True),
    "transcripts": Layout("transcripts", _transcripts, _TEXTS),
    "conversations": Layout("conversations", _conversations, _TURNS),
    "orca": Layout("orca", _orca, {"system": "text", "question": "text", **_TEXTS}),
}


def _write_json(rows: _Rows, path: Path, opening: bytes, between: bytes, end: bytes) -> int:
    with path.open("wb") as file:
        for _, values in rows:
            file.write((between if rows.count > 1 else opening) + _json_line(values))
        file.write(end)
    return 0


def _json_line(values: Values) -> bytes:
    """Readable UTF-8; half a surrogate pair, which UTF-8 cannot hold, as an escape."""
    try:
        return json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return json.dumps(values, ensure_ascii=True).encode()


def _write_csv(rows: _Rows, path: Path, delimiter: str = ",") -> int:
    """Returns the number of cells that got a ' before them."""
    escaped = 0
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter, lineterminator="\n", quoting=csv.QUOTE_ALL)
        writer.writerow(rows.columns)
        for pair, values in rows:
            cells = [_csv_cell(pair, values.get(column, "")) for column in rows.columns]
            safe = [f"'{cell}" if cell.startswith(FORMULA) else cell for cell in cells]
            escaped += sum(before != after for before, after in zip(cells, safe, strict=True))
            with _encodable(pair, "CSV"):
                writer.writerow(safe)
    return escaped


def _csv_cell(pair: PreferencePair, value: Any) -> str:
    """A cell's text: messages as JSON. What would not be read again as it is is refused."""
    if isinstance(value, float):
        return repr(value)
    cell = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if unpack(cell) != value:
        raise _refused(pair, "holds what a cell of CSV cannot (an empty list); write .jsonl")
    return cell


@contextmanager
def _encodable(pair: PreferencePair, kind: str) -> Iterator[None]:
    try:
        yield
    except UnicodeEncodeError:
        problem = f"holds half a surrogate pair, which {kind} cannot; mend it, or write .jsonl"
        raise _refused(pair, problem) from None


def _write_parquet(rows: _Rows, path: Path) -> int:
    import pyarrow
    import pyarrow.parquet

    text = pyarrow.string()
    turn = pyarrow.struct([("from", text), ("value", text)])
    message = pyarrow.struct([("role", text), ("content", text)])
    kinds = {
        "text": text,
        "number": pyarrow.float64(),
        "messages": pyarrow.list_(message),
        "turn": turn,
        "turns": pyarrow.list_(turn),
    }
    schema = pyarrow.schema([(name, kinds[kind]) for name, kind in rows.columns.items()])
    with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        values = map(_parquet_row, rows)
        while batch := list(islice(values, PARQUET_ROWS)):
            writer.write_table(pyarrow.Table.from_pylist(batch, schema))
    return 0


def _parquet_row(row: tuple[PreferencePair, Values]) -> Values:
    """A row that Parquet can hold: each column has one type there, messages role and content."""
    pair, values = row
    with _encodable(pair, "Parquet"):
        json.dumps(values, ensure_ascii=False).encode()
    for column in ("prompt", "chosen"):
        cell = values.get(column)
        for message in cell if isinstance(cell, list) else []:
            extra = sorted(set(message) - {"role", "content"})
            if extra:
                problem = f"a message also holds {', '.join(extra)}; write .jsonl, which keeps it"
                raise _refused(pair, f"Parquet columns have one type, and {problem}")
    return values


WRITERS: dict[str, Callable[[_Rows, Path], int]] = {
    ".jsonl": partial(_write_json, opening=b"", between=b"\n", end=b"\n"),
    ".json": partial(_write_json, opening=b"[\n", between=b",\n", end=b"\n]\n"),
    ".csv": _write_csv,
    ".tsv": partial(_write_csv, delimiter="\t"),
    ".parquet": _write_parquet,
}
"""By suffix; each returns the number of cells that it escaped."""
