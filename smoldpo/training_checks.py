"""What is wrong between the settings that say what trains (docs/training.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from smoldpo.layer_choice import complaint

if TYPE_CHECKING:
    from smoldpo.config import TrainConfig


def training_checks(config: TrainConfig) -> list[str]:
    """Every problem, in words."""
    problems = [found for item in config.train_layers if (found := complaint(item)) is not None]
    if config.train_layers and config.freeze_layers is not None:
        problems.append(
            "train_layers and freeze_layers both say which layers train: give one of them (last:4 are the "
            "uppermost four)"
        )
    return problems + _adapter_checks(config)


ADAPTER_SETTINGS = (
    *("lora_r", "lora_alpha", "lora_target_modules", "use_dora", "use_rslora", "merge"),
)


def _adapter_checks(config: TrainConfig) -> list[str]:
    problems = []
    if config.lora_dropout:
        problems.append(
            f"lora_dropout is {config.lora_dropout:g}, and must be 0: dropout is off in DPO here, where "
            "policy and reference are compared without noise; leave it out"
        )
    fields = type(config).model_fields
    if not config.use_peft:
        idle = [n for n in ADAPTER_SETTINGS if getattr(config, n) != fields[n].default]
        if idle:
            problems.append(f"{', '.join(idle)}: of adapters, which use_peft trains: set use_peft")
        return problems
    problems += [
        f"{name} is of the weights themselves, and with use_peft the adapters alone train: choose their "
        "layers with train_layers or freeze_layers, and their places with lora_target_modules"
        for name in ("train", "freeze")
        if getattr(config, name)
    ]
    if config.freeze_layers == "auto":
        problems.append(
            "freeze_layers auto chooses how many of the weights train; with use_peft give a number of layers"
        )
    if config.sync_ref_model:
        problems.append(
            "sync_ref_model moves a reference's weights, and with use_peft the reference is the policy with "
            "its adapters off: leave one of them out"
        )
    return problems
