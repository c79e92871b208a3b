"""Which layers and parameters train, as configured; without torch, for early checks.

An item of `train_layers` is one of

5        layer 5, counted from 0 (the lowest)
20-29    layers 20 to 29
last:4   the uppermost four
first:4  the lowest four
every:3  each third layer, counted down from the uppermost
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from smoldpo.utils.errors import UsageError

NUMBERS = re.compile(r"(\d+)(?:-(\d+))?")
COUNTED = re.compile(r"(first|last|every):(\d+)")
FORMS = "a layer (5), a range (20-29), last:4, first:4 or every:3"


@dataclass(frozen=True)
class LayerSelection:
    """What trains, in the settings of these names; models/freeze.py reads it.

    Attributes:
        freeze_layers: decoder layers that freeze from below, and the embeddings with them. None
            freezes five sixths of them, or none where `train` says what trains.
        train_layers: the decoder layers that train; nothing outside of them does.
        train: groups or patterns of parameter names; of what would train, the others freeze.
        freeze: groups or patterns of parameter names to freeze too.
    """

    freeze_layers: int | None = None
    train_layers: Sequence[str] = ()
    train: Sequence[str] = ()
    freeze: Sequence[str] = ()

    def frozen_layers(self, total: int) -> int:
        """How many of a model's `total` layers freeze from below by `freeze_layers`.

        Raises:
            UsageError: more than there are.
        """
        if self.train_layers:
            return 0
        if self.freeze_layers is None:
            return 0 if self.train else total * 5 // 6
        if self.freeze_layers > total:
            raise UsageError(
                f"freeze_layers is {self.freeze_layers}, but the model has {total} layers; "
                f"give at most {total}"
            )
        return self.freeze_layers

    def training_layers(self, total: int) -> set[int]:
        """The layers, from 0, that may train.

        Raises:
            UsageError: as `frozen_layers` and `chosen_layers`.
        """
        if self.train_layers:
            return chosen_layers(self.train_layers, total)
        return set(range(self.frozen_layers(total), total))


def complaint(item: str) -> str | None:
    """What is wrong with one item of `train_layers`, whatever the model; None: nothing."""
    numbers, counted = NUMBERS.fullmatch(item), COUNTED.fullmatch(item)
    if counted:
        return None if int(counted.group(2)) else f"train_layers: {item!r} chooses no layer"
    if not numbers:
        return f"train_layers: {item!r} is not {FORMS}"
    first, last = numbers.groups()
    if last is not None and int(last) < int(first):
        return f"train_layers: {item!r} ends before it begins; write {last}-{first}"
    return None


def chosen_layers(items: Sequence[str], total: int) -> set[int]:
    """The layers, from 0, that any of `items` means in a model of `total` layers.

    Raises:
        UsageError: an item in no known form, or one that means a layer that there is not.
    """
    chosen: set[int] = set()
    for item in items:
        problem = complaint(item)
        if problem is not None:
            raise UsageError(problem)
        layers = _layers_of(item, total)
        if not layers <= set(range(total)):
            raise UsageError(
                f"train_layers: {item!r} asks for more than the model's {total} layers "
                f"(0-{total - 1})"
            )
        chosen |= layers
    return chosen


def _layers_of(item: str, total: int) -> set[int]:
    counted = COUNTED.fullmatch(item)
    if counted is None:
        first, _, last = item.partition("-")
        return set(range(int(first), int(last or first) + 1))
    how, count = counted.group(1), int(counted.group(2))
    if how == "first":
        return set(range(count))
    if how == "last":
        return set(range(total - count, total))
    return set(range(total - 1, -1, -count))
