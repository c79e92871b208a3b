"""A sweep's description: settings that every trial has, settings that are tried, and how.

sweep:                              what is tried
  beta: [0.05, 0.1, 0.3]
  learning_rate: {min: 1e-5, max: 1e-3, scale: log}
method: random                      and the sweep's own settings (SweepSettings)
trials: 20
freeze_layers: 25                   every other key: a setting of train, for all trials
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from smoldpo.config.load import (
    build_config,
    load_yaml,
    parse_arguments,
    read_fields,
    secrets_in,
)
from smoldpo.config.losses import is_unpaired, needs_reference
from smoldpo.config.schema import TrainConfig
from smoldpo.sweep.space import (
    Choices,
    Range,
    Space,
    at_random,
    corners,
    grid,
    read_values,
    require_optuna,
    settings_text,
    size,
)
from smoldpo.training.fingerprint import FREE_SETTINGS, default_of
from smoldpo.utils.errors import ConfigError, UsageError, nearest

SPLIT_SETTINGS = {
    "data", "data_weights", "format", "columns", "rules_off", "data_subset", "data_split",
    "eval_data", "eval_fraction", "max_eval_samples",
}  # fmt: skip
"""Settings that decide which pairs are held out: equal for all trials, to compare them."""
MAX_CHECKED = 2000
"""Combinations checked before anything runs, where a method chooses trials as it goes."""
MAX_PROBLEMS_SHOWN = 20


class SweepSettings(BaseModel):
    """What a sweep file says besides `sweep` and the settings of train."""

    model_config = ConfigDict(extra="forbid", validate_default=True)

    method: Literal["grid", "random", "optuna"] = Field(
        "grid", description="every combination, drawn at random, or proposed from what came before"
    )
    trials: int | None = Field(
        None, gt=0, le=1000, description="how many, of random and optuna; a grid has what it has"
    )
    metric: Literal["reward", "logp", "logp_per_token"] = Field(
        "reward",
        description="accuracy on the validation pairs by which trials are ranked: implicit reward, "
        "log-probability, or that per token",
    )
    final_fraction: float = Field(
        0.5,
        gt=0,
        lt=1,
        description=(
            "share of the held-out prompts that no trial sees: the winner alone is measured there"
        ),
    )
    sampler_seed: int = Field(0, ge=0, description="of random and optuna: which trials are made")


@dataclass(frozen=True)
class SweepSpec:
    """A checked sweep."""

    base: dict[str, Any]
    """Settings of train that all trials share, as they were given."""
    space: Space
    settings: SweepSettings
    name: str
    """Of the file, without its suffix."""

    @property
    def common(self) -> TrainConfig:
        """The settings of all trials; of what is tried, the defaults."""
        return TrainConfig(**self.base)

    @property
    def trials(self) -> int:
        """How many trials there are."""
        return self.settings.trials or size(self.space) or 0

    def config(self, settings: dict[str, Any]) -> TrainConfig:
        """The configuration of one trial, checked; the pairs are not the sweep's yet."""
        return build_config(self.base | settings)

    def planned(self) -> list[dict[str, Any]] | None:
        """The settings of all trials, where they are known beforehand."""
        if self.settings.method == "grid":
            return grid(self.space)
        if self.settings.method == "random":
            return at_random(self.space, self.trials, self.settings.sampler_seed)
        return None

    def on_day(self, day: str) -> SweepSpec:
        """The same sweep, in which chat templates take `day` for today unless it says which."""
        if self.common.template_date or "template_date" in self.space:
            return self
        return replace(self, base=self.base | {"template_date": day})

    def as_plain(self) -> dict[str, Any]:
        """The whole sweep, every default written out; what it is told apart by."""
        common = self.common.model_dump()
        return {
            **{name: value for name, value in common.items() if name not in self.space},
            "sweep": {name: part.as_plain() for name, part in self.space.items()},
            **self.settings.model_dump(),
            "name": self.name,
        }

    def as_yaml(self) -> str:
        """The sweep as a file that is read back to the same."""
        plain = {key: value for key, value in self.as_plain().items() if key != "name"}
        return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What keeps a sweep from going on under another description, in words."""
    return [
        f"{key} is {now.get(key)!r}, and was {then.get(key)!r} when it began"
        for key in dict.fromkeys([*then, *now])
        if key not in {*FREE_SETTINGS, "name"}
        and then.get(key, default_of(key)) != now.get(key, default_of(key))
    ]


def spec_from_arguments(arguments: Sequence[str]) -> SweepSpec:
    """The sweep of a command line: a YAML file, and settings over it.

    Raises:
        UsageError: no file, or one that cannot be read.
        ConfigError: every problem of the sweep and of its trials at once.
    """
    path, given, problems = parse_arguments(arguments)
    if path is None:
        raise UsageError("sweep needs a file that says what is tried, such as examples/sweep.yaml")
    written = {str(key).replace("-", "_"): value for key, value in load_yaml(path).items()}
    if "sweep" in given:
        problems.append("what is tried stands in the file under `sweep:`, not on the command line")
        del given["sweep"]
    return build_spec(written | given, path.stem, problems)


def build_spec(plain: dict[str, Any], name: str, problems: Iterable[str] = ()) -> SweepSpec:
    """A checked sweep from plain values.

    Raises:
        ConfigError: with every problem at once, those of the trials among them.
        UsageError: optuna is asked for and not installed.
    """
    problems = list(problems)
    plain = dict(plain)
    tried = plain.pop("sweep", None)
    own = {key: plain.pop(key) for key in list(plain) if key in SweepSettings.model_fields}
    settings, found = read_fields(SweepSettings, own)
    problems += found
    space = _space(tried, plain, settings, problems)
    problems += secrets_in(plain, "sweep")
    problems += read_fields(TrainConfig, plain, [*SweepSettings.model_fields, "sweep"])[1]
    if settings is not None and settings.method == "optuna":
        require_optuna()
    if problems:
        raise ConfigError(problems)
    assert settings is not None
    spec = SweepSpec(plain, space, settings, name)
    problems = _held_out_problems(spec) + _size_problems(spec)
    if not problems:
        if settings.method != "grid" and settings.trials is None:
            settings.trials = min(20, size(space) or 20)
        problems = _trial_problems(spec)
    if problems:
        raise ConfigError(problems)
    return spec


def _space(
    tried: Any, base: dict[str, Any], settings: SweepSettings | None, problems: list[str]
) -> dict[str, Choices | Range]:
    space: dict[str, Choices | Range] = {}
    if not isinstance(tried, dict) or not tried:
        problems.append("sweep: says nothing; name settings there, such as beta: [0.05, 0.1, 0.3]")
        return space
    known = TrainConfig.model_fields
    for key, given in tried.items():
        name = str(key).replace("-", "_")
        if name not in known:
            problems.append(f"sweep: unknown key {key!r}{nearest(name, known)}")
        elif name in SPLIT_SETTINGS:
            problems.append(
                f"sweep: {name} decides which pairs are held out, which is the same for all trials"
            )
        elif name in FREE_SETTINGS:
            problems.append(
                f"sweep: {name} has no say in what is trained, so there is nothing to try"
            )
        elif name in base:
            problems.append(
                f"{name} is given for all trials, and under sweep as well; leave out one"
            )
        else:
            grid = settings is None or settings.method == "grid"
            part, wrong = read_values(name, given, grid)
            problems += wrong
            if part is not None:
                space[name] = part
    return space


def _held_out_problems(spec: SweepSpec) -> list[str]:
    common, problems = spec.common, []
    if common.eval_data is None and common.eval_fraction == 0:
        problems = ["trials are ranked on held-out pairs: set eval_data, or eval_fraction above 0"]
    if "eval_prompt" in common.rules_off:
        problems.append(
            "rules_off eval_prompt would leave prompts of the final pairs among those trained on"
        )
    return problems


def _size_problems(spec: SweepSpec) -> list[str]:
    most, asked = size(spec.space), spec.settings.trials
    if spec.settings.method == "grid":
        if asked is not None:
            return [f"trials is for random and optuna; this grid has {most:,} trials"]
        if most is not None and most > 1000:
            return [
                f"this grid has {most:,} trials, of 1,000 at most; take method random, and trials"
            ]
    elif asked and most is not None and asked > most:
        return [
            f"trials is {asked}, and there are {most:,} different ones; take fewer, or method grid"
        ]
    return []


def _trial_problems(spec: SweepSpec) -> list[str]:
    """What is wrong with trials, each problem once, with its first trial and their number."""
    planned = spec.planned()
    found: Counter[str] = Counter()
    first: dict[str, str] = {}
    for settings in planned or islice(corners(spec.space), MAX_CHECKED):
        for problem in _problems_of(spec, settings):
            found[problem] += 1
            first.setdefault(problem, settings_text(settings))
    what = "trials" if planned else "of the combinations that were looked at"
    common = _problems_of(spec, {})
    problems = [
        problem if problem in common else
        f"{problem} (with {first[problem]}{f'; {times} {what}' if times > 1 else ''})"
        for problem, times in found.items()
    ]  # fmt: skip
    if more := problems[MAX_PROBLEMS_SHOWN:]:
        problems = [*problems[:MAX_PROBLEMS_SHOWN], f"and {len(more)} more"]
    return problems


def _problems_of(spec: SweepSpec, settings: dict[str, Any]) -> list[str]:
    try:
        config = spec.config(settings)
    except ConfigError as error:
        return error.problems
    if config.freeze_layers == "auto":
        return [
            "freeze_layers auto would be another depth for each trial; see smoldpo plan, and give "
            "a number"
        ]
    if is_unpaired(config.loss_type):
        return [
            f"loss_type {','.join(config.loss_type)} takes single answers, which a sweep does not "
            "hold out yet; run its settings one by one with smoldpo train"
        ]
    if spec.settings.metric == "reward" and not needs_reference(config.loss_type):
        return [
            f"metric reward needs a reference, and loss_type {','.join(config.loss_type)} has "
            "none; take metric: logp_per_token"
        ]
    return []


def describe_sweep(write: Any) -> None:
    """Write every key of a sweep file that is no setting of train, for --help."""
    write(
        "Sweep:\n  sweep\n      what is tried: for each setting a list of values, or "
        "{min: 1e-5, max: 1e-3, scale: log}\n      (steps: 5 makes points of a range)"
    )
    for name, field in SweepSettings.model_fields.items():
        default = "" if field.default is None else f" [default: {field.default}]"
        write(f"  --{name.replace('_', '-')}\n      {field.description}{default}")


def default_folder(name: str) -> Path:
    """Where a sweep goes that says nothing of it: always the same, so that it is found again."""
    return Path("runs") / f"sweep-{name}"
