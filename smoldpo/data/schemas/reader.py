"""Rows of one source in, preference pairs out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from smoldpo.data.account import DROP, Finding
from smoldpo.data.cleaning.text import excerpt
from smoldpo.data.schemas.fields import NUMBERS, Unreadable, with_numbers
from smoldpo.data.schemas.scored import AnswerGroups
from smoldpo.data.schemas.table import SCHEMAS, Schema, contradiction, detect
from smoldpo.data.sources import Row, Split
from smoldpo.types import PreferencePair
from smoldpo.utils.errors import DataError, UsageError, nearest


class PairReader:
    """Rows in, pairs out, for one source: the schema is found on the first row unless it is given.

    Attributes:
        format: the schema's name; "" until the first row was seen when none was asked for.
        skipped: (row, rule, detail) of rows set aside after `read` had returned for them (answers
            that are grouped over rows): drain it after each `read` and after `finish`.
        unused: the first row's columns that the schema's reader does not look at.
    """

    def __init__(self, format: str | None = None, columns: Mapping[str, str] | None = None):
        """`columns` maps names that the schema knows to the source's own: {"prompt": "question"}.

        `weight`, `margin` and `beta` are read, as the pair's own, only where `columns` names them.

        Raises:
            UsageError: an unknown schema, or a mapping to a column that the schema does not have.
        """
        if format is not None and format not in SCHEMAS:
            known = ", ".join(SCHEMAS)
            raise UsageError(
                f"--format {format}: unknown{nearest(format, SCHEMAS)}; known: {known}"
            )
        self.format = format or ""
        self.columns = dict(columns or {})
        self.skipped: list[tuple[Row, str, str]] = []
        self.unused: tuple[str, ...] = ()
        self._asked = format is not None
        self._started = False
        self._groups = AnswerGroups(self.skipped)
        self._numbers = tuple(name for name in NUMBERS if name in self.columns)
        self._check_targets(SCHEMAS.values() if format is None else [SCHEMAS[format]])

    def read(self, row: Row) -> list[PreferencePair]:
        """The pairs that this row completes: usually one, none while a group of rows is open.

        Raises:
            Unreadable: the row holds no pair; count it under the exception's `rule`.
            DataError: the row is not in the schema; the message names file, row and key.
            UsageError: the first row has no column of a name that `columns` maps.
        """
        if self.columns:
            row = self._renamed(row)
        if not self.format:
            self.format = detect(row)
            self._check_targets([SCHEMAS[self.format]])
        schema = SCHEMAS[self.format]
        if not self._started:
            self._started = True
            known = {*schema.known, *self.columns}
            self.unused = tuple(name for name in row.values if name not in known)
        elif not self._asked and (problem := contradiction(self.format, row.values)):
            raise DataError(problem, row.file, row.row)
        if schema.read is None:
            return self._groups.read(row)
        return [with_numbers(schema.read(row), row, self._numbers)]

    def finish(self) -> list[PreferencePair]:
        """The pairs still held back, once the last row was read."""
        return self._groups.finish()

    def _renamed(self, row: Row) -> Row:
        """The row under the schema's names; a renamed column no longer has its old one."""
        if not self._started:
            for target, name in self.columns.items():
                if name not in row.values:
                    have = ", ".join(map(repr, row.values)) or "none"
                    raise UsageError(
                        f"--columns {target}={name}: {row.file}, row {row.row} has no column "
                        f"{name!r}{nearest(name, row.values)}; it has: {have}"
                    )
        taken = set(self.columns.values())
        values = {name: value for name, value in row.values.items() if name not in taken}
        for target, name in self.columns.items():
            values.pop(target, None)
            if name in row.values:
                values[target] = row.values[name]
        return Row(row.file, row.row, values)

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
    """One pass over a split: iterate for its pairs.

    Attributes:
        rows_read: rows seen so far.
        findings: the rows that hold no pair, and why.
    """

    def __init__(
        self, split: Split, format: str | None = None, columns: Mapping[str, str] | None = None
    ):
        super().__init__(format, columns)
        self.split = split
        self.rows_read = 0
        self.findings: list[Finding] = []

    def __iter__(self) -> Iterator[PreferencePair]:
        for row in self.split.rows():
            self.rows_read += 1
            try:
                yield from self.read(row)
            except Unreadable as reason:
                self.skipped.append((row, reason.rule, str(reason)))
            self._record_skipped()
        yield from self.finish()
        self._record_skipped()

    def _record_skipped(self) -> None:
        for row, rule, detail in self.skipped:
            shown = excerpt(str(row.values))
            self.findings.append(Finding(row.file, row.row, rule, DROP, detail, shown))
        self.skipped.clear()
