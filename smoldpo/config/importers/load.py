"""From another trainer's YAML to a checked configuration, with an account of every key."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from smoldpo.config.importers import axolotl, hf_trainer, llama_factory, trl
from smoldpo.config.importers.losses import METHODS, method_of, set_loss
from smoldpo.config.importers.mapping import (
    DEFAULT,
    STATUSES,
    UNSUPPORTED,
    Draft,
    Entry,
    default_of,
    find,
    one_line,
    refuse,
)
from smoldpo.config.load import build_config, load_yaml
from smoldpo.config.schema import TrainConfig
from smoldpo.utils.errors import ConfigError, UsageError

DIALECTS = {
    "llama-factory": llama_factory.DIALECT,
    "axolotl": axolotl.DIALECT,
    "alignment-handbook": trl.HANDBOOK,
    "trl": trl.DIALECT,
}
"""In the order in which a draw is decided: TRL's keys stand in the others' recipes too."""


@dataclass(frozen=True)
class Imported:
    """The configuration, and what became of the recipe."""

    source: str
    dialect: str
    config: TrainConfig
    settings: dict[str, Any]
    entries: tuple[Entry, ...]
    notes: tuple[str, ...]
    commands: tuple[str, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Keys by status."""
        found = Counter(entry.status for entry in self.entries)
        return {status: found[status] for status in STATUSES if found[status]}

    @property
    def differences(self) -> list[str]:
        """Why this run is not the recipe's, a sentence each."""
        of_keys = [f"{entry.key}: {entry.reason}" for entry in self.entries if entry.matters]
        return of_keys + list(self.notes)

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            "source": self.source,
            "from": self.dialect,
            "keys": [vars(entry) for entry in self.entries],
            "counts": self.counts,
            "differences": self.differences,
            "run_first": list(self.commands),
            "config": self.settings,
        }

    def as_yaml(self) -> str:
        """The settings that the recipe decides, under a head that names it and what differs."""
        title = DIALECTS[self.dialect].title
        head = [f"Imported from {self.source} ({title}) by smoldpo config import."]
        if self.commands:
            head += ["", "Run first:", *(f"  {command}" for command in self.commands)]
        if self.differences:
            head += ["", "What differs from the recipe's run:"]
            head += [f"- {line}" for line in self.differences]
        lines = [part for line in head for part in _wrapped(one_line(line))]
        return "".join(f"# {line}".rstrip() + "\n" for line in lines) + yaml.safe_dump(
            self.settings, sort_keys=False, allow_unicode=True
        )


def import_recipe(path: Path, dialect: str | None = None) -> Imported:
    """Read a recipe of `dialect`, or of the one that its keys give away.

    Raises:
        UsageError: not readable, of no known kind, or not a recipe for DPO, ORPO, CPO or SimPO.
        ConfigError: values that no configuration can have, by the recipe's names.
    """
    recipe = {str(key): value for key, value in load_yaml(path).items()}
    name = dialect or recognise(recipe, path)
    rules = DIALECTS[name]
    method = method_of(recipe, path, name, named=dialect is not None)
    recipe = _flat(recipe, rules.nested)
    draft = Draft(recipe, path.parent, method)
    if method in METHODS:
        set_loss(draft, name)
    for step in rules.steps:
        step(draft) if callable(step) else draft.apply(step)
    unknown = refuse(f"no key that is known of {rules.title}")
    for key in draft.undecided(*recipe):
        if not any(done.startswith(f"{key}.") for done in draft.entries):
            draft.decide(key, find(rules.rules, key) or unknown)
    why = f"what {rules.title} does without being told"
    for setting, value in rules.defaults.items():
        if value != default_of(setting) and not _is_decided(draft, setting):
            draft.default(f"({setting})", setting, value, why)
    hf_trainer.note_omissions(draft)
    config = _checked(draft, path)
    values = config.model_dump()
    settings = {name: values[name] for name in values if name in draft.settings}
    order = {key: number for number, key in enumerate(recipe)}

    def position(entry: Entry) -> tuple[int, bool]:
        first = entry.key if entry.key in order else entry.key.partition(".")[0]
        return order.get(first, len(order)), entry.status == DEFAULT

    entries = tuple(sorted(draft.entries.values(), key=position))
    return Imported(
        path.name, name, config, settings, entries, tuple(draft.notes), tuple(draft.commands)
    )


def recognise(recipe: dict[str, Any], path: Path) -> str:
    """The dialect with most of its own keys in the recipe.

    Raises:
        UsageError: none has any.
    """
    if not recipe:
        raise UsageError(f"{path}: is empty; give a recipe of {', '.join(DIALECTS)}")
    if {"model", "data"} & set(recipe) and set(recipe) <= set(TrainConfig.model_fields):
        raise UsageError(f"{path}: is a smoldpo configuration already: smoldpo train {path.name}")
    votes = {
        name: len(set(dialect.own_keys.split()) & set(recipe)) for name, dialect in DIALECTS.items()
    }
    best = max(votes, key=lambda name: votes[name])
    if not votes[best]:
        raise UsageError(
            f"{path}: its keys are those of no recipe that is known; say whose it is with --from "
            f"({', '.join(DIALECTS)})"
        )
    return best


def _is_decided(draft: Draft, setting: str) -> bool:
    """Whether the recipe decided this itself, be it by what smoldpo cannot do."""
    if setting == "warmup_ratio" and "warmup_steps" in draft.settings:
        return True
    alias = "lr_scheduler" if setting == "lr_scheduler_type" else ""
    refused = draft.entries.get(setting) or draft.entries.get(alias)
    return setting in draft.settings or (refused is not None and refused.status == UNSUPPORTED)


def _flat(recipe: dict[str, Any], nested: str) -> dict[str, Any]:
    """`trl: {beta: 0.1}` as `trl.beta`; the first of what a dialect nests."""
    flat: dict[str, Any] = {}
    for key, value in recipe.items():
        if key == nested and isinstance(value, dict) and value:
            flat |= {f"{key}.{inner}": deep for inner, deep in value.items()}
        else:
            flat[key] = value
    return flat


def _checked(draft: Draft, path: Path) -> TrainConfig:
    """The configuration; its problems name the recipe's own keys."""
    try:
        return build_config(draft.settings)
    except ConfigError as error:
        problems = []
        for problem in error.problems:
            setting = re.split(r"\W", problem, maxsplit=1)[0]
            key = draft.origins.get(setting, setting)
            problems.append(f"{path}: {problem if key == setting else f'{key} ({problem})'}")
        raise ConfigError(problems) from None


def _wrapped(line: str) -> list[str]:
    """Lines for reading; commands stay whole, to be copied."""
    if line.startswith("  "):
        return [line]
    return textwrap.wrap(line, 100, subsequent_indent="  " * line.startswith("- ")) or [""]
