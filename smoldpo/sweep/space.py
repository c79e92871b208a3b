"""What a sweep tries: for each setting a list of values, or a range. No torch here."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from smoldpo.config import TrainConfig, explain
from smoldpo.errors import nearest

DIGITS = 4
"""Digits of a drawn number that count: more would only be harder to read."""


@dataclass(frozen=True)
class Choices:
    """Values of a setting, as the configuration reads them."""

    values: tuple[Any, ...]

    @property
    def size(self) -> int:
        return len(self.values)

    def at(self, share: float) -> Any:
        """The value at `share` (from 0 up to, but not, 1) of the list."""
        return self.values[int(share * len(self.values))]

    def as_plain(self) -> Any:
        """For sweep.json."""
        return list(self.values)


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    @property
    def size(self) -> int | None:
        """How many numbers it has; None for as good as endless."""
        return int(self.high - self.low) + 1 if self.whole else None

    def at(self, share: float) -> float | int:
        """The number at `share` (0 to 1) of the range, or of its logarithm."""
        if self.whole and not self.log:
            return min(int(self.high), int(self.low) + int(share * (self.high - self.low + 1)))
        if self.log:
            low, high = math.log(self.low), math.log(self.high)
            value = math.exp(low + share * (high - low))
        else:
            value = self.low + share * (self.high - self.low)
        value = round(value) if self.whole else float(f"{value:.{DIGITS}g}")
        value = min(self.high, max(self.low, value))
        return int(value) if self.whole else value

    def points(self, steps: int) -> tuple[float | int, ...]:
        """So many numbers, evenly spaced; of whole numbers as many as differ."""
        if self.whole and not self.log:
            spread = (self.high - self.low) / (steps - 1)
            return tuple(dict.fromkeys(round(self.low + k * spread) for k in range(steps)))
        return tuple(dict.fromkeys(self.at(k / (steps - 1)) for k in range(steps)))

    def as_plain(self) -> Any:
        """For sweep.json."""
        scale = "log" if self.log else "linear"
        return {"min": self.low, "max": self.high, "scale": scale}


Space = Mapping[str, Choices | Range]


class _RangeGiven(BaseModel):
    """A range as a sweep file has it."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    min: float
    max: float
    scale: Literal["linear", "log"] = "linear"
    steps: int | None = Field(None, ge=2, le=10_000)

    @model_validator(mode="after")
    def _in_order(self) -> _RangeGiven:
        if not self.min < self.max:
            raise ValueError(f"min {self.min:g} is not below max {self.max:g}")
        if self.scale == "log" and self.min <= 0:
            raise ValueError("a log scale needs a min above 0")
        return self


def size(space: Space) -> int | None:
    """How many different trials there are; None for as good as endless."""
    sizes = [part.size for part in space.values()]
    return None if None in sizes else math.prod(n for n in sizes if n is not None)


def every(space: Space) -> Iterator[dict[str, Any]]:
    """Each combination of a space of choices, the last setting going fastest."""
    lists = [part.values for part in space.values() if isinstance(part, Choices)]
    for values in itertools.product(*lists):
        yield dict(zip(space, values, strict=True))


def corners(space: Space) -> Iterator[dict[str, Any]]:
    """Each combination of choices and of the ends of ranges."""
    ends = {
        name: part if isinstance(part, Choices) else Choices((part.at(0), part.at(1)))
        for name, part in space.items()
    }
    return every(ends)


def read_part(name: str, given: Any, grid: bool) -> tuple[Choices | Range | None, list[str]]:
    """What a sweep file says of one setting, or its problems in words.

    Args:
        grid: of a range, points are needed.
    """
    if isinstance(given, list):
        return _choices(name, given)
    if isinstance(given, dict):
        return _range(name, given, grid)
    return None, [
        f"sweep: {name} is {given!r}; give a list of values, or {{min: 0.01, max: 1, scale: log}}"
    ]


def _choices(name: str, given: list[Any]) -> tuple[Choices | None, list[str]]:
    values, problems = [], []
    for value in given:
        read, problem = _read(name, value)
        problems += [f"sweep: {problem}"] if problem else []
        if not problem and read in values:
            problems.append(f"sweep: {name} has {value!r} twice")
        values.append(read)
    if not given:
        problems.append(f"sweep: {name} has no values")
    return (None if problems else Choices(tuple(values))), problems


def _read(name: str, value: Any) -> tuple[Any, str | None]:
    """A value as the configuration reads it, or what is wrong with it."""
    try:
        return getattr(TrainConfig(**{name: value}), name), None
    except ValidationError as error:
        return None, explain(error.errors()[0])


def _range(name: str, given: dict[Any, Any], grid: bool) -> tuple[Any, list[str]]:
    kinds = _number_kinds(name)
    if not kinds:
        return None, [f"sweep: {name} is no number, so it has no range; give a list of values"]
    known = _RangeGiven.model_fields
    unknown = [
        f"sweep: {name}: unknown key {key!r}{nearest(str(key), known)}; known: {', '.join(known)}"
        for key in given
        if key not in known
    ]
    if unknown:
        return None, unknown
    try:
        read = _RangeGiven(**given)
    except ValidationError as error:
        return None, [
            f"sweep: {name}: " + ".".join([*map(str, detail["loc"]), ""]).replace(".", " ")
            + detail["msg"].removeprefix("Value error, ").lower()
            for detail in error.errors()
        ]  # fmt: skip
    whole = "number" not in kinds
    if whole and not (read.min.is_integer() and read.max.is_integer()):
        return None, [f"sweep: {name} takes whole numbers; its min and max must be such"]
    found = Range(read.min, read.max, read.scale == "log", whole)
    problems = [f"sweep: {p}" for end in (0, 1) if (p := _read(name, found.at(end))[1])]
    if problems:
        return None, problems
    if read.steps:
        return Choices(found.points(read.steps)), []
    if grid and whole and not found.log:
        return Choices(tuple(range(int(found.low), int(found.high) + 1))), []
    if grid:
        return None, [f"sweep: {name}: a grid needs points: say steps: 5, or give a list of values"]
    return found, []


def _number_kinds(name: str) -> set[str]:
    """Of "integer" and "number", what the setting takes."""
    schema = TrainConfig.model_json_schema()["properties"][name]
    kinds = {part.get("type") for part in [schema, *schema.get("anyOf", ())]}
    return kinds & {"integer", "number"}
