"""From a source's name to clean pairs, and to a train and an evaluation side without a common prompt."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from smoldpo.data.cleaning import Touched, check_pair
from smoldpo.data.formats import READERS, Unreadable, detect
from smoldpo.data.sources import Split, open_source
from smoldpo.errors import DataError, UsageError
from smoldpo.types import PreferencePair, Prompt


@dataclass
class LoadedPairs:
    """Clean pairs, and an account of every row that was read."""

    name: str
    format: str
    pairs: list[PreferencePair]
    rows_read: int = 0
    touched: list[Touched] = field(default_factory=list)

    def account(self) -> dict[str, Any]:
        """Counts and reasons, for data.json."""
        return {
            "source": self.name,
            "format": self.format,
            "rows_read": self.rows_read,
            "rows_kept": len(self.pairs),
            "dropped": dict(Counter(item.rule for item in self.touched)),
            "touched": [item.as_dict() for item in self.touched],
        }


def load_split(split: Split, name: str) -> LoadedPairs:
    """Read and clean one split.

    Raises:
        DataError: a source without rows, a schema that is not known, a row that cannot be read, or
            nothing left after cleaning.
    """
    loaded = LoadedPairs(name, "", [])
    seen_ids: Counter[str] = Counter()
    for row in split.rows():
        loaded.rows_read += 1
        loaded.format = loaded.format or detect(row)
        try:
            pair = READERS[loaded.format](row)
        except Unreadable as reason:
            loaded.touched.append(Touched(row.file, row.row, reason.rule, "drop", str(reason)))
            continue
        dropped = check_pair(pair)
        if dropped is not None:
            loaded.touched.append(dropped)
            continue
        seen_ids[pair.id] += 1
        if seen_ids[pair.id] > 1:
            pair = replace(pair, id=f"{pair.id}-{seen_ids[pair.id]}")
        loaded.pairs.append(pair)
    if not loaded.pairs:
        reasons = ", ".join(f"{n} {rule}" for rule, n in loaded.account()["dropped"].items())
        raise DataError(f"{name}: no pair is left of {loaded.rows_read} rows (dropped: {reasons})")
    return loaded


def load_pairs(name: str, *, subset: str | None = None, split: str | None = None) -> LoadedPairs:
    """The clean pairs of a source: the split asked for, else its test split, else its only one.

    This is what evaluation reads: where a source holds pairs out, those are the ones to look at.
    """
    source = open_source(name, subset)
    chosen = source.split(split) if split else (source.test or source.train)
    return load_split(chosen, _label(name, chosen, source.splits))


def _label(name: str, split: Split, splits: tuple[Split, ...]) -> str:
    return f"{name} ({split.name})" if len(splits) > 1 else name


@dataclass
class TrainingData:
    """What to learn from, what to be judged by, and the account of both."""

    train: list[PreferencePair]
    eval: list[PreferencePair]
    account: dict[str, Any]


def load_training_data(
    data: str,
    *,
    subset: str | None = None,
    split: str | None = None,
    eval_data: str | None = None,
    eval_fraction: float = 0.2,
    max_train: int | None = None,
    max_eval: int | None = None,
) -> TrainingData:
    """Load pairs and hold some out: `eval_data`, else the source's own test split, else by prompt hash.

    Training pairs whose prompt also stands on the evaluation side are left out and counted.

    Raises:
        UsageError, DataError: as `open_source` and `load_split`; or a side is left without pairs.
    """
    source = open_source(data, subset)
    part = source.split(split) if split else source.train
    loaded = load_split(part, _label(data, part, source.splits))
    account: dict[str, Any] = {"train": loaded.account()}
    if eval_data is not None:
        held_out = load_pairs(eval_data)
        how = f"pairs of {held_out.name}"
    elif eval_fraction == 0:
        held_out, how = None, "none"
    elif source.test is not None and source.test is not part:
        held_out = load_split(source.test, _label(data, source.test, source.splits))
        how = f"the source's own split {source.test.name!r}"
    else:
        held_out = None
        how = f"about {eval_fraction:.0%} of the prompts, by hash"
    if held_out is not None:
        evaluation, train = held_out.pairs, loaded.pairs
        account["eval"] = held_out.account()
    else:
        train, evaluation = split_by_prompt(loaded.pairs, eval_fraction)
    judged = {prompt_key(pair.prompt) for pair in evaluation}
    apart = [pair for pair in train if prompt_key(pair.prompt) not in judged]
    kept, evaluation = apart[:max_train], evaluation[:max_eval]
    account["split"] = {
        "how": how,
        "train_pairs": len(kept),
        "eval_pairs": len(evaluation),
        "train_pairs_dropped_for_eval_prompt": len(train) - len(apart),
    }
    if not kept or (not evaluation and (eval_fraction > 0 or eval_data)):
        raise UsageError(
            f"{data}: {len(kept)} pairs to train on and {len(evaluation)} to evaluate on; "
            "give more pairs, another --eval-fraction, or --eval-data"
        )
    return TrainingData(kept, evaluation, account)


def prompt_key(prompt: Prompt) -> str:
    """What makes two prompts the same: SHA-256 (hex) of their text, case and spacing aside."""
    if isinstance(prompt, str):
        turns = [["user", _plain(prompt)]]
    else:
        turns = [[m["role"], _plain(m.get("content") or "")] for m in prompt if m["role"] != "system"]
    return hashlib.sha256(json.dumps(turns).encode()).hexdigest()


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def split_by_prompt(
    pairs: Iterable[PreferencePair], eval_fraction: float
) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """Train and evaluation pairs, without a common opening.

    The side follows from a hash of how the dialogue opens (its first user turn) and nothing else: it
    stays when pairs are added, removed or reordered, and later turns of one dialogue stay together.
    """
    train: list[PreferencePair] = []
    evaluation: list[PreferencePair] = []
    for pair in pairs:
        share = int(prompt_key(_opening(pair.prompt))[:15], 16) / 16**15
        (evaluation if share < eval_fraction else train).append(pair)
    return train, evaluation


def _opening(prompt: Prompt) -> Prompt:
    if isinstance(prompt, str):
        return prompt
    users = [message for message in prompt if message["role"] == "user"]
    return tuple(users[:1]) or prompt
