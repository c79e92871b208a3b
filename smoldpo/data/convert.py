"""Preference pairs out to a file, in the schemas that other tools read.

    conversational  prompt: messages, chosen and rejected: [the answer's message]      (TRL)
    text            prompt, chosen, rejected: text                                     (TRL)
    implicit        chosen and rejected: messages that begin with the prompt's         (TRL)
    transcripts     chosen and rejected: "\\n\\nHuman: ...\\n\\nAssistant: ..."            (HH)
    conversations   conversations, chosen, rejected: from and value               (LLaMA-Factory)
    orca            system, question, chosen, rejected: text                           (Intel)

`conversational` and `implicit` hold every pair without loss; a prompt that is text rather than
messages is one user message there, and marked by `prompt_format`. Every row is read back before
it is written, and a form that would change the pair is an error that names the row: nothing is lost
in silence. The one exception is counted in what `convert` returns: cells of CSV and TSV that a
spreadsheet would run as a formula get a ' before them, and keep it when they are read again.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from smoldpo.data.files import csv_cell
from smoldpo.data.rows import Row
from smoldpo.data.schemas import PairReader, Unreadable
from smoldpo.data.schemas.fields import NUMBERS, TURN, as_messages
from smoldpo.data.schemas.paired import PROMPT_IS_TEXT
from smoldpo.types import Message, PreferencePair
from smoldpo.utils.errors import DataError, UsageError, nearest

Values = dict[str, Any]
FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""With one of these a spreadsheet takes a cell for a formula."""
PARQUET_ROWS = 1000
FROM = {"user": "human", "assistant": "gpt", "tool": "observation"}


@dataclass(frozen=True)
class Converted:
    """What was written: rows, and the CSV cells that got a ' before them."""

    rows: int
    neutralised: int


class _CannotHold(Exception):
    """Why a form cannot hold a pair."""


def convert(
    pairs: Iterable[PreferencePair],
    out_path: Path,
    to: str = "conversational",
    numbers: Sequence[str] = (),
) -> Converted:
    """Write `pairs` to `out_path` (.jsonl, .json, .csv, .tsv or .parquet), whole or not at all.

    One pair is held at a time (.parquet: a thousand). Text goes out as it came in. `numbers` are those of a
    pair's own (weight, margin, beta) that get a column, under their own names.

    Raises:
        UsageError: an unknown form or kind of file.
        DataError: a pair that the form or the file cannot hold, by its file and row; or there is
            no pair at all.
    """
    if to not in FORMS:
        raise UsageError(f"--to {to}: unknown{nearest(to, FORMS)}; known: {', '.join(FORMS)}")
    writer = WRITERS.get(out_path.suffix.lower())
    if writer is None:
        raise UsageError(f"{out_path}: the name must end with {', '.join(WRITERS)}")
    try:
        with _staged(out_path) as staging:
            columns = [*FORMS[to].cells, "id", "source", "category", *numbers]
            converted = writer(_rows(pairs, to, numbers), staging, to, columns)
            if not converted.rows:
                raise DataError("there is no pair to write", file=str(out_path))
    except OSError as error:
        raise DataError(f"cannot be written: {error.strerror or error}", str(out_path)) from None
    return converted


@contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """A file to write, which becomes `target` by one rename when the block ends well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        yield staging
        staging.replace(target)
    finally:
        staging.unlink(missing_ok=True)


def _rows(
    pairs: Iterable[PreferencePair], to: str, numbers: Sequence[str]
) -> Iterator[tuple[PreferencePair, Values]]:
    form = FORMS[to]
    for pair in pairs:
        try:
            values = form.write(pair)
            _check(form, values, pair)
        except _CannotHold as reason:
            hint = "" if form.keeps_kind else "; --to conversational can"
            raise _refused(pair, f"--to {to} cannot hold this pair: {reason}{hint}") from None
        named = {key: getattr(pair, key) for key in ("id", "source", "category")}
        own = {key: getattr(pair.numbers, key) for key in numbers}
        yield pair, values | {key: value for key, value in named.items() if value} | own


def _refused(pair: PreferencePair, problem: str) -> DataError:
    return DataError(problem, pair.file or None, pair.row or None)


def _check(form: Form, values: Values, pair: PreferencePair) -> None:
    """Read a row back: what was written must say the same as the pair."""
    try:
        (again,) = PairReader(form.format).read(Row(pair.file, pair.row, values))
    except (DataError, Unreadable) as error:
        raise _CannotHold(f"it would not be read again ({error})") from None
    ours = (as_messages(pair.prompt), pair.chosen, pair.rejected)
    if (as_messages(again.prompt), again.chosen, again.rejected) != ours:
        raise _CannotHold(
            "its text would read differently (white space at an edge, or a speaker's mark inside)"
        )
    if form.keeps_kind and isinstance(again.prompt, str) != isinstance(pair.prompt, str):
        raise _CannotHold("a text prompt and a prompt of messages would become alike")


def _answer(said: str) -> Message:
    return {"role": "assistant", "content": said}


def _kind(pair: PreferencePair) -> Values:
    return {"prompt_format": PROMPT_IS_TEXT} if isinstance(pair.prompt, str) else {}


def _conversational(pair: PreferencePair) -> Values:
    return {
        "prompt": list(as_messages(pair.prompt)),
        "chosen": [_answer(pair.chosen)],
        "rejected": [_answer(pair.rejected)],
        **_kind(pair),
    }


def _implicit(pair: PreferencePair) -> Values:
    prompt = as_messages(pair.prompt)
    return {
        "chosen": [*prompt, _answer(pair.chosen)],
        "rejected": [*prompt, _answer(pair.rejected)],
        **_kind(pair),
    }


def _text(pair: PreferencePair) -> Values:
    prompt = pair.prompt if isinstance(pair.prompt, str) else _question(_plain(pair))
    return {"prompt": prompt, "chosen": pair.chosen, "rejected": pair.rejected}


def _orca(pair: PreferencePair) -> Values:
    system, dialogue = _without_system(_plain(pair))
    asked = {"system": system, "question": _question(dialogue)}
    return asked | {"chosen": pair.chosen, "rejected": pair.rejected}


def _transcripts(pair: PreferencePair) -> Values:
    names = {"user": "Human", "assistant": "Assistant"}
    prompt = ""
    for message in _plain(pair):
        if message["role"] not in names:
            raise _CannotHold(f"a transcript has no {message['role']} turn")
        if TURN.search("\n\n" + message["content"].lstrip()):
            raise _CannotHold("a message holds a speaker's mark")
        prompt += f"\n\n{names[message['role']]}: {message['content']}"
    sides = (("chosen", pair.chosen), ("rejected", pair.rejected))
    return {side: f"{prompt}\n\nAssistant: {said}" for side, said in sides}


def _conversations(pair: PreferencePair) -> Values:
    system, dialogue = _without_system(_plain(pair))
    unknown = next((m["role"] for m in dialogue if m["role"] not in FROM), None)
    if unknown is not None:
        raise _CannotHold(f"it has no place for a {unknown} message there")
    turns = [{"from": FROM[m["role"]], "value": m["content"]} for m in dialogue]
    return {
        "conversations": turns,
        "chosen": {"from": "gpt", "value": pair.chosen},
        "rejected": {"from": "gpt", "value": pair.rejected},
    } | ({"system": system} if system else {})


def _plain(pair: PreferencePair) -> tuple[Message, ...]:
    """The prompt's messages, where they hold role and content and nothing else."""
    prompt = as_messages(pair.prompt)
    for at, message in enumerate(prompt, 1):
        extra = sorted(set(message) - {"role", "content"})
        if extra or "content" not in message:
            what = f"also holds {', '.join(extra)}" if extra else "has no content"
            raise _CannotHold(f"message {at} {what}")
    return prompt


def _without_system(prompt: tuple[Message, ...]) -> tuple[str, tuple[Message, ...]]:
    """A leading system message's text, and the messages after it."""
    if prompt and prompt[0]["role"] == "system":
        return prompt[0]["content"], prompt[1:]
    return "", prompt


def _question(dialogue: tuple[Message, ...]) -> str:
    """What the user says, where that is all there is."""
    if [message["role"] for message in dialogue] != ["user"]:
        roles = ", ".join(message["role"] for message in dialogue) or "nothing"
        raise _CannotHold(f"it has room for one question, and the prompt is: {roles}")
    return dialogue[0]["content"]


@dataclass(frozen=True)
class Form:
    """How a pair is written, and the schema by which it is read again.

    `cells` says what each column holds: text, messages (role, content) or turns (from, value).
    """

    format: str
    write: Callable[[PreferencePair], Values]
    cells: dict[str, str]
    keeps_kind: bool = False


_SIDES_TEXT = {"chosen": "text", "rejected": "text"}
_SIDES_MESSAGES = {"chosen": "messages", "rejected": "messages"}
FORMS: dict[str, Form] = {
    "conversational": Form(
        "explicit",
        _conversational,
        {"prompt": "messages", **_SIDES_MESSAGES, "prompt_format": "text"},
        keeps_kind=True,
    ),
    "text": Form("explicit", _text, {"prompt": "text", **_SIDES_TEXT}),
    "implicit": Form(
        "implicit", _implicit, {**_SIDES_MESSAGES, "prompt_format": "text"}, keeps_kind=True
    ),
    "transcripts": Form("transcripts", _transcripts, _SIDES_TEXT),
    "conversations": Form(
        "conversations",
        _conversations,
        {"conversations": "turns", "chosen": "turn", "rejected": "turn", "system": "text"},
    ),
    "orca": Form("orca", _orca, {"system": "text", "question": "text", **_SIDES_TEXT}),
}

Rows = Iterator[tuple[PreferencePair, Values]]


def _write_jsonl(rows: Rows, path: Path, to: str, columns: Sequence[str]) -> Converted:
    count = 0
    with path.open("wb") as file:
        for _, values in rows:
            file.write(_json_line(values) + b"\n")
            count += 1
    return Converted(count, 0)


def _write_json(rows: Rows, path: Path, to: str, columns: Sequence[str]) -> Converted:
    count = 0
    with path.open("wb") as file:
        for count, (_, values) in enumerate(rows, 1):
            file.write((b"[\n" if count == 1 else b",\n") + _json_line(values))
        file.write(b"\n]\n")
    return Converted(count, 0)


def _json_line(values: Values) -> bytes:
    """Readable UTF-8; half a surrogate pair, which UTF-8 cannot hold, as an escape."""
    try:
        return json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return json.dumps(values, ensure_ascii=True).encode()


def _write_csv(
    rows: Rows, path: Path, to: str, columns: Sequence[str], delimiter: str = ","
) -> Converted:
    count = neutralised = 0
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter, lineterminator="\n", quoting=csv.QUOTE_ALL)
        writer.writerow(columns)
        for pair, values in rows:
            count += 1
            cells = [_csv_cell(pair, values.get(column, "")) for column in columns]
            formulas = [cell.startswith(FORMULA) for cell in cells]
            neutralised += sum(formulas)
            with _encodable(pair, "CSV"):
                writer.writerow([f"'{c}" if f else c for c, f in zip(cells, formulas, strict=True)])
    return Converted(count, neutralised)


def _csv_cell(pair: PreferencePair, value: Any) -> str:
    """A cell's text: messages as JSON. Text that would be read as such JSON is refused."""
    if isinstance(value, float):
        return repr(value)
    cell = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if csv_cell(cell) != value:
        raise _refused(pair, "holds text that CSV would read as messages; write .jsonl")
    return cell


@contextmanager
def _encodable(pair: PreferencePair, kind: str) -> Iterator[None]:
    try:
        yield
    except UnicodeEncodeError:
        problem = f"holds half a surrogate pair, which {kind} cannot; mend it, or write .jsonl"
        raise _refused(pair, problem) from None


def _write_parquet(rows: Rows, path: Path, to: str, columns: Sequence[str]) -> Converted:
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema([(name, _arrow_type(to, name)) for name in columns])
    count = 0
    held: list[Values] = []
    with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        for pair, values in rows:
            count += 1
            with _encodable(pair, "Parquet"):
                json.dumps(values, ensure_ascii=False).encode()
            _only_role_and_content(pair, values)
            held.append(values)
            if len(held) == PARQUET_ROWS:
                writer.write_table(pyarrow.Table.from_pylist(held, schema))
                held = []
        if held:
            writer.write_table(pyarrow.Table.from_pylist(held, schema))
    return Converted(count, 0)


def _only_role_and_content(pair: PreferencePair, values: Values) -> None:
    """Parquet has one type a column, so messages there hold role and content and nothing else."""
    for column in ("prompt", "chosen"):
        cell = values.get(column)
        for message in cell if isinstance(cell, list) else []:
            extra = sorted(set(message) - {"role", "content"})
            if extra:
                problem = f"a message also holds {', '.join(extra)}; write .jsonl, which keeps it"
                raise _refused(pair, f"Parquet columns have one type, and {problem}")


def _arrow_type(to: str, column: str) -> Any:
    import pyarrow

    if column in NUMBERS:
        return pyarrow.float64()
    text = pyarrow.string()
    turn = pyarrow.struct([("from", text), ("value", text)])
    message = pyarrow.struct([("role", text), ("content", text)])
    kinds = {"messages": pyarrow.list_(message), "turns": pyarrow.list_(turn), "turn": turn}
    return kinds.get(FORMS[to].cells.get(column, "text"), text)


WRITERS: dict[str, Callable[[Rows, Path, str, Sequence[str]], Converted]] = {
    ".jsonl": _write_jsonl,
    ".json": _write_json,
    ".csv": _write_csv,
    ".tsv": partial(_write_csv, delimiter="\t"),
    ".parquet": _write_parquet,
}
