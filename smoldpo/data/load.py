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

from smoldpo.data.account import (
    DataAccount,
    Finding,
    SourceAccount,
    SplitAccount,
    in_reading_order,
    loud,
)
from smoldpo.data.cleaning.cleaner import Cleaner, RuleSet, choose_rules, evaluation_rules
from smoldpo.data.cleaning.duplicates import PairIndex, side_hashes
from smoldpo.data.cleaning.text import prompt_key
from smoldpo.data.schemas.reader import SplitReader
from smoldpo.data.sources import Source, Split, mix, open_source
from smoldpo.types import PreferencePair, Prompt
from smoldpo.utils.errors import DataError, UsageError

ALONE = "; answers that nobody compared train by themselves with --loss-type kto"


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
    thumbs: bool = False,
) -> LoadedPairs:
    """Read and clean one split.

    Args:
        thumbs: whether unpaired rows come one by one (`read_thumb`), and not as pairs.

    Raises:
        DataError: a source without rows, a schema that is not known, a row that cannot be read, or
            nothing left after cleaning.
    """
    (loaded,) = load_splits(
        [(split, name)], format=format, columns=columns, rules=rules, thumbs=thumbs
    )
    return loaded


def load_splits(
    named: Sequence[tuple[Split, str]],
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    rules: RuleSet | None = None,
    thumbs: bool = False,
) -> list[LoadedPairs]:
    """Read and clean several splits as one: rules that compare rows see those of all of them.

    A split all of whose pairs stand in others before it is left with none.

    Raises:
        DataError: as `load_split`.
    """
    cleaner, cleaned, parts = Cleaner(rules), list[PreferencePair](), []
    for split, name in named:
        reader = SplitReader(split, format, columns, thumbs)
        before = len(cleaned), len(cleaner.findings)
        cleaned += (pair for pair in map(cleaner.clean, reader) if pair is not None)
        found = reader.findings + cleaner.findings[before[1] :]
        parts.append((name, reader, before[0], found))
    single = len(cleaner.findings)
    keep = cleaner.finish()
    ends = [*(start for _, _, start, _ in parts[1:]), len(cleaned)]
    loaded = []
    for (name, reader, start, found), end in zip(parts, ends, strict=True):
        compared = [
            finding
            for index, finding in zip(cleaner.compared, cleaner.findings[single:], strict=True)
            if start <= index < end
        ]
        pairs = _distinct_ids(compress(cleaned[start:end], keep[start:end]))
        account = SourceAccount.of(
            in_reading_order(found + compared),
            source=name,
            format=", ".join(reader.formats),
            rows_read=reader.rows_read,
            rows_kept=len(pairs),
            columns_not_read=list(reader.lost),
            rows_with_lost=loud(reader.lost),
            files_left_out=list(reader.split.left_out),
        )
        elsewhere = end > start and len(named) > 1
        if not pairs and not elsewhere:
            reasons = ", ".join(f"{n} {rule}" for rule, n in account.dropped.items())
            rows = reader.rows_read
            hint = ALONE if "unpaired" in account.dropped else ""
            raise DataError(f"{name}: no pair is left of {rows} rows (dropped: {reasons}){hint}")
        loaded.append(LoadedPairs(pairs, account))
    return loaded


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
    thumbs: bool = False,
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
    name = source.label(chosen)
    return load_split(chosen, name, format=format, columns=columns, rules=rules, thumbs=thumbs)


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


def load_training_data(data: str, **options: Any) -> TrainingData:
    """The pairs of one source: `load_mixture` of one, with the same options."""
    return load_mixture([data], (), 0, **options)


def load_mixture(
    sources: Sequence[str],
    weights: Sequence[float],
    seed: int,
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
    thumbs: bool = False,
) -> TrainingData:
    """Load pairs of one source or several and hold some out: `eval_data`, else each source's test
    split, else by prompt hash.

    The sources are cleaned as one, so that a pair that stands in two of them is learnt once.
    Training pairs whose prompt is in evaluation too are left out and counted, unless `rules_off`
    names eval_prompt; nearly the same prompts are counted. `columns` holds for `eval_data` too
    where it has them; `format` does not, its schema is found by looking at it. The training pairs
    are mixed by weight; without weights each source counts by its size, and every pair is used.
    With `thumbs` unpaired rows come one by one.

    Raises:
        UsageError, DataError: as `open_source`, `choose_rules`, `load_splits` and `mix`; or no
            pairs are left to train or to evaluate on.
    """
    rules, scored = choose_rules(rules_off), evaluation_rules(rules_off)
    opened = [open_source(name, subset) for name in sources]
    parts = [source.split(split) for source in opened]
    named = [(part, source.label(part)) for part, source in zip(parts, opened, strict=True)]
    how_read: dict[str, Any] = {"columns": columns, "thumbs": thumbs}
    loaded = load_splits(named, format=format, rules=rules, **how_read)
    held_out: list[LoadedPairs | None] = [None] * len(sources)
    if eval_data is not None:
        mapped = columns_present(columns, eval_data)
        given = load_pairs(eval_data, columns=mapped, rules_off=rules_off, thumbs=thumbs)
        held_out = [given] * len(sources)
    elif eval_fraction > 0:
        for at, (source, part) in enumerate(zip(opened, parts, strict=True)):
            if (test := source.test) is not None and test is not part:
                name = source.label(test)
                held_out[at] = load_split(test, name, format=format, rules=scored, **how_read)
    divided = []
    for source, pairs, held in zip(opened, loaded, held_out, strict=True):
        account = DataAccount(train=pairs.account)
        if held is not None:
            train, evaluation, account.eval = pairs.pairs, held.pairs, held.account
        else:
            train, evaluation = split_by_prompt(pairs.pairs, eval_fraction)
        how = _how(source, held, eval_data, eval_fraction)
        limits = (max_train, max_eval) if len(sources) == 1 else (None, None)
        kept, evaluation, split_account = _divide(train, evaluation, rules, how, *limits)
        near = sum(finding.rule == "eval_prompt_near" for finding in split_account.touched)
        split_account.train_pairs_near_eval_prompt = near
        account.split = split_account
        divided.append(TrainingData(kept, evaluation, account))
    data = divided[0]
    if len(sources) > 1:
        data = _mixed(divided, weights, seed, rules, eval_data, max_train, max_eval)
    if not data.train or (not data.eval and (eval_fraction > 0 or eval_data)):
        raise UsageError(_nothing_left(", ".join(sources), loaded, data, eval_data, eval_fraction))
    return data


def _how(
    source: Source, held: LoadedPairs | None, eval_data: str | None, eval_fraction: float
) -> str:
    """Where a source's evaluation pairs come from, in words."""
    if held is not None and source.test is not None and eval_data is None:
        return f"the source's own split {source.test.name!r}"
    if held is not None:
        return f"pairs of {held.account.source}"
    return f"about {eval_fraction:.0%} of the prompts, by hash" if eval_fraction > 0 else "none"


def _mixed(
    parts: list[TrainingData],
    weights: Sequence[float],
    seed: int,
    rules: RuleSet,
    eval_data: str | None,
    max_train: int | None,
    max_eval: int | None,
) -> TrainingData:
    """Several sources' pairs as one set, the training pairs interleaved by weight."""
    accounts = [part.account for part in parts]
    every = [pair for part in parts for pair in part.train]
    for part in parts:
        if weights and not part.train and part.account.train is not None:
            raise UsageError(
                f"{part.account.train.source}: every pair of it stands in another source, or in "
                "evaluation, so that no weight can be kept; leave it out, or the weights"
            )
    mixed = list(mix([part.train for part in parts], weights, seed)) if weights else every
    held_out, how = _judged_once(parts, rules), "each source's own"
    if eval_data and accounts[0].split is not None:
        held_out, how = parts[0].eval, accounts[0].split.how
    train, evaluation, divided = _divide(mixed, held_out, rules, how, max_train, max_eval)
    divided.train_pairs_left_by_weight = len(every) - len(mixed)
    return TrainingData(train, evaluation, DataAccount(sources=accounts, split=divided))


def _judged_once(parts: list[TrainingData], rules: RuleSet) -> list[PreferencePair]:
    """The evaluation pairs of every source but for those that an earlier source has too."""
    if "exact_duplicate" not in rules:
        return [pair for part in parts for pair in part.eval]
    seen: set[tuple[int, int]] = set()
    held_out: list[PreferencePair] = []
    for part in parts:
        hashes = [side_hashes(pair) for pair in part.eval]
        held_out += (pair for pair, own in zip(part.eval, hashes, strict=True) if own not in seen)
        seen.update(hashes)
    return held_out


def _nothing_left(
    names: str,
    loaded: list[LoadedPairs],
    data: TrainingData,
    eval_data: str | None,
    eval_fraction: float,
) -> str:
    """Why there are no pairs to train or to evaluate on, and what to do."""
    pairs = [pair for each in loaded for pair in each.pairs]
    found = f"{len(data.train)} pairs to train on and {len(data.eval)} to evaluate on"
    if eval_data is not None and data.eval and pairs:
        return (
            f"{names}: all {len(pairs):,} training pairs were left out, because their prompts "
            "stand in --eval-data too (rule eval_prompt); give other pairs, or turn the rule off "
            "with --rules-off eval_prompt, and evaluate on what was trained on"
        )
    if len({prompt_key(first_user_turn(pair.prompt)) for pair in pairs}) == 1 and len(pairs) > 1:
        return (
            f"{names}: all {len(pairs):,} pairs have one prompt, or begin with one question, so "
            f"that they cannot be parted into training and evaluation ({found}); train on all of "
            "them with --eval-fraction 0, or give others to evaluate on with --eval-data"
        )
    return f"{names}: {found}; give more pairs, another --eval-fraction, or --eval-data"


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
