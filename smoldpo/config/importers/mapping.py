"""Tables of rules for a recipe's keys, and their interpreter."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from smoldpo.config.schema import TrainConfig

STATUSES = KEPT, RENAMED, DROPPED, UNSUPPORTED, DEFAULT = (
    "kept", "renamed", "dropped", "unsupported", "default"
)  # fmt: skip
"""DEFAULT: not in the recipe; its tool's own default, where smoldpo's differs."""
OFF = (None, False, 0, 0.0, "", "no", "none", "false")
GIVEN: Any = object()
"""Stands for the value that the recipe has."""


@dataclass(frozen=True)
class Entry:
    """What became of one key; `matters` where the run will differ from the recipe's."""

    key: str
    value: str
    status: str
    becomes: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    matters: bool = False


@dataclass(frozen=True)
class Rule:
    """What becomes of a key."""

    status: str
    reason: str = ""
    matters: bool = False
    setting: str | None = None
    """The setting that takes the value; empty: that of the key's own name."""
    value: Any = GIVEN
    more: Mapping[str, Any] = field(default_factory=dict)
    """Further settings that follow from the key."""
    off: Collection[Any] = ()
    """Values with which the key asks for nothing: it is dropped, for this reason:"""
    off_reason: str = "off in the recipe"


def keep(
    setting: str = "",
    value: Any = GIVEN,
    reason: str = "",
    *,
    matters: bool = False,
    more: Mapping[str, Any] | None = None,
    off: Collection[Any] = (),
) -> Rule:
    """A setting of smoldpo's, by default of the same name, takes the recipe's value or another."""
    return Rule(KEPT, reason, matters, setting, value, more or {}, off)


def drop(reason: str, *, matters: bool = False) -> Rule:
    """Left out: the run does without the key; `matters` unless the key is off."""
    return Rule(DROPPED, reason, matters)


def same(reason: str, off: Collection[Any] = OFF) -> Rule:
    """What smoldpo does anyway, unless the recipe asks for the opposite."""
    return Rule(KEPT, reason, off=off, off_reason=f"off in the recipe, but {reason}")


def unsupported(advice: str, off: Collection[Any] = OFF) -> Rule:
    """What smoldpo cannot do, unless the recipe does not ask for it; `advice` says what to do."""
    return Rule(UNSUPPORTED, advice, True, off=off)


def refuse(advice: str) -> Rule:
    """What smoldpo cannot do, whatever the value."""
    return unsupported(advice, ())


Convert = Callable[["Draft", str, Any], Rule]
"""The rule for a key and its value in a recipe, where it depends on them."""
Table = Mapping[str, Rule | Convert]
"""Keys, with blanks between them, to their rule."""


@dataclass(frozen=True)
class Dialect:
    """A trainer whose recipes are read."""

    title: str
    own_keys: str
    """Keys by which its recipes are recognised, with blanks between them."""
    steps: Sequence[Table | Callable[[Draft], None]]
    """For the keys that belong together, in this order."""
    rules: Table
    """For keys that stand alone; `*` in a key stands for anything."""
    defaults: Mapping[str, Any]
    """What the trainer does without being told, where smoldpo may differ."""
    nested: str = ""
    """A key whose inner keys are read as `key.inner`."""


def find(table: Table, key: str) -> Rule | Convert | None:
    """The rule of a key: its own, else that of the first pattern that fits."""
    rules = {name: rule for names, rule in table.items() for name in names.split()}
    patterns = (name for name in rules if "*" in name and fnmatchcase(key, name))
    return rules.get(key) or rules.get(next(patterns, ""))


@dataclass
class Draft:
    """A recipe being read: what was decided about each key, and the settings so far."""

    recipe: dict[str, Any]
    folder: Path = Path()
    method: str = "dpo"
    """What the recipe is for: dpo, or one of losses.METHODS."""
    held_out: bool = False
    """Whether the recipe says which pairs are evaluated on."""
    eval_strategy: str = "no"
    """When the recipe's tool evaluates without being told."""
    settings: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    """The recipe's key behind each setting."""
    entries: dict[str, Entry] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """What differs from the recipe's run beyond any single key."""
    commands: list[str] = field(default_factory=list)
    """What has to be run before the first training."""

    def undecided(self, *keys: str) -> list[str]:
        """Of `keys`, those that the recipe has and about which nothing is decided."""
        return [key for key in keys if key in self.recipe and key not in self.entries]

    def apply(self, table: Table) -> None:
        """Decide, in a table's order, about its keys that the recipe has and that are undecided."""
        for keys, rule in table.items():
            for key in self.undecided(*keys.split()):
                self.decide(key, rule)

    def decide(self, key: str, rule: Rule | Convert) -> None:
        """Record what becomes of a key; its settings, unless another key has set them otherwise."""
        given = look_up(self.recipe, key)
        rule = rule if isinstance(rule, Rule) else rule(self, key, given)
        becomes: dict[str, Any] = {}
        if rule.off and is_off(given, rule.off):
            rule = drop(rule.off_reason)
        elif rule.setting is not None:
            setting = rule.setting or key
            value = given if rule.value is GIVEN else rule.value
            if value is None and rule.value is GIVEN:
                rule = drop("empty")
            elif isinstance(value, dict | list) and complaint(setting, value) is not None:
                rule = refuse(f"one value belongs here, not a {type(value).__name__}")
            elif self.settings.get(setting, value) != value:
                before = short(self.settings[setting])
                rule = refuse(f"{self.origins[setting]} has already set {setting} to {before}")
            else:
                becomes = {setting: value, **rule.more}
                self.settings |= becomes
                self.origins |= dict.fromkeys(becomes, key)
        matters = rule.matters and not (rule.status == DROPPED and given in OFF)
        status = RENAMED if becomes and key != next(iter(becomes)) else rule.status
        self.entries[key] = Entry(key, short(given), status, becomes, rule.reason, matters)

    def default(self, key: str, setting: str, value: Any, reason: str) -> None:
        """Write what the recipe's own tool does without being told."""
        if setting not in self.settings:
            self.settings[setting] = value
            self.origins[setting] = key
            self.entries.setdefault(key, Entry(key, "", DEFAULT, {setting: value}, reason))


def look_up(recipe: dict[str, Any], key: str) -> Any:
    """The value at a dotted key; None where there is none."""
    value: Any = recipe.get(key)
    if value is None and "." in key:
        first, _, rest = key.partition(".")
        inner = recipe.get(first)
        if isinstance(inner, list):  # of listed sources the first that has the key
            inner = next((item for item in inner if isinstance(item, dict) and rest in item), None)
        return look_up(inner, rest) if isinstance(inner, dict) else None
    return value


def short(value: Any) -> str:
    """A value on one line, cut: recipes of others may hold anything, of any size."""
    if isinstance(value, bool) or value is None:
        return str(value).lower() if value is not None else "empty"
    text = value if isinstance(value, str) else _SHORT.repr(value)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 60 else f"{text[:57]}..."


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60
_SHORT.maxlevel = 2


def one_line(text: str) -> str:
    """Without line ends and control characters, which could leave a comment or move the cursor."""
    return "".join(char if char.isprintable() else " " for char in text)


def complaint(setting: str, value: Any) -> str | None:
    """Why smoldpo does not take this value, asked of the configuration itself; None: it does."""
    if setting not in TrainConfig.model_fields:
        return f"smoldpo has no setting {setting}"
    try:
        TrainConfig(**{setting: value})
    except ValidationError as error:
        problems = [detail["msg"] for detail in error.errors() if detail["loc"][:1] == (setting,)]
        return problems[0][0].lower() + problems[0][1:] if problems else None
    return None


def default_of(setting: str) -> Any:
    """smoldpo's own value of a setting."""
    return TrainConfig.model_fields[setting].default


def number(value: Any) -> float | None:
    """A number, also where YAML reads text (`1e-6` without a point); None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def listed(value: Any) -> list[Any]:
    """A list as it is, nothing as an empty one, anything else as a list of one."""
    return value if isinstance(value, list) else [] if value is None else [value]


def alone(value: Any) -> Any:
    """The item of a list of one; anything else as it is."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def is_off(value: Any, off: Collection[Any] = OFF) -> bool:
    """Whether a value asks for nothing; `True` is never the same as 1 here."""
    if isinstance(value, list | dict):
        return not value
    value = value.lower() if isinstance(value, str) else value
    return any(value == none and type(value) is type(none) for none in off)


def where_known(advice: str, *settings: str, off: Collection[Any] = OFF) -> Convert:
    """Kept where smoldpo has such a setting, under the key's name or one of `settings`."""

    def convert(draft: Draft, key: str, value: Any) -> Rule:
        if is_off(value, off):
            return drop("off in the recipe")
        names = [name for name in (key, *settings) if name in TrainConfig.model_fields]
        for name in names:
            if value is not None and complaint(name, value) is None:
                return keep(name)
        return refuse(complaint(names[0], value) or advice if names else advice)

    return convert


def loss(draft: Draft, key: str, value: Any) -> Rule:
    """The loss by its name, as far as the configuration knows it; one or several."""
    value = alone(value)
    if value is None:
        return drop("empty")
    if complaint("loss_type", value) is None:
        return keep("loss_type", value)
    return refuse(
        f"the loss {short(value)} is not one of smoldpo's (smoldpo config schema lists them): "
        f"the written config trains with {default_of('loss_type')}"
    )
