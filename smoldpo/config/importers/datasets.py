"""Where a recipe's pairs come from, said in smoldpo's settings: data, subset, split, weights.

smoldpo has one subset and one split for all sources. Where a recipe's sources differ in them, each
is written to a file first, by `smoldpo data convert`, and the config names the files.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from smoldpo.config.importers.mapping import Draft, Rule, drop, keep, number, refuse

HELD_OUT = re.compile(r"(^|_)(test|eval|evaluation|dev|valid|validation|val)(_|$)")
LEAK = (
    "the recipe joins {held} to its training data and splits the whole again at random, so that "
    "pairs of one prompt can fall on both sides; here {held} is not trained on, and judges if it "
    "is the data's own test split"
)
SHARES = (
    "each weight is the share of that source which is used; smoldpo's data_weights are shares of "
    "the mix. The two agree where the sources are of one size"
)
FILES_FIRST = (
    "the sources differ in subset or split, which smoldpo has once for all of them: write the "
    "files first, with the commands below"
)


@dataclass(frozen=True)
class RecipeSource:
    """One source as the recipe names it."""

    name: str
    subset: str | None = None
    split: str | None = None
    weight: float | None = None

    @property
    def is_held_out(self) -> bool:
        """Whether its split's name is one of those that judge."""
        return self.split is not None and bool(HELD_OUT.search(self.split.lower()))

    @property
    def subset_and_split(self) -> tuple[str | None, str | None]:
        """Subset and split, where they are not what smoldpo takes by itself."""
        return self.subset, None if self.split == "train" else self.split


def text(value: Any) -> str | None:
    """A name; `default` is what the hub calls the only subset of a dataset."""
    return None if value in (None, "", "default") else str(value)


def items(value: Any) -> list[dict[str, Any]]:
    """The mappings in a list of sources."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def sources_of(
    listed: list[dict[str, Any]], name: str, subset: str, weight: str
) -> list[RecipeSource]:
    """The sources in a list, by what the recipe's tool calls their parts."""
    return [
        RecipeSource(
            str(item.get(name)),
            text(item.get(subset)),
            text(item.get("split")),
            number(item.get(weight)),
        )
        for item in listed
    ]


def inner_keys(draft: Draft, key: str, listed: list[dict[str, Any]], known: str) -> None:
    """The further keys of listed sources: columns are found by looking, others are not known."""
    for name in dict.fromkeys(str(name) for item in listed for name in item):
        if name == "columns":
            rule = drop(
                "the columns are found by looking at the rows, those for the chat template too"
            )
        else:
            rule = refuse("not known of a source; give the pairs as a file")
        if name not in f"{known} split".split():
            draft.decide(f"{key}.{name}", rule)


def set_sources(
    draft: Draft, key: str, sources: Sequence[RecipeSource], *, of_source: bool = False
) -> None:
    """Write data, data_subset, data_split and data_weights; test splits do not train.

    Args:
        of_source: whether a weight is the share of its source that is used; else it is a share of
            the mix.
    """
    sources = [source for source in sources if source.weight != 0]
    train = [source for source in sources if not source.is_held_out]
    held = [source for source in sources if source.is_held_out]
    if not train:  # a recipe that trains on a test split alone means it
        train, held = sources, []
    if not train:
        draft.decide(key, refuse("names no source of pairs: give --data"))
        return
    trained = {(source.name, source.subset) for source in train}
    joined = [source for source in held if (source.name, source.subset) in trained]
    remarks = [LEAK.format(held=split) for split in dict.fromkeys(str(s.split) for s in joined)]
    remarks += [
        f"{source.name} ({source.split}) is left out of training: its name says that it judges"
        for source in held
        if source not in joined
    ]
    more: dict[str, Any] = {}
    if len({source.subset_and_split for source in train}) == 1:
        data = [source.name for source in train]
        found = zip(("data_subset", "data_split"), train[0].subset_and_split, strict=True)
        more |= {setting: value for setting, value in found if value}
    else:
        data = [
            as_file(draft, source) if source.subset_and_split != (None, None) else source.name
            for source in train
        ]
        remarks.append(FILES_FIRST)
        if len(held) == 1:  # files have no test split of their own
            more["eval_data"] = as_file(draft, held[0])
    more |= _weights(train, of_source, remarks)
    draft.decide(key, keep("data", data, "; ".join(remarks), matters=bool(remarks), more=more))


def as_file(draft: Draft, source: RecipeSource) -> str:
    """A file that will hold this source's split; the command that writes it is put on the list."""
    subset, split = source.subset_and_split
    parts = filter(None, (source.name.rpartition("/")[2], subset, split))
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(parts)) + ".jsonl"
    command = ["smoldpo", "data", "convert", source.name, name]
    command += ["--subset", subset] if subset else []
    command += ["--split", source.split] if source.split else []
    if (line := shlex.join(command)) not in draft.commands:
        draft.commands.append(line)
    return name


def _weights(
    train: Sequence[RecipeSource], of_source: bool, remarks: list[str]
) -> dict[str, list[float]]:
    numbers = [1.0 if source.weight is None else source.weight for source in train]
    untold = all(source.weight is None for source in train)
    if untold or (of_source and all(weight == 1 for weight in numbers)):
        return {}
    if len(train) == 1:
        if of_source:
            remarks.append(f"takes {numbers[0]:g} of the source: set max_train_samples")
        return {}
    if of_source:
        remarks.append(SHARES)
    return {"data_weights": numbers}


def held_out_share(draft: Draft, key: str, value: Any) -> Rule:
    """A validation share, by smoldpo's eval_fraction; a number of rows has no counterpart."""
    share = number(value)
    if share is None or share < 0:
        return refuse("is no share and no number of rows: set eval_fraction")
    if share == 0:
        return drop("no validation set")
    if share < 1:
        why = "held out by prompts, where the data has no test split"
        return keep("eval_fraction", share, why)
    return refuse(
        "a number of rows; smoldpo holds out a share of the prompts where the data has no test "
        "split: set eval_fraction, and max_eval_samples for the number"
    )
