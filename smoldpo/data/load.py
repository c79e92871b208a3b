"""From a source's name to clean pairs, and to training and evaluation pairs without common prompts.

Training data goes through all rules of `cleaning`; evaluation data only through those without which
a pair could not be scored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any

from smoldpo.data.account import DataAccount, Finding, SourceAccount, SplitAccount, in_reading_order
from smoldpo.data.cleaning.cleaner import Cleaner, RuleSet, choose_rules, evaluation_rules
from smoldpo.data.cleaning.duplicates import PairIndex
from smoldpo.data.cleaning.text import prompt_key
from smoldpo.data.schemas.reader import SplitReader
from smoldpo.data.sources import Split, mix, open_source
from smoldpo.types import PreferencePair, Prompt
from smoldpo.utils.errors import DataError, UsageError


@dataclass
class LoadedPairs:
    """Clean pairs, and an account of every row that was read."""

    pairs: list[PreferencePair]
    account: SourceAccount


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
    reader, cleaner = SplitReader(split, format, columns), Cleaner(rules)
    cleaned = [pair for pair in map(cleaner.clean, reader) if pair is not None]
    pairs = _distinct_ids(compress(cleaned, cleaner.finish()))
    findings = in_reading_order(reader.findings + cleaner.findings)
    account = SourceAccount.of(
        findings,
        source=name,
        format=reader.format,
        rows_read=reader.rows_read,
        rows_kept=len(pairs),
        columns_not_read=list(reader.unused),
    )
    if not pairs:
        reasons = ", ".join(f"{n} {rule}" for rule, n in account.dropped.items())
        raise DataError(f"{name}: no pair is left of {reader.rows_read} rows (dropped: {reasons})")
    return LoadedPairs(pairs, account)


def _distinct_ids(pairs: Iterable[PreferencePair]) -> list[PreferencePair]:
    """The pairs; an id seen before gets a number behind it."""
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
    """Pairs to evaluate on: of the split asked for, else of the test split, else of the only one.

    A row is left out only when it could not be scored (`cleaner.EVALUATION`); the others come
    through byte for byte.

    Raises:
        UsageError, DataError: as `open_source`, `choose_rules` and `load_split`.
    """
    rules = evaluation_rules(rules_off)
    source = open_source(name, subset)
    chosen = source.split(split) if split else source.evaluation
    return load_split(chosen, source.label(chosen), format=format, columns=columns, rules=rules)


def columns_present(columns: Mapping[str, str] | None, name: str) -> dict[str, str]:
    """Of `columns`, those that the first row of another source has as well."""
    if not columns:
        return {}
    first = next(iter(open_source(name).evaluation.rows()), None)
    return {to: ours for to, ours in columns.items() if first and ours in first.values}


@dataclass
class TrainingData:
    """What to learn from, what to evaluate on, and the account of both."""

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

    Training pairs whose prompt is in evaluation too are left out and counted, unless `rules_off`
    names eval_prompt; nearly the same prompts are counted. `columns` holds for `eval_data` too
    where it has them; `format` does not, its schema is found by looking at it.

    Raises:
        UsageError, DataError: as `open_source`, `choose_rules` and `load_split`; or no pairs are
            left to train or to evaluate on.
    """
    rules = choose_rules(rules_off)
    source = open_source(data, subset)
    part = source.split(split)
    loaded = load_split(part, source.label(part), format=format, columns=columns, rules=rules)
    account = DataAccount(train=loaded.account)
    test = source.test
    held_out: LoadedPairs | None = None
    if eval_data is not None:
        mapped = columns_present(columns, eval_data)
        held_out = load_pairs(eval_data, columns=mapped, rules_off=rules_off)
        how = f"pairs of {held_out.account.source}"
    elif eval_fraction == 0:
        how = "none"
    elif test is not None and test is not part:
        scored = evaluation_rules(rules_off)
        held_out = load_split(
            test, source.label(test), format=format, columns=columns, rules=scored
        )
        how = f"the source's own split {test.name!r}"
    else:
        how = f"about {eval_fraction:.0%} of the prompts, by hash"
    if held_out is not None:
        train, evaluation = loaded.pairs, held_out.pairs
        account.eval = held_out.account
    else:
        train, evaluation = split_by_prompt(loaded.pairs, eval_fraction)
    train, evaluation, divided = _divide(train, evaluation, rules, how, max_train, max_eval)
    near = sum(finding.rule == "eval_prompt_near" for finding in divided.touched)
    divided.train_pairs_near_eval_prompt = near
    account.split = divided
    if not train or (not evaluation and (eval_fraction > 0 or eval_data)):
        raise UsageError(
            f"{data}: {len(train)} pairs to train on and {len(evaluation)} to evaluate on; "
            "give more pairs, another --eval-fraction, or --eval-data"
        )
    return TrainingData(train, evaluation, account)


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
    accounts = [part.account for part in parts]
    every = [pair for part in parts for pair in part.train]
    mixed = list(mix([part.train for part in parts], weights, seed)) if weights else every
    held_out, how = [pair for part in parts for pair in part.eval], "each source's own"
    if eval_data and accounts[0].split is not None:
        held_out, how = parts[0].eval, accounts[0].split.how
    rules = choose_rules(options.get("rules_off") or ())
    train, evaluation, divided = _divide(mixed, held_out, rules, how, max_train, max_eval)
    divided.train_pairs_left_by_weight = len(every) - len(mixed)
    return TrainingData(train, evaluation, DataAccount(sources=accounts, split=divided))


def _divide(
    train: list[PreferencePair],
    evaluation: list[PreferencePair],
    rules: RuleSet,
    how: str,
    max_train: int | None,
    max_eval: int | None,
) -> tuple[list[PreferencePair], list[PreferencePair], SplitAccount]:
    """Training pairs without prompts of evaluation, evaluation pairs, and the account of both."""
    kept, findings = decontaminate(train, evaluation, rules)
    chosen, scored = _distinct_ids(kept)[:max_train], _distinct_ids(evaluation)[:max_eval]
    account = SplitAccount(
        how=how,
        train_pairs=len(chosen),
        eval_pairs=len(scored),
        train_pairs_dropped_for_eval_prompt=len(train) - len(kept),
        touched=findings,
    )
    return chosen, scored, account


def decontaminate(
    train: list[PreferencePair], evaluation: Iterable[PreferencePair], rules: RuleSet
) -> tuple[list[PreferencePair], list[Finding]]:
    """Training pairs without those whose prompt is in evaluation, and what was found."""
    index = PairIndex(answers=False)
    for pair in evaluation:
        index.add(pair)
    cleaner = Cleaner(replace(rules, on=rules.on & {"eval_prompt", "eval_prompt_near"}), index)
    for pair in train:
        cleaner.clean(pair)
    keep = cleaner.finish()
    return list(compress(train, keep)), in_reading_order(cleaner.findings)


def split_by_prompt(
    pairs: Iterable[PreferencePair], eval_fraction: float
) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """Training and evaluation pairs, without a common first question.

    The side follows from a hash of the dialogue's first user turn and nothing else: it stays when
    pairs are added, removed or reordered, and the turns of a dialogue stay together.
    """
    train: list[PreferencePair] = []
    evaluation: list[PreferencePair] = []
    for pair in pairs:
        position = int(prompt_key(first_user_turn(pair.prompt))[:15], 16) / 16**15
        (evaluation if position < eval_fraction else train).append(pair)
    return train, evaluation


def first_user_turn(prompt: Prompt) -> Prompt:
    """How a dialogue begins; its side of a split is decided by this."""
    if isinstance(prompt, str):
        return prompt
    users = [message for message in prompt if message["role"] == "user"]
    return tuple(users[:1]) or prompt
