"""LoRA's keys in TRL, axolotl and LLaMA-Factory: the switch, and a rule for each further key."""

from __future__ import annotations

from typing import Any

from smoldpo.config.importers.hf_trainer import ALWAYS, ENGINE, NOISE
from smoldpo.config.importers.mapping import (
    UNSUPPORTED,
    Draft,
    Rule,
    Table,
    drop,
    find,
    is_off,
    keep,
    listed,
    refuse,
    same,
    unsupported,
)

ALONE = "adapters alone train; leave it out, or train the weights themselves (train, train_layers)"
ALL_LAYERS = "adapters, on all layers"
KIND = (
    "smoldpo's adapters are LoRA and DoRA: the written config trains the upper layers themselves "
    "(freeze_layers' default), which takes little memory too"
)
RATE = (
    "The recipe trains {kind} adapters, the written config the model's upper layers. Rates for "
    "adapters are usually about ten times those for the weights themselves: lower learning_rate, "
    "or set freeze_layers"
)


def _targets(draft: Draft, key: str, value: Any) -> Rule:
    if value in ("all", "all-linear", ["all-linear"]):
        return same("all linear layers of the decoder, as by default", ())
    names = value if isinstance(value, list) else str(value).split(",")
    return keep("lora_target_modules", [str(name).strip() for name in names])


RULES: Table = {
    "lora_r lora_rank": keep("lora_r"),
    "lora_alpha": keep(),
    "lora_dropout": drop(NOISE, matters=True),
    "lora_target lora_target_modules": _targets,
    "lora_target_linear": same("all linear layers of the decoder, as by default"),
    "use_rslora peft_use_rslora": keep("use_rslora"),
    "use_dora peft_use_dora": keep("use_dora"),
    "peft_layers_to_transform lora_layers_to_transform": lambda draft, key, value: keep(
        "train_layers", [str(number) for number in listed(value)]
    ),
    "merge_lora": keep("merge"),
    "lora_modules_to_save additional_target": unsupported(ALONE),
    "lora_target_parameters": unsupported("adapters are for linear layers: lora_target_modules"),
    "lora_task_type": drop("of causal language models, always"),
    "lora_fan_in_fan_out": drop("read from the layers themselves"),
    "lora_on_cpu lora_mlp_kernel lora_qkv_kernel lora_o_kernel": drop(ENGINE),
    "lora_model_dir": unsupported("set model to that adapter's folder, and merge"),
    "create_new_adapter": drop(ALWAYS),
    "loraplus_lr_ratio loraplus_lr_embedding": unsupported(
        "set learning_rates: *.lora_B.*=RATE, with RATE so many times learning_rate"
    ),
    "pissa_init pissa_iter pissa_convert peft_init_lora_weights": unsupported(
        "A begins at random and B at 0, so that the policy starts as its reference"
    ),
    "peft": unsupported("set the lora_ settings"),
    "adapter_folder": drop("the adapter is in the run folder"),
    "oft_rank oft_block_size oft_target module_dropout": drop("of OFT"),
}


def adapters(draft: Draft, kind: str | None, switch: str, keys: str) -> None:
    """LoRA's switch and settings.

    Args:
        kind: what the recipe trains; None: the weights themselves.
        keys: those of RULES that the recipe's tool has.
    """
    known = kind in ("lora", "qlora")
    if kind is None:
        draft.default("(what trains)", "freeze_layers", 0, "the recipe trains all layers")
        decision = same("all weights train", ())
    elif known:
        if switch not in draft.recipe:
            draft.default("(what trains)", "use_peft", True, ALL_LAYERS)
        reason = f"{ALL_LAYERS}; the weights under them are not quantised"
        plain = kind == "lora"
        decision = keep("use_peft", True, ALL_LAYERS if plain else reason, matters=not plain)
    else:
        decision = refuse(KIND)
        draft.notes.append(RATE.format(kind=kind.upper()))
    draft.apply({switch: decision})
    for key in draft.undecided(*keys.split()):
        value = draft.recipe[key]
        if kind is None:
            draft.decide(key, drop("of adapters, which the recipe does not train"))
        elif is_off(value):
            draft.decide(key, drop("off in the recipe" if value is False else "empty"))
        elif not known:
            draft.decide(key, Rule(UNSUPPORTED, f"of the adapters: see {switch}"))
        else:
            rule = find(RULES, key)
            assert rule is not None, f"{key} has a rule"
            draft.decide(key, rule)
