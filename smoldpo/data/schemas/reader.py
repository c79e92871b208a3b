"""Rows of one source in, preference pairs out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from smoldpo.data.account import DROP, Finding
from smoldpo.data.cleaning.text import excerpt
from smoldpo.data.schemas.cells import refuse_printed, unpack_row
from smoldpo.data.schemas.fields import NUMBERS, MissingColumn, Unreadable, with_numbers
from smoldpo.data.schemas.paired import check_scores, score_columns
from smoldpo.data.schemas.scored import AnswerGroups, read_thumb
from smoldpo.data.schemas.table import SCHEMAS, Schema, contradiction, detect, no_schema, renamed
from smoldpo.data.schemas.template_arguments import with_arguments
from smoldpo.data.sources import Row, Split
from smoldpo.types import PreferencePair
from smoldpo.utils.errors import DataError, UsageError, nearest

AHEAD = 64
"""Rows of a file that are looked at before its schema is decided."""
NOTHING: tuple[Any, ...] = (None, "", [], {})
"""Values by whose loss nothing is lost."""


class PairReader:
    """Rows in, pairs out, for one source: the schema is found on the first row unless it is given.

    Attributes:
        format: the schema's name; "" until the first row was seen when none was asked for.
        formats: the names of all schemas met, in their order: a folder's files may have several.
        skipped: (row, rule, detail) of rows set aside after `read` had returned for them (answers
            that are grouped over rows): drain it after each `read` and after `finish`.
        lost: rows that hold something in a column that the schema's reader does not look at, by
            column.
    """

    def __init__(
        self,
        format: str | None = None,
        columns: Mapping[str, str] | None = None,
        thumbs: bool = False,
    ):
        """`columns` maps names that the schema knows to the source's own: {"prompt": "question"}.

        `weight`, `margin` and `beta` are read, as the pair's own, only where `columns` names them.
        With `thumbs` unpaired rows come one by one (`read_thumb`) and are not put into pairs.

        Raises:
            UsageError: an unknown schema, or a mapping to a column that the schema does not have.
        """
        if format is not None and format not in SCHEMAS:
            known = ", ".join(SCHEMAS)
            raise UsageError(
                f"--format {format}: unknown{nearest(format, SCHEMAS)}; known: {known}"
            )
        self.format = format or ""
        self.formats: list[str] = [format] if format else []
        self.columns = dict(columns or {})
        self.skipped: list[tuple[Row, str, str]] = []
        self.lost: Counter[str] = Counter()
        self._thumbs = thumbs
        self._asked = format is not None
        self._started = False
        self._known: frozenset[str] = frozenset()
        self._seen: set[str] = set()
        self._groups = AnswerGroups(self.skipped)
        self._numbers = tuple(name for name in NUMBERS if name in self.columns)
        self._check_targets(SCHEMAS.values() if format is None else [SCHEMAS[format]])
        if format is not None:
            self._use(format)

    @property
    def unused(self) -> tuple[str, ...]:
        """Columns that hold something and that the schema's reader does not look at."""
        return tuple(self.lost)

    def read(self, row: Row) -> list[PreferencePair]:
        """The pairs that this row completes: usually one, none while a group of rows is open.

        Raises:
            Unreadable: the row holds no pair; count it under the exception's `rule`.
            DataError: the row is not in the schema; the message names file, row and key.
            UsageError: the first row has no column of a name that `columns` maps.
        """
        row = self._prepared(row)
        self._started = True
        if not self.format:
            self._use(detect(row))
        self._count_lost(row)
        if not self._asked and (problem := contradiction(self.format, row.values)):
            raise DataError(problem, row.file, row.row)
        try:
            pairs = self._pairs(row)
        except MissingColumn as error:
            missing = next((key for key in error.keys if key in self._seen), None)
            if missing is None:
                raise
            raise Unreadable(f"empty_{missing}", f"{missing} is missing") from None
        self._seen.update(row.values)
        return pairs

    def _pairs(self, row: Row) -> list[PreferencePair]:
        schema = SCHEMAS[self.format]
        if self._thumbs and schema.name == "unpaired":
            return [with_arguments(refuse_printed(read_thumb(row)), row)]
        if schema.read is None:
            return self._groups.read(row)
        if schema.has_sides:
            check_scores(row)
        pair = with_numbers(refuse_printed(schema.read(row)), row, self._numbers)
        return [with_arguments(pair, row)]

    def _count_lost(self, row: Row) -> None:
        lost = [
            name
            for name, value in row.values.items()
            if name not in self._known and value not in NOTHING
        ]
        if lost and SCHEMAS[self.format].has_sides:
            scores = {name for both in score_columns(row.values) for name in both}
            lost = [name for name in lost if name not in scores]
        self.lost.update(lost)

    def finish(self) -> list[PreferencePair]:
        """The pairs still held back, once the last row was read."""
        return self._groups.finish()

    def _use(self, name: str) -> None:
        """Read by this schema from here on."""
        self.format = name
        if name not in self.formats:
            self.formats.append(name)
        self._check_targets([SCHEMAS[name]])
        self._known = frozenset((*SCHEMAS[name].known, *self.columns))

    def _prepared(self, row: Row) -> Row:
        """The row under the schema's names, with the messages in its cells unpacked."""
        if self.columns and not self._started:
            for target, name in self.columns.items():
                if name not in row.values:
                    have = ", ".join(map(repr, row.values)) or "none"
                    raise UsageError(
                        f"--columns {target}={name}: {row.file}, row {row.row} has no column "
                        f"{name!r}{nearest(name, row.values)}; it has: {have}"
                    )
        values = renamed(row.values, self.columns) if self.columns else row.values
        return Row(row.file, row.row, unpack_row(values))

    def _check_targets(self, schemas: Iterable[Schema]) -> None:
        """Refuse a mapping to a name that none of `schemas` knows."""
        schemas = list(schemas)
        known = list(dict.fromkeys(name for schema in schemas for name in schema.known))
        if any(schema.read is not None for schema in schemas):  # a row is a pair
            known += NUMBERS
        whose = f"the schema {schemas[0].name}" if len(schemas) == 1 else "any schema"
        for target, name in self.columns.items():
            if target not in known:
                raise UsageError(
                    f"--columns {target}={name}: {target!r} is no column of {whose}"
                    f"{nearest(target, known)}; known: {', '.join(known)}"
                )


class SplitReader(PairReader):
    """One pass over a split, file by file: iterate for its pairs.

    The schema of a file is that of the fullest of its first AHEAD rows; a column that is null in
    all of these decides nothing.

    Attributes:
        rows_read: rows seen so far.
        findings: the rows that hold no pair, and why.
    """

    def __init__(
        self,
        split: Split,
        format: str | None = None,
        columns: Mapping[str, str] | None = None,
        thumbs: bool = False,
    ):
        super().__init__(format, columns, thumbs)
        self.split = split
        self.rows_read = 0
        self.findings: list[Finding] = []

    def __iter__(self) -> Iterator[PreferencePair]:
        for rows in self.split.files:
            before = self.format
            undecided = self._look_ahead(rows)
            if self.format != before:  # a group may go on in the next file of the same schema
                yield from self.finish()
                self._record_skipped()
            for row in rows():
                self.rows_read += 1
                try:
                    yield from self.read(row)
                except Unreadable as reason:
                    self.skipped.append((row, reason.rule, str(reason)))
                self._record_skipped()
            if undecided is not None and not self.format:
                raise undecided
        yield from self.finish()
        self._record_skipped()

    def _look_ahead(self, rows: Callable[[], Iterator[Row]]) -> DataError | None:
        """Decide a file's schema; where its first rows cannot, why they are in none.

        Raises:
            DataError: the file's rows are in no known schema.
        """
        if self._asked:
            return None
        fullest: Row | None = None
        most, seen = -1, set[str]()
        try:
            for row in islice(rows(), AHEAD):
                row = self._prepared(row)
                self._started = True
                given = {key for key, value in row.values.items() if value is not None}
                seen |= given
                if len(given) > most:
                    fullest, most = row, len(given)
        except DataError:
            pass  # the reading itself comes to that row, and tells
        if fullest is None:
            return None
        self._seen |= seen
        try:
            name = detect(fullest, ignored=fullest.values.keys() - seen)
        except Unreadable:
            return DataError(no_schema(fullest.values), fullest.file, fullest.row)
        except DataError as error:
            raise self._stray(error, fullest) from None
        self._use(name)
        return None

    def _stray(self, error: DataError, row: Row) -> DataError:
        """The error of a file that is no set of pairs, among others."""
        if len(self.split.files) == 1:
            return error
        return DataError(
            f"{error}. The file stands beside {len(self.split.files) - 1} others that are read as "
            "one split: move it out of the folder, or give the others by their names"
        )

    def _record_skipped(self) -> None:
        for row, rule, detail in self.skipped:
            shown = excerpt(str(row.values))
            self.findings.append(Finding(row.file, row.row, rule, DROP, detail, shown))
        self.skipped.clear()
