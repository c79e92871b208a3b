"""Where a recipe's pairs come from, said in smoldpo's settings: data, subset, split, weights.

smoldpo has one subset and one split for all sources. Where a recipe's sources differ in them, each is
written to a file first, by `smoldpo data convert`, and the config names the files.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from smoldpo.config.importers.mapping import Draft, number

HELD_OUT = re.compile(r"(^|_)(test|eval|evaluation|dev|valid|validation|val)(_|$)")
Weights = Literal["share of the source", "share of the mix"]

LEAK = (
    "the recipe joins {held} to its training data and splits the whole again at random, so that pairs of "
    "one prompt can fall on both sides; here {held} is not trained on, and judges if it is the data's own "
    "test split"
)
SHARES = (
    "each weight is the share of that source which is used; smoldpo's data_weights are shares of the mix. "
    "The two agree where the sources are of one size"
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


def set_sources(draft: Draft, key: str, sources: Sequence[RecipeSource], weights: Weights) -> None:
    """Write data, data_subset, data_split and data_weights; test splits do not train."""
    sources = [source for source in sources if source.weight != 0]
    train = [source for source in sources if not source.is_held_out]
    held = [source for source in sources if source.is_held_out]
    if not train:  # a recipe that trains on a test split alone means it
        train, held = sources, []
    if not train:
        draft.refuse(key, "names no source of pairs: give --data")
        return
    joined = dict.fromkeys(str(source.split) for source in held if _joined(source, train))
    remarks = [LEAK.format(held=split) for split in joined]
    remarks += [
        f"{source.name} ({source.split}) is left out of training: its name says that it judges"
        for source in held
        if not _joined(source, train)
    ]
    settings, how = _where(draft, train)
    remarks += how
    if how and len(held) == 1:  # files have no test split of their own
        settings["eval_data"] = as_file(draft, held[0])
    settings |= _weights(train, weights, remarks)
    data = settings.pop("data")
    draft.keep(key, "data", data, "; ".join(remarks), matters=bool(remarks), more=settings)


def _joined(held: RecipeSource, train: Sequence[RecipeSource]) -> bool:
    return any((held.name, held.subset) == (other.name, other.subset) for other in train)


def _where(draft: Draft, train: Sequence[RecipeSource]) -> tuple[dict[str, Any], list[str]]:
    """One subset and split for all, or files for those that need their own."""
    places = {(source.subset, _split(source)) for source in train}
    if len(places) == 1:
        subset, split = places.pop()
        settings: dict[str, Any] = {"data": [source.name for source in train]}
        settings |= {"data_subset": subset} if subset else {}
        settings |= {"data_split": split} if split else {}
        return settings, []
    names = [source.name if _plain(source) else as_file(draft, source) for source in train]
    return {"data": names}, [
        "the sources differ in subset or split, which smoldpo has once for all of them: write the files "
        "first, with the commands below"
    ]


def as_file(draft: Draft, source: RecipeSource) -> str:
    """A file that will hold this source's split; the command that writes it is put on the list."""
    parts = [source.name.rpartition("/")[2], source.subset, _split(source)]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(part for part in parts if part)) + ".jsonl"
    command = ["smoldpo", "data", "convert", source.name, name]
    command += ["--subset", source.subset] if source.subset else []
    command += ["--split", source.split] if source.split else []
    line = shlex.join(command)
    if line not in draft.commands:
        draft.commands.append(line)
    return name


def _plain(source: RecipeSource) -> bool:
    return source.subset is None and _split(source) is None


def _split(source: RecipeSource) -> str | None:
    """`train` is what smoldpo takes by itself, of a plain file too, whatever its name."""
    return None if source.split == "train" else source.split


def _weights(
    train: Sequence[RecipeSource], meaning: Weights, remarks: list[str]
) -> dict[str, list[float]]:
    given = [source.weight for source in train]
    if all(weight is None for weight in given):
        return {}
    numbers = [1.0 if weight is None else weight for weight in given]
    if meaning == "share of the source" and all(weight == 1 for weight in numbers):
        return {}
    if len(train) == 1:
        if numbers[0] != 1 and meaning == "share of the source":
            remarks.append(f"takes {numbers[0]:g} of the source: set max_train_samples")
        return {}
    if meaning == "share of the source":
        remarks.append(SHARES)
    return {"data_weights": numbers}


def set_held_out_share(draft: Draft, key: str, value: Any) -> None:
    """A validation share, by smoldpo's eval_fraction; a number of rows has no counterpart."""
    share = number(value)
    if share is None or share < 0:
        draft.refuse(key, "is no share and no number of rows: set eval_fraction")
    elif share == 0:
        draft.drop(key, "no validation set")
    elif share < 1:
        draft.keep(
            key, "eval_fraction", share, "held out by prompts, where the data has no test split"
        )
    else:
        draft.refuse(
            key,
            "a number of rows; smoldpo holds out a share of the prompts where the data has no test split: "
            "set eval_fraction, and max_eval_samples for the number",
        )
