"""Keys of optimizers, schedules and rates, which Hugging Face's trainers and axolotl share."""

from __future__ import annotations

import json
from typing import Any

from smoldpo.config.importers.mapping import (
    OFF,
    Draft,
    Rule,
    Table,
    complaint,
    default_of,
    drop,
    is_off,
    keep,
    number,
    refuse,
    same,
    short,
)
from smoldpo.config.optimizers import ADAM

EIGHT_BITS = ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw8bit")
"""Names of bitsandbytes' AdamW with 8-bit moments; what is paged is a matter of GPUs."""
NEEDS_PACKAGE = "needs the package bitsandbytes; without optim the moments are in float32"
NO_WARMUP = "the schedule constant has no warm-up there"


def schedule(draft: Draft, key: str = "lr_scheduler_type") -> None:
    """The schedule's name, its own settings, and the warm-up, which only some of the names have."""
    value = draft.recipe.get(key)
    name = "constant" if value == "constant_with_warmup" else value
    if value is None:
        rule = drop("empty")
    elif complaint("lr_scheduler_type", name) is None:
        why = "smoldpo's constant rate warms up" if name != value else ""
        rule = keep("lr_scheduler_type", name, why)
    else:
        default = default_of("lr_scheduler_type")
        rule = refuse(f"smoldpo has no schedule {short(value)}: the written config has {default}")
    draft.apply({key: rule, "lr_scheduler_kwargs": _schedule_settings(draft, name)})
    draft.apply({"warmup_steps warmup_ratio": drop(NO_WARMUP) if value == "constant" else _warm_up})
    if value == "constant":
        draft.default("warmup_ratio", "warmup_ratio", 0.0, NO_WARMUP)


def _warm_up(draft: Draft, key: str, value: Any) -> Rule:
    amount = number(value)
    if value is None or (key == "warmup_steps" and amount == 0):
        return drop("none: the other setting holds")
    if key == "warmup_steps" and amount is not None and 0 < amount < 1:
        return keep("warmup_ratio", amount, "below 1 it is a share of the steps")
    return keep()


def _schedule_settings(draft: Draft, name: Any) -> Rule:
    """lr_scheduler_kwargs: what smoldpo has a setting for; anything else is refused as a whole."""
    given = _mapping(draft.recipe.get("lr_scheduler_kwargs"))
    if not given:
        return refuse("not a mapping of settings") if given is None else drop("empty")
    try:
        settings = _of_schedule(draft, name, given)
    except ValueError as error:
        return refuse(str(error))
    if not settings:
        return drop("what the schedule does anyway")
    (first, value), *rest = settings.items()
    return keep(first, value, more=dict(rest))


USUAL = {"num_cycles": (0.5,), "warmup_type": ("linear",), "last_epoch": (-1,)}
"""Settings of schedules that smoldpo has at one value only."""
RENAMED = {
    "warmup_stable_decay": {
        "num_decay_steps": "lr_decay_steps",
        "decay_type": "lr_decay_type",
        "min_lr_ratio": "min_lr_rate",
    },
    "cosine_with_min_lr": {"min_lr_rate": "min_lr_rate", "min_lr": "min_lr_rate"},
}


def _of_schedule(draft: Draft, name: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Settings of smoldpo's that mean the same.

    Raises:
        ValueError: saying which of them has no counterpart.
    """
    settings: dict[str, Any] = {}
    for key, value in given.items():
        if value is None or value in USUAL.get(key, ()):
            continue
        setting = RENAMED.get(str(name), {}).get(key)
        if setting is None:
            raise ValueError(f"smoldpo has no setting for {key} of the schedule {short(name)}")
        if key == "min_lr_ratio" and number(value) == 0:
            continue
        if key == "min_lr":  # as a share of the peak
            lowest, peak = number(value), number(draft.recipe.get("learning_rate"))
            if lowest is None or not peak:
                raise ValueError(
                    "min_lr is a rate, and learning_rate is not given: set min_lr_rate"
                )
            value = lowest / peak
        problem = complaint(setting, value)
        if problem is not None:
            raise ValueError(f"{key} cannot be {short(value)} as {setting}: {problem}")
        settings[setting] = value
    return settings


def _mapping(value: Any) -> dict[str, Any] | None:
    """A mapping, also as JSON or as name=value pairs with commas; None for anything else."""
    if value is None:
        return {}
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            parts = [part.partition("=") for part in value.split(",")]
            value = {name.strip(): text.strip() for name, sign, text in parts if sign}
            return value if len(value) == len(parts) else None
    return {str(k): v for k, v in value.items()} if isinstance(value, dict) else None


def _optim(draft: Draft, key: str, value: Any) -> Rule:
    """The optimizer by its names."""
    if value is None:
        return drop("empty; smoldpo's optimizer is AdamW")
    if value in EIGHT_BITS:
        return keep("optim", "adamw_8bit", NEEDS_PACKAGE)
    if complaint("optim", value) is None:
        return keep("optim")
    if "adamw" not in str(value).lower():
        return refuse("trained with AdamW instead: the rate may need another value")
    if "bit" in str(value) and "32bit" not in str(value):
        return same("AdamW, with its state in float32: more exact", ())
    return same("smoldpo's optimizer is AdamW", ())


def optimizer(draft: Draft, key: str = "optim") -> None:
    """The optimizer, and which of its settings it reads."""
    draft.apply({key: _optim})
    chosen = draft.settings.get("optim")
    if chosen in ("adafactor", "sgd"):
        draft.apply({" ".join(ADAM): drop(f"{chosen} does not read it")})
    draft.apply({"optim_args": _optim_args})


def _optim_args(draft: Draft, key: str, value: Any) -> Rule:
    given = _mapping(value)
    if given == {}:
        return drop("empty")
    if draft.settings.get("optim") == "sgd" and given is not None and given.keys() == {"momentum"}:
        return keep("sgd_momentum", number(given["momentum"]))
    return refuse(
        "settings of optimizers are adam_beta1, adam_beta2, adam_epsilon and sgd_momentum"
    )


def _of_moving_reference(draft: Draft, key: str, value: Any) -> Rule:
    if "sync_ref_model" in draft.settings and value is not None:
        return keep()
    return drop("of sync_ref_model, which is off or has no part in this loss")


MOVING_REFERENCE: Table = {
    "sync_ref_model": keep(off=OFF),
    "ref_model_mixup_alpha ref_model_sync_steps": _of_moving_reference,
}
"""TR-DPO's keys; a loss without a reference has dropped the first."""


def lowest_cosine_rate(draft: Draft, key: str, value: Any) -> Rule:
    """axolotl's share of the peak at which a cosine ends; read before the schedule's keys."""
    share = number(value)
    if not share:
        return drop("off in the recipe")
    if draft.recipe.get("lr_scheduler") not in (None, "cosine"):
        return refuse("of the schedule cosine")
    schedule = "cosine_with_min_lr"
    draft.apply({"lr_scheduler": same(f"{schedule}, for its lowest rate", ())})
    return keep("min_lr_rate", share, more={"lr_scheduler_type": schedule})


def own_rates(draft: Draft) -> None:
    """axolotl's lr_groups and embedding_lr, as patterns of what trains, which adapters are not."""
    rates: list[str] = []
    keys = draft.undecided("embedding_lr", "embedding_lr_scale", "lr_groups")
    for key in keys:
        patterns = _patterns(draft, key, draft.recipe[key])
        if is_off(draft.recipe[key]):
            rule = drop("off in the recipe")
        elif not patterns or not is_off(draft.recipe.get("adapter")):
            rule = refuse("set learning_rates to patterns of what trains, with their rates")
        elif rates:
            rule = refuse(f"{keys[0]} has already set learning_rates: add {','.join(patterns)}")
        else:
            rates = patterns
            rule = keep("learning_rates", rates)
        draft.decide(key, rule)


def _patterns(draft: Draft, key: str, value: Any) -> list[str]:
    if key == "lr_groups":
        found: list[str] = []
        for group in value if isinstance(value, list) else ():
            known = group if isinstance(group, dict) else {}
            modules, rate = known.get("modules"), number(known.get("lr"))
            if not isinstance(modules, list) or not rate:
                return []
            found += [f"*{module}*={rate:g}" for module in modules]
        return found
    rate = number(value)
    if key == "embedding_lr_scale" and rate is not None:
        rate *= number(draft.recipe.get("learning_rate")) or 0.0
    return [f"embeddings={rate:g}"] if rate else []
