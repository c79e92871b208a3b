"""`smoldpo data check`: reads every row once, in bounded memory, and says what is wrong with which.

    evaluation's prompts  ─┐
    rows → pairs → Cleaner ┴→ LengthStats → CheckReport

Splits that a source holds out are checked first: their prompts must not be in the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, compress
from typing import Any

import numpy as np

from smoldpo.data.account import (
    DROP,
    MEND,
    WARN,
    Finding,
    SourceAccount,
    in_reading_order,
    loud,
)
from smoldpo.data.cleaning.cleaner import Cleaner, RuleSet
from smoldpo.data.cleaning.duplicates import PairIndex
from smoldpo.data.length_stats import LengthStats, TokenCounter, WordCounter
from smoldpo.data.load import columns_present
from smoldpo.data.schemas.reader import SplitReader
from smoldpo.data.sources import EVAL_NAMES, Split, open_source
from smoldpo.types import Advance, PreferencePair, no_progress
from smoldpo.utils.errors import DataError, UsageError


@dataclass(frozen=True)
class CheckOptions:
    """What to check, and how."""

    subset: str | None = None
    split: str | None = None
    eval_data: str | None = None
    format: str | None = None
    columns: Mapping[str, str] | None = None
    max_length: int = 1024
    rules: RuleSet = field(default_factory=RuleSet)


@dataclass
class CheckedSplit:
    """One split as it was checked."""

    split: Split
    format: str
    rows_read: int
    rows_kept: int
    losses: list[str]
    """Columns and files that were not read, in sentences."""
    keep: np.ndarray
    """Of the pairs that passed the rules on single rows, those that also passed the others, [N]."""


@dataclass
class CheckReport:
    """The findings in each row, and the set in numbers."""

    data: str
    options: CheckOptions
    parts: list[CheckedSplit]
    findings: list[Finding]
    statistics: dict[str, Any]
    lengths: np.ndarray
    """Lengths of prompt, chosen, rejected of an even sample of the kept pairs, [N, 3]."""
    evaluation: dict[str, Any] | None

    @property
    def rows_read(self) -> int:
        return sum(part.rows_read for part in self.parts)

    @property
    def rows_kept(self) -> int:
        return sum(part.rows_kept for part in self.parts)

    def by_rule(self) -> list[tuple[str, str, int, Finding]]:
        """(rule, action, number of rows, an example), drops first, then by number."""
        rows: dict[tuple[str, str], set[tuple[str, int]]] = {}
        examples: dict[tuple[str, str], Finding] = {}
        for item in self.findings:
            key = (item.rule, item.action)
            rows.setdefault(key, set()).add((item.file, item.row))
            examples.setdefault(key, item)
        order = (DROP, MEND, WARN)
        ranked = sorted(rows, key=lambda key: (order.index(key[1]), -len(rows[key]), key[0]))
        return [(*key, len(rows[key]), examples[key]) for key in ranked]

    def as_dict(self) -> dict[str, Any]:
        """What --json prints, but for the findings, which can be many: the caller adds them."""
        return {
            "data": self.data,
            "format": ", ".join(dict.fromkeys(part.format for part in self.parts)),
            "rows_read": self.rows_read,
            "rows_kept": self.rows_kept,
            "parts": [
                {
                    "split": part.split.name,
                    "format": part.format,
                    "rows_read": part.rows_read,
                    "rows_kept": part.rows_kept,
                    "pairs_kept": int(part.keep.sum()),
                    "not_read": part.losses,
                }
                for part in self.parts
            ],
            "evaluation": self.evaluation,
            "rules": {
                rule: {"action": action, "rows": rows} for rule, action, rows, _ in self.by_rule()
            },
            "rules_on": sorted(self.options.rules.on),
            "statistics": self.statistics,
        }


class _Audit:
    """The state of one check: what to measure with, and the prompts known so far."""

    def __init__(self, options: CheckOptions, counter: TokenCounter | WordCounter):
        self.options = options
        self.stats = LengthStats(counter, options.max_length)
        self.findings: list[Finding] = []
        self.prompts: list[np.ndarray] = []
        self.evaluation = PairIndex(answers=False)

    def check(self, split: Split, held_out: bool, advance: Advance) -> CheckedSplit:
        """Check a split; the prompts of one that is held out join evaluation's."""
        reader = SplitReader(split, self.options.format, self.options.columns)
        cleaner = Cleaner(self.options.rules, None if held_out else self.evaluation)

        def report(pair: PreferencePair, rule: str, problem: tuple[str, str]) -> None:
            if rule in self.options.rules:
                cleaner.record(pair, rule, *problem)

        before = len(self.stats)
        for pair in reader:
            cleaned = cleaner.clean(pair)
            if cleaned is not None:
                self.stats.add(cleaned, report)
                if held_out:
                    self.evaluation.add(cleaned)
            advance(1)
        self.stats.flush(report)
        keep = cleaner.finish()
        if "not_tokenizable" in self.options.rules:
            keep[[index - before for index in self.stats.refused if index >= before]] = False
        self.findings += in_reading_order(reader.findings + cleaner.findings)
        self.prompts.append(cleaner.index.prompt_numbers(keep))
        rows_kept = cleaner.index.locations.distinct_rows(keep)
        lost = SourceAccount.of(
            [],
            source=split.name,
            format=", ".join(reader.formats),
            rows_read=reader.rows_read,
            rows_kept=rows_kept,
            columns_not_read=list(reader.lost),
            rows_with_lost=loud(reader.lost),
            files_left_out=list(split.left_out),
        )
        return CheckedSplit(split, lost.format, reader.rows_read, rows_kept, lost.losses(), keep)


def check_data(
    data: str,
    options: CheckOptions,
    counter: TokenCounter | WordCounter,
    advance: Advance = no_progress,
) -> CheckReport:
    """Check one split of a source, or all of them.

    Raises:
        UsageError: no such source or split.
        DataError: a source without rows, a schema that is not known, a row that cannot be read.
    """
    source = open_source(data, options.subset)
    several = len(source.splits) > 1
    held_out = [split for split in source.splits if several and split.name in EVAL_NAMES]
    chosen = [source.split(options.split)] if options.split else list(source.splits)
    only_held_out = len(chosen) == 1 and chosen[0] in held_out
    audit, names = _Audit(options, counter), []
    others: list[SplitReader] = []
    if options.eval_data is not None:
        columns = columns_present(options.columns, options.eval_data)
        others.append(SplitReader(open_source(options.eval_data).evaluation, None, columns))
        names.append(options.eval_data)
    for split in held_out:
        names.append(source.label(split))
        if split not in chosen and not only_held_out:
            others.append(SplitReader(split, options.format, options.columns))
    for pair in chain.from_iterable(others):
        audit.evaluation.add(pair)
    compared = names and not (only_held_out and options.eval_data is None)
    chosen.sort(key=lambda split: split not in held_out)
    parts = [audit.check(split, split in held_out and len(chosen) > 1, advance) for split in chosen]
    if not sum(part.rows_read for part in parts):
        raise DataError(f"{data}: holds no rows")
    keep = np.concatenate([part.keep for part in parts])
    statistics = audit.stats.statistics(keep)
    statistics["distinct_prompts"] = len(np.unique(np.concatenate(audit.prompts)))
    return CheckReport(
        data=data,
        options=options,
        parts=parts,
        findings=audit.findings,
        statistics=statistics,
        lengths=audit.stats.sampled(keep),
        evaluation={"sources": names} if compared else None,
    )


def kept_pairs(report: CheckReport) -> Iterator[PreferencePair]:
    """The cleaned pairs of a report's only split, read a second time.

    Raises:
        UsageError: several splits were checked; written to one file, the test set would leak.
    """
    if len(report.parts) != 1:
        names = ", ".join(part.split.name for part in report.parts)
        raise UsageError(
            f"{report.data}: has several splits; choose which to write with --split: {names}"
        )
    part, options = report.parts[0], report.options
    cleaner = Cleaner(options.rules)
    reader = SplitReader(part.split, options.format, options.columns)
    cleaned = (pair for pair in map(cleaner.clean_row, reader) if pair is not None)
    return compress(cleaned, part.keep)
