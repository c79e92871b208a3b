"""What a sweep tries: for each setting a list of values, or a range. No torch here.

A trial's settings are a pure function of the sweep and of the trials before it, so that a sweep
which goes on after an interruption makes the same trials.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from smoldpo.config.load import explain
from smoldpo.config.schema import TrainConfig
from smoldpo.utils.errors import UsageError, nearest

DIGITS = 4
"""Significant digits of a drawn number."""


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


def combinations(space: Space) -> Iterator[dict[str, Any]]:
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
    return combinations(ends)


def read_values(name: str, given: Any, grid: bool) -> tuple[Choices | Range | None, list[str]]:
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


Settings = dict[str, Any]
MAX_DRAWS = 200
"""Draws before a space counts as used up."""
MAX_PROPOSALS = 10
"""Proposals by optuna of settings that were tried already; then settings are drawn at random."""


@dataclass(frozen=True)
class PastTrial:
    """The settings of a trial that has ended, and its result, None where it failed."""

    settings: Settings
    value: float | None


Propose = Callable[[Sequence[PastTrial]], Settings]
"""The next trial's settings from those before it, in order."""


def grid(space: Space) -> list[Settings]:
    """Every combination."""
    return list(combinations(space))


def at_random(space: Space, trials: int, seed: int) -> list[Settings]:
    """So many trials, no two alike: drawn evenly, or evenly in the logarithm.

    More trials of the same seed begin with the same ones.
    """
    drawn: list[Settings] = []
    for number in range(trials):
        drawn.append(_untried(space, f"{seed} {number}", drawn))
    return drawn


def _untried(space: Space, seed: str, others: Sequence[Settings]) -> Settings:
    rng = random.Random(f"smoldpo sweep {seed}")
    for _ in range(MAX_DRAWS):
        settings = {name: part.at(rng.random()) for name, part in space.items()}
        if settings not in others:
            return settings
    if all(isinstance(part, Choices) for part in space.values()):
        left = [settings for settings in combinations(space) if settings not in others]
        if left:
            return rng.choice(left)
    return settings


def require_optuna() -> None:
    """Refuse method optuna where the package is missing.

    Raises:
        UsageError: it is.
    """
    if importlib.util.find_spec("optuna") is None:
        raise UsageError(
            "method optuna needs the package optuna: pip install 'smoldpo[optuna]', or take method "
            "random"
        )


def by_optuna(space: Space, seed: int) -> Propose:
    """Optuna's tree-structured Parzen estimator (Bergstra et al. 2011), maximising.

    For each trial a study is made anew from those before it, with a seed of the trial's own.
    """
    import optuna

    distributions = {name: _distribution(optuna, part) for name, part in space.items()}

    def propose(earlier: Sequence[PastTrial]) -> Settings:
        others = [trial.settings for trial in earlier]
        for attempt in range(MAX_PROPOSALS):
            number = random.Random(f"{seed} {len(earlier)} {attempt}").getrandbits(32)
            sampler = optuna.samplers.TPESampler(seed=number)
            with _quiet(optuna):
                study = optuna.create_study(direction="maximize", sampler=sampler)
            for trial in earlier:
                study.add_trial(_finished_trial(optuna, trial, space, distributions))
            asked = study.ask(distributions).params
            settings = {name: _value(space[name], asked[name]) for name in space}
            if settings not in others:
                return settings
        return _untried(space, f"{seed} {len(earlier)}", others)

    return propose


@contextlib.contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """No message for each study within the block; outside of it optuna's setting is the user's."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(verbosity)


def _distribution(optuna: Any, part: Choices | Range) -> Any:
    if isinstance(part, Choices):
        return optuna.distributions.CategoricalDistribution(range(len(part.values)))
    if part.whole:
        return optuna.distributions.IntDistribution(int(part.low), int(part.high), log=part.log)
    return optuna.distributions.FloatDistribution(part.low, part.high, log=part.log)


def _value(part: Choices | Range, asked: Any) -> Any:
    if isinstance(part, Choices):
        return part.values[asked]
    if part.whole:
        return int(asked)
    return min(part.high, max(part.low, float(f"{asked:.4g}")))


def _finished_trial(
    optuna: Any, trial: PastTrial, space: Space, distributions: dict[str, Any]
) -> Any:
    params = {
        name: part.values.index(trial.settings[name])
        if isinstance(part, Choices)
        else trial.settings[name]
        for name, part in space.items()
    }
    states = optuna.trial.TrialState
    return optuna.trial.create_trial(
        params=params,
        distributions=distributions,
        value=trial.value,
        state=states.FAIL if trial.value is None else states.COMPLETE,
    )


def settings_text(settings: Settings) -> str:
    """A trial's settings in one line."""
    return ", ".join(f"{name} {value_text(value)}" for name, value in settings.items())


def value_text(value: Any) -> str:
    """One value, as it would be written on the command line."""
    if isinstance(value, list):
        return ",".join(map(value_text, value)) or "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    return "none" if value is None else str(value)
