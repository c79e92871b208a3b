"""Which settings each trial has. A trial's are a pure function of the sweep and of the trials before it,

so that a sweep which goes on after an interruption makes the same ones.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from smoldpo.errors import UsageError
from smoldpo.sweep.space import Choices, Range, Space, every

Settings = dict[str, Any]
TRIES = 200
"""Draws before a space counts as used up."""
TRIES_OF_OPTUNA = 10
"""Its proposals that are no new ones; then one is drawn at random."""


@dataclass(frozen=True)
class Earlier:
    """A trial that has ended: its settings, and its result, None where it failed."""

    settings: Settings
    value: float | None


Propose = Callable[[Sequence[Earlier]], Settings]
"""The next trial's settings from those before it, in order."""


def grid(space: Space) -> list[Settings]:
    """Every combination."""
    return list(every(space))


def at_random(space: Space, trials: int, seed: int) -> list[Settings]:
    """So many trials, no two alike: drawn evenly, or evenly in the logarithm.

    More trials of the same seed begin with the same ones.
    """
    drawn: list[Settings] = []
    for number in range(trials):
        drawn.append(_new(space, f"{seed} {number}", drawn))
    return drawn


def _new(space: Space, seed: str, others: Sequence[Settings]) -> Settings:
    rng = random.Random(f"smoldpo sweep {seed}")
    for _ in range(TRIES):
        settings = {name: part.at(rng.random()) for name, part in space.items()}
        if settings not in others:
            return settings
    if all(isinstance(part, Choices) for part in space.values()):
        left = [settings for settings in every(space) if settings not in others]
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
            "method optuna needs the package optuna: pip install 'smoldpo[optuna]', or take method random"
        )


def by_optuna(space: Space, seed: int) -> Propose:
    """Optuna's tree-structured Parzen estimator (Bergstra et al. 2011), maximising.

    For each trial a study is made anew from those before it, with a seed of the trial's own.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {name: _distribution(optuna, part) for name, part in space.items()}

    def propose(earlier: Sequence[Earlier]) -> Settings:
        others = [trial.settings for trial in earlier]
        for attempt in range(TRIES_OF_OPTUNA):
            number = random.Random(f"{seed} {len(earlier)} {attempt}").getrandbits(32)
            study = optuna.create_study(
                direction="maximize", sampler=optuna.samplers.TPESampler(seed=number)
            )
            for trial in earlier:
                study.add_trial(_told(optuna, trial, space, distributions))
            asked = study.ask(distributions).params
            settings = {name: _value(space[name], asked[name]) for name in space}
            if settings not in others:
                return settings
        return _new(space, f"{seed} {len(earlier)}", others)

    return propose


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


def _told(optuna: Any, trial: Earlier, space: Space, distributions: dict[str, Any]) -> Any:
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
