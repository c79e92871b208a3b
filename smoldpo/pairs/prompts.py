"""Prompts to be answered: lines of a text file, rows without answers, or the prompts of pairs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from smoldpo.data.files import kind_of
from smoldpo.data.schemas import SplitReader, Unreadable
from smoldpo.data.schemas.cells import unpack_row
from smoldpo.data.schemas.fields import join, text_or_messages
from smoldpo.data.schemas.paired import alpaca_prompt
from smoldpo.data.schemas.table import detect
from smoldpo.data.schemas.template_arguments import with_arguments
from smoldpo.data.sources import Row, Split, open_source
from smoldpo.types import NO_ARGUMENTS, Message, PreferencePair, Prompt, TemplateArguments
from smoldpo.utils.errors import DataError, UsageError

COLUMNS = ("prompt", "messages", "conversations", "instruction", "question", "text", "input")
"""Where a row has its prompt; the first that is there counts."""


@dataclass(frozen=True)
class AskedPrompt:
    """A prompt, what it gives to the chat template, and where it was read."""

    prompt: Prompt
    arguments: TemplateArguments = NO_ARGUMENTS
    file: str = ""
    row: int = 0

    @property
    def key(self) -> str:
        """Equal exactly for prompts that a model sees alike."""
        return PreferencePair(self.prompt, "", "", arguments=self.arguments).content_hash()


@dataclass(frozen=True)
class Prompts:
    """Distinct prompts in their order, and how many rows said the same or held none."""

    prompts: list[AskedPrompt]
    repeated: int
    unreadable: int


def read_prompts(
    name: str,
    *,
    system: str | None = None,
    subset: str | None = None,
    split: str | None = None,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
) -> Prompts:
    """The prompts of a source.

    A file that is of no kind of data is text, with a prompt on each line. Rows that hold a prompt
    and no pair (`prompt`, `messages`, ... with `system` and `tools`) are prompts; where messages
    end with the assistant's, that answer is left away. Of pairs their prompts are taken.

    Args:
        system: what goes before each prompt that has no system message.
        limit: the first so many distinct prompts alone.

    Raises:
        UsageError: no such source, split or schema.
        DataError: a row that holds no prompt, by file and row; or there is no prompt at all.
    """
    path = Path(name).expanduser()
    skipped = [0]
    if path.is_file() and not kind_of(path):
        if any(given is not None for given in (subset, split, format, columns)):
            raise UsageError(f"{name}: is text, a prompt a line: no subset, split or columns there")
        found = _lines(path)
    else:
        source = open_source(name, subset)
        found = _rows(source.split(split), format, columns, skipped)
    distinct: dict[str, AskedPrompt] = {}
    read = 0
    for asked in found:
        read += 1
        asked = asked if system is None else replace(asked, prompt=_with_system(asked, system))
        if limit is not None and len(distinct) >= limit and asked.key not in distinct:
            read -= 1
            break
        distinct.setdefault(asked.key, asked)
    if not distinct:
        raise DataError("holds no prompt", file=name)
    return Prompts(list(distinct.values()), read - len(distinct), skipped[0])


def _lines(path: Path) -> Iterator[AskedPrompt]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DataError("is not UTF-8 text; give a prompt a line in UTF-8", str(path)) from None
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield AskedPrompt(line.strip(), NO_ARGUMENTS, str(path), number)


def _rows(
    split: Split, format: str | None, columns: Mapping[str, str] | None, skipped: list[int]
) -> Iterator[AskedPrompt]:
    first = next(split.rows(), None)
    if first is not None and format is None and columns is None and _holds_no_pair(first):
        for row in split.rows():
            try:
                yield _asked(Row(row.file, row.row, unpack_row(row.values)))
            except Unreadable:
                skipped[0] += 1
        return
    reader = SplitReader(split, format, columns)
    for pair in reader:
        yield AskedPrompt(pair.prompt, pair.arguments, pair.file, pair.row)
    skipped[0] += len(reader.findings)


def _holds_no_pair(row: Row) -> bool:
    """Whether a row is in no schema of pairs, and has a column that may hold a prompt."""
    values = unpack_row(row.values)
    if not any(values.get(name) is not None for name in COLUMNS):
        return False
    try:
        return detect(Row(row.file, row.row, values)) == ""
    except (DataError, Unreadable):
        return True


def _asked(row: Row) -> AskedPrompt:
    name = next((name for name in COLUMNS if row.values.get(name) is not None), None)
    if name is None:
        raise DataError(
            f"holds no prompt: none of the columns {', '.join(COLUMNS)}", row.file, row.row
        )
    prompt: Prompt
    if name == "instruction":
        prompt = alpaca_prompt(row)
    else:
        said = text_or_messages(row, name)
        prompt = said if isinstance(said, str) else _without_answer(said)
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise Unreadable("empty_prompt", "the prompt is empty")
    pair = with_arguments(join(row, prompt, "", ""), row)  # with the row's system message
    return AskedPrompt(pair.prompt, pair.arguments, row.file, row.row)


def _without_answer(messages: list[Message]) -> tuple[Message, ...]:
    last = len(messages)
    while last and messages[last - 1]["role"] == "assistant":
        last -= 1
    return tuple(messages[:last])


def _with_system(asked: AskedPrompt, system: str) -> Prompt:
    if isinstance(asked.prompt, str):
        turns: tuple[Message, ...] = ({"role": "user", "content": asked.prompt},)
    else:
        turns = asked.prompt
    if turns and turns[0]["role"] in ("system", "developer"):
        return turns
    return ({"role": "system", "content": system}, *turns)


def as_plain(asked: AskedPrompt) -> str:
    """A prompt with its arguments as JSON, for records."""
    return json.dumps([asked.prompt, asdict(asked.arguments)], sort_keys=True)
