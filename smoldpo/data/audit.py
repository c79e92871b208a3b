"""`smoldpo data check`: reads every row once, in bounded memory, and says what is wrong with which.

    evaluation's prompts  ─┐
    rows → pairs → Cleaner ┴→ Measurements → CheckReport

Splits that a source holds out are checked first: their prompts must not stand in the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

import numpy as np

from smoldpo.data.cleaning.cleaner import Cleaner, RuleSet, Touched
from smoldpo.data.cleaning.duplicates import EvaluationPrompts
from smoldpo.data.length_stats import SAMPLE, Measurements, TokenCounter, WordCounter
from smoldpo.data.load import Reading, fitting, in_order
from smoldpo.data.rows import EVAL_NAMES, Source, Split
from smoldpo.data.sources import open_source
from smoldpo.types import PreferencePair
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
    sample: int = SAMPLE


@dataclass
class Part:
    """One split as it was checked."""

    split: Split
    format: str
    rows_read: int
    rows_kept: int
    kept: np.ndarray
    """Of the pairs that passed the rules on single rows, those that also passed the others, [N]."""

    def as_dict(self) -> dict[str, Any]:
        return {
            "split": self.split.name,
            "format": self.format,
            "rows_read": self.rows_read,
            "rows_kept": self.rows_kept,
            "pairs_kept": int(self.kept.sum()),
        }


@dataclass
class CheckReport:
    """What was found: each touched row, and the set in numbers."""

    data: str
    options: CheckOptions
    parts: list[Part]
    touched: list[Touched]
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

    def by_rule(self) -> list[tuple[str, str, int, Touched]]:
        """(rule, action, number of rows, an example), drops first, then by number."""
        rows: Counter[tuple[str, str]] = Counter()
        examples: dict[tuple[str, str], Touched] = {}
        for (rule, action, _, _), item in {
            (item.rule, item.action, item.file, item.row): item for item in reversed(self.touched)
        }.items():
            rows[rule, action] += 1
            examples[rule, action] = item
        order = ("drop", "mend", "warn")
        ranked = sorted(rows, key=lambda key: (order.index(key[1]), -rows[key], key[0]))
        return [(*key, rows[key], examples[key]) for key in ranked]

    def as_dict(self) -> dict[str, Any]:
        """What --json prints, but for `touched`, which can be long: the caller adds it."""
        return {
            "data": self.data,
            "format": ", ".join(dict.fromkeys(part.format for part in self.parts)),
            "rows_read": self.rows_read,
            "rows_kept": self.rows_kept,
            "parts": [part.as_dict() for part in self.parts],
            "evaluation": self.evaluation,
            "rules": {
                rule: {"action": action, "rows": rows} for rule, action, rows, _ in self.by_rule()
            },
            "rules_on": sorted(self.options.rules.on),
            "statistics": self.statistics,
        }


class _Check:
    """The state of one check: what to measure with, and the prompts known so far."""

    def __init__(self, options: CheckOptions, counter: TokenCounter | WordCounter):
        self.options = options
        self.measured = Measurements(counter, options.max_length, options.sample)
        self.touched: list[Touched] = []
        self.prompts: list[np.ndarray] = []
        self.judged: EvaluationPrompts | None = None

    def remember(self, source: str, pairs: Iterator[PreferencePair]) -> None:
        """Take these prompts for evaluation's."""
        self.judged = self.judged or EvaluationPrompts()
        for pair in pairs:
            self.judged.add(pair)

    def run(self, split: Split, held_out: bool, advance: Callable[[int], None]) -> Part:
        options = self.options
        reading = Reading(split, options.format, options.columns)
        cleaner = Cleaner(options.rules, None if held_out else self.judged)
        self.judged = self.judged or (EvaluationPrompts() if held_out else None)

        def report(pair: PreferencePair, rule: str, finding: tuple[str, str]) -> None:
            if rule in options.rules:
                cleaner.touch(pair, rule, *finding)

        for pair in reading:
            cleaned = cleaner.clean(pair)
            if cleaned is not None:
                self.measured.add(cleaned, report)
                if held_out and self.judged is not None:
                    self.judged.add(cleaned)
            advance(1)
        self.measured.flush(report)
        kept = cleaner.finish()
        self.touched += in_order(reading.touched + cleaner.touched)
        self.prompts.append(cleaner.memory.prompt_keys(kept))
        rows_kept = cleaner.memory.places.distinct_rows(kept)
        return Part(split, reading.format, reading.rows_read, rows_kept, kept)


def check_data(
    data: str,
    options: CheckOptions,
    counter: TokenCounter | WordCounter,
    advance: Callable[[int], None] = lambda _: None,
) -> CheckReport:
    """Check one split of a source, or all of them.

    Raises:
        UsageError: no such source or split.
        DataError: a source without rows, a schema that is not known, a row that cannot be read.
    """
    source = open_source(data, options.subset)
    held_out = [split for split in source.splits if _is_held_out(split, source)]
    chosen = [source.split(options.split)] if options.split else list(source.splits)
    check = _Check(options, counter)
    evaluation = _read_evaluation(check, source, held_out, chosen)
    chosen.sort(key=lambda split: split not in held_out)
    judging = [split for split in chosen if split in held_out and len(chosen) > 1]
    parts = [check.run(split, split in judging, advance) for split in chosen]
    if not sum(part.rows_read for part in parts):
        raise DataError(f"{data}: holds no rows")
    kept = np.concatenate([part.kept for part in parts])
    statistics = check.measured.statistics(kept)
    statistics["distinct_prompts"] = len(np.unique(np.concatenate(check.prompts)))
    lengths = check.measured.sampled(kept)
    return CheckReport(data, options, parts, check.touched, statistics, lengths, evaluation)


def _is_held_out(split: Split, source: Source) -> bool:
    return len(source.splits) > 1 and split.name in EVAL_NAMES


def _read_evaluation(
    check: _Check, source: Source, held_out: list[Split], chosen: list[Split]
) -> dict[str, Any] | None:
    """Learn the prompts of --eval-data, and of the source's own held-out splits."""
    options, names = check.options, []
    if options.eval_data is not None:
        other = open_source(options.eval_data)
        split = other.test or other.train
        check.remember(
            options.eval_data,
            iter(Reading(split, None, fitting(options.columns, options.eval_data))),
        )
        names.append(options.eval_data)
    for split in held_out:
        names.append(f"{source.name} ({split.name})")
        if split not in chosen and not (options.split and chosen[0] in held_out):
            reading = Reading(split, options.format, options.columns)
            check.remember(source.name, iter(reading))
    if not names or (chosen[0] in held_out and len(chosen) == 1 and options.eval_data is None):
        return None
    return {"sources": names}


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
    row_rules = Cleaner(options.rules)
    reading = Reading(part.split, options.format, options.columns)
    cleaned = (pair for pair in map(row_rules.clean_row, reading) if pair is not None)
    return compress(cleaned, part.kept)
