"""What becomes of each key of a recipe: the account that is printed, and the settings that result."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from smoldpo.config.schema import TrainConfig

KEPT = "kept"
RENAMED = "renamed"
DROPPED = "dropped"
UNSUPPORTED = "unsupported"
DEFAULT = "default"
"""Not in the recipe: what its own tool would use, written out because smoldpo's default differs."""

STATUSES = (KEPT, RENAMED, DROPPED, UNSUPPORTED, DEFAULT)


@dataclass(frozen=True)
class Entry:
    """One key of the recipe and its fate; `matters` where the run will differ from the recipe's."""

    key: str
    value: str
    status: str
    becomes: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    matters: bool = False


@dataclass
class Draft:
    """A recipe on its way: what was decided about each key, and the settings so far."""

    recipe: dict[str, Any]
    folder: Path = Path()
    method: str = "dpo"
    """What the recipe is for: dpo, or one of reference_free.METHODS."""
    settings: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    """The recipe's key behind each setting."""
    entries: dict[str, Entry] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """What differs from the recipe's run beyond any single key."""
    commands: list[str] = field(default_factory=list)
    """What has to be run before the first training."""

    def keep(
        self,
        key: str,
        setting: str,
        value: Any,
        reason: str = "",
        *,
        matters: bool = False,
        more: dict[str, Any] | None = None,
    ) -> None:
        """Write `value` under `setting`, unless another key has already set it otherwise."""
        if isinstance(value, dict | list) and complaint(setting, value) is not None:
            self.refuse(key, f"one value belongs here, not a {type(value).__name__}")
            return
        before = self.settings.get(setting, value)
        if before != value:
            self.refuse(
                key, f"{self.origins[setting]} has already set {setting} to {short(before)}"
            )
            return
        becomes = {setting: value} | (more or {})
        self.settings |= becomes
        self.origins |= dict.fromkeys(becomes, key)
        status = KEPT if setting == key else RENAMED
        self._enter(key, status, becomes, reason, matters)

    def drop(self, key: str, reason: str, *, matters: bool = False) -> None:
        """Leave the key out, for a reason; nothing in the run asks for it."""
        self._enter(key, DROPPED, {}, reason, matters)

    def same(self, key: str, reason: str) -> None:
        """smoldpo does what the key says without a setting for it."""
        self._enter(key, KEPT, {}, reason, False)

    def refuse(self, key: str, advice: str, *, matters: bool = True) -> None:
        """The key asks for what smoldpo cannot do (yet); `advice` says what to do."""
        self._enter(key, UNSUPPORTED, {}, advice, matters)

    def default(self, key: str, setting: str, value: Any, reason: str) -> None:
        """Write what the recipe's own tool does without being told."""
        if setting not in self.settings:
            self.settings[setting] = value
            self.origins[setting] = key
            entry = Entry(key, "", DEFAULT, {setting: value}, reason)
            self.entries.setdefault(key, entry)

    def _enter(
        self, key: str, status: str, becomes: dict[str, Any], reason: str, matters: bool
    ) -> None:
        self.entries[key] = Entry(
            key, short(look_up(self.recipe, key)), status, becomes, reason, matters
        )

    def without(self, *keys: str) -> list[str]:
        """Of `keys`, those that the recipe has and about which nothing is decided."""
        return [key for key in keys if key in self.recipe and key not in self.entries]


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


def one_line(text: str) -> str:
    """Without line ends and control characters, which could leave a comment or move the cursor."""
    return "".join(char if char.isprintable() else " " for char in text)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60
_SHORT.maxlevel = 2


def complaint(setting: str, value: Any) -> str | None:
    """Why smoldpo does not take this value, asked of the configuration itself; None: it does."""
    if setting not in TrainConfig.model_fields:
        return f"smoldpo has no setting {setting}"
    try:
        TrainConfig(**{setting: value})
    except ValidationError as error:
        said = [detail["msg"] for detail in error.errors() if detail["loc"][:1] == (setting,)]
        return said[0][0].lower() + said[0][1:] if said else None
    return None


def number(value: Any) -> float | None:
    """A number, also where YAML reads text (`1e-6` without a point); None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


# Rules for keys that stand alone, to be put into a dialect's table.


Rule = Callable[[Draft, str, Any], None]
Rules = Mapping[str, Rule]
"""Key, or pattern with `*`, to rule; an exact key wins over a pattern."""

OFF = (None, False, 0, 0.0, "", "no", "none", "false")


def to(setting: str, reason: str = "") -> Rule:
    """The same value under smoldpo's name."""

    def rule(draft: Draft, key: str, value: Any) -> None:
        if value is None:
            draft.drop(key, "empty")
        else:
            draft.keep(key, setting, value, reason)

    return rule


def keep(draft: Draft, key: str, value: Any) -> None:
    """The same value under the same name."""
    to(key)(draft, key, value)


def drop(reason: str, *, matters: bool = False) -> Rule:
    """Left out, because the run does without it."""

    def rule(draft: Draft, key: str, value: Any) -> None:
        draft.drop(key, reason, matters=matters and value not in OFF)

    return rule


def same(reason: str) -> Rule:
    """What smoldpo does anyway, unless the recipe asks for the opposite."""

    def rule(draft: Draft, key: str, value: Any) -> None:
        draft.drop(key, f"off in the recipe, but {reason}") if is_off(value) else draft.same(
            key, reason
        )

    return rule


def unsupported(advice: str, off: Collection[Any] = OFF) -> Rule:
    """What smoldpo cannot do, unless the recipe does not ask for it."""

    def rule(draft: Draft, key: str, value: Any) -> None:
        if is_off(value, off):
            draft.drop(key, "off in the recipe")
        else:
            draft.refuse(key, advice)

    return rule


def where_known(
    advice: str, *settings: str, off: Collection[Any] = OFF, known_off: bool = False
) -> Rule:
    """Kept where smoldpo has such a setting, under the key's name or one of `settings`."""

    def rule(draft: Draft, key: str, value: Any) -> None:
        names = [name for name in (key, *settings) if name in TrainConfig.model_fields]
        fits = [name for name in names if complaint(name, value) is None]
        if fits and value is not None and (known_off or not is_off(value, off)):
            draft.keep(key, fits[0], value)
        elif is_off(value, off):
            draft.drop(key, "off in the recipe")
        else:
            draft.refuse(key, complaint(names[0], value) or advice if names else advice)

    return rule


def loss(draft: Draft, key: str, value: Any) -> None:
    """The loss by its name, as far as the configuration knows it; one or several."""
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    if value is None:
        draft.drop(key, "empty")
    elif complaint("loss_type", value) is None:
        draft.keep(key, "loss_type", value)
    else:
        default = TrainConfig.model_fields["loss_type"].default
        draft.refuse(
            key,
            f"the loss {short(value)} is not one of smoldpo's (smoldpo config schema lists them): "
            f"the written config trains with {default}",
        )


def find(rules: Rules, key: str) -> Rule | None:
    """The rule of a key: its own, else that of the first pattern that fits."""
    if key in rules:
        return rules[key]
    return next((rules[name] for name in rules if "*" in name and fnmatchcase(key, name)), None)


def alone(value: Any) -> Any:
    """A list of one is the same as that one."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def is_off(value: Any, off: Collection[Any] = OFF) -> bool:
    """Whether a value asks for nothing; `True` is never the same as 1 here."""
    if isinstance(value, list | dict):
        return not value
    value = value.lower() if isinstance(value, str) else value
    return any(value == none and type(value) is type(none) for none in off)
