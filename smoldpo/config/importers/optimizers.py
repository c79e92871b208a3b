"""Keys of optimizers, schedules and rates, which Hugging Face's trainers and axolotl share."""

from __future__ import annotations

import json
from typing import Any

from smoldpo.config.importers.mapping import Draft, complaint, is_off, number, short
from smoldpo.config.optimizers import ADAM
from smoldpo.config.schema import TrainConfig

EIGHT_BITS = {"adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw8bit"}
"""Names of bitsandbytes' AdamW with 8-bit moments; what is paged is a matter of GPUs."""
NEEDS_PACKAGE = "needs the package bitsandbytes; without optim the moments are in float32"


def schedule(draft: Draft, key: str = "lr_scheduler_type") -> None:
    """The schedule's name, its own settings, and the warm-up, which only some of the names have."""
    recipe = draft.recipe
    value = recipe.get(key)
    name = "constant" if value == "constant_with_warmup" else value
    if draft.without(key):
        if value is None:
            draft.drop(key, "empty")
        elif complaint("lr_scheduler_type", name) is None:
            why = "smoldpo's constant rate warms up" if name != value else ""
            draft.keep(key, "lr_scheduler_type", name, why)
        else:
            default = TrainConfig.model_fields["lr_scheduler_type"].default
            draft.refuse(
                key, f"smoldpo has no schedule {short(value)}: the written config has {default}"
            )
    _schedule_settings(draft, name)
    for warmup in draft.without("warmup_steps", "warmup_ratio"):
        if value == "constant":
            draft.drop(warmup, "the schedule constant has no warm-up there")
        else:
            _warm_up(draft, warmup, recipe[warmup])
    if value == "constant":
        draft.default(
            "warmup_ratio", "warmup_ratio", 0.0, "the schedule constant has no warm-up there"
        )


def _warm_up(draft: Draft, key: str, value: Any) -> None:
    amount = number(value)
    if value is None or (key == "warmup_steps" and amount == 0):
        draft.drop(key, "none: the other setting holds")
    elif key == "warmup_steps" and amount is not None and 0 < amount < 1:
        draft.keep(key, "warmup_ratio", amount, "below 1 it is a share of the steps")
    else:
        draft.keep(key, key, value)


def _schedule_settings(draft: Draft, name: Any) -> None:
    """lr_scheduler_kwargs: what smoldpo has a setting for; anything else is refused as a whole."""
    for key in draft.without("lr_scheduler_kwargs"):
        given = _mapping(draft.recipe[key])
        if given is None:
            draft.refuse(key, "not a mapping of settings")
            continue
        if not given:
            draft.drop(key, "empty")
            continue
        try:
            settings = _of_schedule(draft, name, given)
        except ValueError as error:
            draft.refuse(key, str(error))
            continue
        if not settings:
            draft.drop(key, "what the schedule does anyway")
            continue
        (first, value), *rest = settings.items()
        draft.keep(key, first, value, more=dict(rest))


USUAL = {"num_cycles": (0.5,), "warmup_type": ("linear",), "last_epoch": (-1,)}
"""Settings of schedules that smoldpo has at one value only."""
RENAMED = {"num_decay_steps": "lr_decay_steps", "decay_type": "lr_decay_type"}


def _of_schedule(draft: Draft, name: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Settings of smoldpo's that mean the same. Raises ValueError in words where there are none."""
    settings: dict[str, Any] = {}
    for key, value in given.items():
        if value is None or value in USUAL.get(key, ()):
            continue
        if name == "warmup_stable_decay" and key in RENAMED:
            setting = RENAMED[key]
        elif name == "warmup_stable_decay" and key == "min_lr_ratio":
            if number(value) == 0:
                continue
            setting = "min_lr_rate"
        elif name == "cosine_with_min_lr" and key in ("min_lr_rate", "min_lr"):
            setting, value = "min_lr_rate", _share(draft, key, value)
        else:
            raise ValueError(f"smoldpo has no setting for {key} of the schedule {short(name)}")
        said = complaint(setting, value)
        if said is not None:
            raise ValueError(f"{key} cannot be {short(value)} as {setting}: {said}")
        settings[setting] = value
    return settings


def _share(draft: Draft, key: str, value: Any) -> Any:
    """The lowest rate as a share of the peak."""
    if key == "min_lr_rate":
        return value
    lowest, peak = number(value), number(draft.recipe.get("learning_rate"))
    if lowest is None or not peak:
        raise ValueError("min_lr is a rate, and learning_rate is not given: set min_lr_rate")
    return lowest / peak


def _mapping(value: Any) -> dict[str, Any] | None:
    """A mapping, also one written as JSON or as name=value pairs with commas; None for anything else."""
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


def optimizer(draft: Draft, key: str = "optim") -> None:
    """The optimizer by its names, and which of its settings it reads."""
    for _ in draft.without(key):
        value = draft.recipe[key]
        if value is None:
            draft.drop(key, "empty; smoldpo's optimizer is AdamW")
        elif value in EIGHT_BITS:
            draft.keep(key, "optim", "adamw_8bit", NEEDS_PACKAGE)
        elif complaint("optim", value) is None:
            draft.keep(key, "optim", value)
        elif "adamw" not in str(value).lower():
            draft.refuse(key, "trained with AdamW instead: the rate may need another value")
        elif "bit" in str(value) and "32bit" not in str(value):
            draft.same(key, "AdamW, with its state in float32: more exact")
        else:
            draft.same(key, "smoldpo's optimizer is AdamW")
    chosen = draft.settings.get("optim")
    if chosen in ("adafactor", "sgd"):
        for setting in draft.without(*ADAM):
            draft.drop(setting, f"{chosen} does not read it")
    for arguments in draft.without("optim_args"):
        _optimizer_arguments(draft, arguments, chosen)


def _optimizer_arguments(draft: Draft, key: str, chosen: Any) -> None:
    given = _mapping(draft.recipe[key])
    if given == {}:
        draft.drop(key, "empty")
    elif chosen == "sgd" and given is not None and given.keys() == {"momentum"}:
        draft.keep(key, "sgd_momentum", number(given["momentum"]))
    else:
        draft.refuse(
            key,
            "settings of optimizers are adam_beta1, adam_beta2, adam_epsilon and sgd_momentum",
        )


def moving_reference(draft: Draft) -> None:
    """TR-DPO's keys, of which two count only with the first; a loss without a reference has dropped that."""
    for key in draft.without("sync_ref_model"):
        if is_off(draft.recipe[key]):
            draft.drop(key, "off in the recipe")
        else:
            draft.keep(key, key, draft.recipe[key])
    on = "sync_ref_model" in draft.settings
    for key in draft.without("ref_model_mixup_alpha", "ref_model_sync_steps"):
        if on and draft.recipe[key] is not None:
            draft.keep(key, key, draft.recipe[key])
        else:
            draft.drop(key, "of sync_ref_model, which is off or has no part in this loss")


def lowest_cosine_rate(draft: Draft, key: str = "cosine_min_lr_ratio") -> None:
    """axolotl's share of the peak at which a cosine ends; before the schedule's own keys are read."""
    for _ in draft.without(key):
        share = number(draft.recipe[key])
        if not share:
            draft.drop(key, "off in the recipe")
        elif draft.recipe.get("lr_scheduler") not in (None, "cosine"):
            draft.refuse(key, "of the schedule cosine")
        else:
            more = {"lr_scheduler_type": "cosine_with_min_lr"}
            draft.keep(key, "min_lr_rate", share, more=more)
            for name in draft.without("lr_scheduler"):
                draft.same(name, "cosine_with_min_lr, for its lowest rate")


def own_rates(draft: Draft, adapters: bool) -> None:
    """axolotl's lr_groups and embedding_lr, as patterns."""
    rates: list[str] = []
    keys = draft.without("embedding_lr", "embedding_lr_scale", "lr_groups")
    found = [key for key in keys if not is_off(draft.recipe[key])]
    for key in keys:
        patterns = _patterns(key, draft) if key in found else []
        if key not in found:
            draft.drop(key, "off in the recipe")
        elif adapters or not patterns:
            draft.refuse(key, "set learning_rates to patterns of what trains, with their rates")
        elif rates:
            draft.refuse(key, f"{keys[0]} has already set learning_rates: add {','.join(patterns)}")
        else:
            rates = patterns
            draft.keep(key, "learning_rates", rates)


def _patterns(key: str, draft: Draft) -> list[str]:
    value = draft.recipe[key]
    if key == "lr_groups":
        groups = value if isinstance(value, list) else []
        found = []
        for group in groups:
            modules = group.get("modules") if isinstance(group, dict) else None
            rate = number(group.get("lr")) if isinstance(group, dict) else None
            if not isinstance(modules, list) or not rate:
                return []
            found += [f"*{module}*={rate:g}" for module in modules]
        return found
    rate = number(value)
    if key == "embedding_lr_scale" and rate is not None:
        peak = number(draft.recipe.get("learning_rate"))
        rate = rate * peak if peak else None
    return [f"embeddings={rate:g}"] if rate else []
