"""Rules for keys that stand alone, to be put into a dialect's table."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any

from smoldpo.config import TrainConfig
from smoldpo.recipes.account import Draft, complaint, short

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
