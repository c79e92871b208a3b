"""From a source's name to clean pairs, and to a train and an evaluation side apart from each other.

Training data goes through all rules of `cleaning`; pairs that judge a model only through those
without which they could not be scored.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from typing import Any, TypeVar

from smoldpo.data.account import DataAccount, SourceAccount, SplitAccount, TouchedRow
from smoldpo.data.cleaning.cleaner import (
    DROP,
    MEND,
    WARN,
    Cleaner,
    RuleSet,
    Touched,
    choose_rules,
    evaluation_rules,
)
from smoldpo.data.cleaning.duplicates import EvaluationPrompts
from smoldpo.data.cleaning.text import excerpt, prompt_key
from smoldpo.data.rows import Split
from smoldpo.data.schemas import PairReader, Unreadable
from smoldpo.data.sources import open_source
from smoldpo.types import PreferencePair, Prompt
from smoldpo.utils.errors import DataError, UsageError


class Reading:
    """One pass over a split: iterate for its pairs.

    Attributes:
        rows_read: rows seen so far.
        format: the schema's name, known from the first row on.
        touched: the rows that hold no pair, and why.
    """

    def __init__(
        self, split: Split, format: str | None = None, columns: Mapping[str, str] | None = None
    ):
        self.split = split
        self.reader = PairReader(format, columns)
        self.rows_read = 0
        self.touched: list[Touched] = []

    @property
    def format(self) -> str:
        return self.reader.format

    def __iter__(self) -> Iterator[PreferencePair]:
        for row in self.split.rows():
            self.rows_read += 1
            try:
                yield from self.reader.read(row)
            except Unreadable as reason:
                shown = excerpt(str(row.values))
                self.touched.append(
                    Touched(row.file, row.row, reason.rule, DROP, str(reason), shown)
                )
            self._drain()
        yield from self.reader.finish()
        self._drain()

    def _drain(self) -> None:
        for row, rule, detail in self.reader.skipped:
            self.touched.append(
                Touched(row.file, row.row, rule, DROP, detail, excerpt(str(row.values)))
            )
        self.reader.skipped.clear()


@dataclass
class LoadedPairs:
    """Clean pairs, and an account of every row that was read."""

    name: str
    format: str
    pairs: list[PreferencePair]
    rows_read: int = 0
    touched: list[Touched] = field(default_factory=list)
    columns_not_read: tuple[str, ...] = ()

    def account(self) -> SourceAccount:
        """Counts and reasons; of warnings the counts alone."""
        counts = {
            action: dict(Counter(item.rule for item in self.touched if item.action == action))
            for action in (DROP, MEND, WARN)
        }
        touched = [item for item in self.touched if item.action != WARN]
        return SourceAccount(
            source=self.name,
            format=self.format,
            rows_read=self.rows_read,
            rows_kept=len(self.pairs),
            columns_not_read=list(self.columns_not_read),
            dropped=counts[DROP],
            mended=counts[MEND],
            warned=counts[WARN],
            touched=_rows(touched),
        )


def load_split(
    split: Split,
    name: str,
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    rules: RuleSet | None = None,
) -> LoadedPairs:
    """Read and clean one split.

    Raises:
        DataError: a source without rows, a schema that is not known, a row that cannot be read, or
            nothing left after cleaning.
    """
    reading, cleaner = Reading(split, format, columns), Cleaner(rules)
    cleaned = [pair for pair in map(cleaner.clean, reading) if pair is not None]
    pairs = _distinct_ids(compress(cleaned, cleaner.finish()))
    touched = in_order(reading.touched + cleaner.touched)
    unused = reading.reader.unused
    loaded = LoadedPairs(name, reading.format, pairs, reading.rows_read, touched, unused)
    if not loaded.pairs:
        reasons = ", ".join(f"{n} {rule}" for rule, n in loaded.account().dropped.items())
        raise DataError(f"{name}: no pair is left of {loaded.rows_read} rows (dropped: {reasons})")
    return loaded


def in_order(touched: list[Touched]) -> list[Touched]:
    """Findings by file, in the order in which files come up, and row."""
    files = {file: number for number, file in enumerate(dict.fromkeys(t.file for t in touched))}
    return sorted(touched, key=lambda item: (files[item.file], item.row))


def _distinct_ids(pairs: Iterable[PreferencePair]) -> list[PreferencePair]:
    """The pairs, those whose id was seen before with a number behind it."""
    seen: Counter[str] = Counter()
    distinct = []
    for pair in pairs:
        seen[pair.id] += 1
        count = seen[pair.id]
        distinct.append(pair if count == 1 else replace(pair, id=f"{pair.id}-{count}"))
    return distinct


def load_pairs(
    name: str,
    *,
    subset: str | None = None,
    split: str | None = None,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    rules_off: Iterable[str] = (),
) -> LoadedPairs:
    """The pairs to judge by: of the split asked for, else of the test split, else of the only one.

    A row is left out only when it could not be scored (see `cleaning.EVALUATION`); the others come
    through byte for byte.

    Raises:
        UsageError, DataError: as `open_source`, `choose_rules` and `load_split`.
    """
    rules = evaluation_rules(rules_off)
    source = open_source(name, subset)
    chosen = source.split(split) if split else (source.test or source.train)
    label = _label(name, chosen, source.splits)
    return load_split(chosen, label, format=format, columns=columns, rules=rules)


def fitting(columns: Mapping[str, str] | None, name: str) -> dict[str, str]:
    """Of `columns`, those that the first row of another source has as well."""
    if not columns:
        return {}
    source = open_source(name)
    first = next(iter((source.test or source.train).rows()), None)
    return {to: ours for to, ours in columns.items() if first and ours in first.values}


def _label(name: str, split: Split, splits: tuple[Split, ...]) -> str:
    return f"{name} ({split.name})" if len(splits) > 1 else name


@dataclass
class TrainingData:
    """What to learn from, what to be judged by, and the account of both."""

    train: list[PreferencePair]
    eval: list[PreferencePair]
    account: DataAccount


def load_training_data(
    data: str,
    *,
    subset: str | None = None,
    split: str | None = None,
    eval_data: str | None = None,
    eval_fraction: float = 0.2,
    max_train: int | None = None,
    max_eval: int | None = None,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    rules_off: Iterable[str] = (),
) -> TrainingData:
    """Load pairs and hold some out: `eval_data`, else the source's test split, else by prompt hash.

    Training pairs whose prompt also stands on the evaluation side are left out and counted, unless
    `rules_off` names eval_prompt; nearly the same prompts are counted. `columns` holds for
    `eval_data` too where it has them; `format` does not, its schema is found by looking at it.

    Raises:
        UsageError, DataError: as `open_source`, `choose_rules` and `load_split`; or a side is left
            without pairs.
    """
    rules, judging = choose_rules(rules_off), evaluation_rules(rules_off)
    source = open_source(data, subset)
    part = source.split(split) if split else source.train
    label = _label(data, part, source.splits)
    loaded = load_split(part, label, format=format, columns=columns, rules=rules)
    account = DataAccount(train=loaded.account())
    held_out: LoadedPairs | None = None
    if eval_data is not None:
        held_out = load_pairs(eval_data, columns=fitting(columns, eval_data), rules_off=rules_off)
        how = f"pairs of {held_out.name}"
    elif eval_fraction == 0:
        how = "none"
    elif source.test is not None and source.test is not part:
        label = _label(data, source.test, source.splits)
        held_out = load_split(source.test, label, format=format, columns=columns, rules=judging)
        how = f"the source's own split {source.test.name!r}"
    else:
        how = f"about {eval_fraction:.0%} of the prompts, by hash"
    if held_out is not None:
        train, evaluation = loaded.pairs, held_out.pairs
        account.eval = held_out.account()
    else:
        train, evaluation = split_by_prompt(loaded.pairs, eval_fraction)
    apart, touched = without_judged(train, evaluation, rules)
    kept, evaluation = apart[:max_train], evaluation[:max_eval]
    account.split = SplitAccount(
        how=how,
        train_pairs=len(kept),
        eval_pairs=len(evaluation),
        train_pairs_dropped_for_eval_prompt=len(train) - len(apart),
        train_pairs_near_eval_prompt=sum(item.rule == "eval_prompt_near" for item in touched),
        touched=_rows(touched),
    )
    if not kept or (not evaluation and (eval_fraction > 0 or eval_data)):
        raise UsageError(
            f"{data}: {len(kept)} pairs to train on and {len(evaluation)} to evaluate on; "
            "give more pairs, another --eval-fraction, or --eval-data"
        )
    return TrainingData(kept, evaluation, account)


def load_mixture(
    sources: Sequence[str],
    weights: Sequence[float],
    seed: int,
    *,
    eval_data: str | None = None,
    max_train: int | None = None,
    max_eval: int | None = None,
    **options: Any,
) -> TrainingData:
    """Several sources as one: each held out from as alone, the training pairs mixed by weight.

    Without weights each source counts by its size, and every pair is used. One source is just
    `load_training_data`, whose other options hold for each source here.

    Raises:
        UsageError, DataError: as `load_training_data` and `mix`.
    """
    if len(sources) == 1:
        return load_training_data(
            sources[0], eval_data=eval_data, max_train=max_train, max_eval=max_eval, **options
        )
    parts = [load_training_data(name, eval_data=eval_data, **options) for name in sources]
    evaluation = parts[0].eval if eval_data else [pair for part in parts for pair in part.eval]
    sides = [part.train for part in parts]
    mixed = list(mix(sides, weights, seed)) if weights else [p for side in sides for p in side]
    rules = choose_rules(options.get("rules_off") or ())
    apart, touched = without_judged(mixed, evaluation, rules)
    kept = _distinct_ids(apart)[:max_train]
    evaluation = _distinct_ids(evaluation)[:max_eval]
    split = SplitAccount(
        how="each source's own",
        train_pairs=len(kept),
        eval_pairs=len(evaluation),
        train_pairs_left_by_weight=sum(map(len, sides)) - len(mixed),
        train_pairs_dropped_for_eval_prompt=len(mixed) - len(apart),
        touched=_rows(touched),
    )
    accounts = [part.account for part in parts]
    if eval_data and accounts[0].split:
        split.how = accounts[0].split.how
    return TrainingData(kept, evaluation, DataAccount(sources=accounts, split=split))


def _rows(touched: Iterable[Touched]) -> list[TouchedRow]:
    return [TouchedRow(**item.as_dict()) for item in touched]


def without_judged(
    train: list[PreferencePair], evaluation: Iterable[PreferencePair], rules: RuleSet
) -> tuple[list[PreferencePair], list[Touched]]:
    """Training pairs without those whose prompt stands in evaluation, and what was found."""
    judged = EvaluationPrompts()
    for pair in evaluation:
        judged.add(pair)
    only = rules.on & {"eval_prompt", "eval_prompt_near"}
    cleaner = Cleaner(replace(rules, on=only), judged)
    for pair in train:
        cleaner.clean(pair)
    kept = cleaner.finish()
    return list(compress(train, kept)), in_order(cleaner.touched)


def split_by_prompt(
    pairs: Iterable[PreferencePair], eval_fraction: float
) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """Train and evaluation pairs, without a common opening.

    The side follows from a hash of how the dialogue opens (its first user turn) and nothing else:
    it stays when pairs are added, removed or reordered, and the turns of a dialogue stay together.
    """
    train: list[PreferencePair] = []
    evaluation: list[PreferencePair] = []
    for pair in pairs:
        share = int(prompt_key(opening(pair.prompt))[:15], 16) / 16**15
        (evaluation if share < eval_fraction else train).append(pair)
    return train, evaluation


def opening(prompt: Prompt) -> Prompt:
    """How a dialogue begins: its first user turn, by which its side of a split is decided."""
    if isinstance(prompt, str):
        return prompt
    users = [message for message in prompt if message["role"] == "user"]
    return tuple(users[:1]) or prompt


T = TypeVar("T")


def mix(sources: Sequence[Iterable[T]], weights: Sequence[float], seed: int) -> Iterator[T]:
    """Several sources interleaved by weight, each read at most once; for rows or for pairs.

    Item k of a source of weight w comes at the time (k + u) / w, u drawn once a source from `seed`
    between 0 and 1; the items come in the order of their times. So any beginning of the mix holds
    every source's share to within one item, and the same seed gives the same order. The mix ends
    when a source has nothing left for its turn: from there on the weights could not be kept.

    Raises:
        UsageError: not one positive, finite weight for each source.
    """
    if len(sources) != len(weights) or not sources:
        raise UsageError(f"{len(sources)} sources need as many weights, not {len(weights)}")
    wrong = next((weight for weight in weights if not (math.isfinite(weight) and weight > 0)), None)
    if wrong is not None:
        raise UsageError(f"a weight must be a positive number, not {wrong}")
    return _interleave([iter(source) for source in sources], weights, random.Random(seed))


def _interleave(
    sources: list[Iterator[T]], weights: Sequence[float], chance: random.Random
) -> Iterator[T]:
    starts = [chance.random() for _ in weights]
    taken = [0] * len(weights)
    while True:
        times = [(k + u) / w for k, u, w in zip(taken, starts, weights, strict=True)]
        turn = times.index(min(times))
        try:
            item = next(sources[turn])
        except StopIteration:
            return
        taken[turn] += 1
        yield item
