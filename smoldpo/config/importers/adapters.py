"""LoRA in the words of TRL, axolotl and LLaMA-Factory: the switch, and one rule for each further key."""

from __future__ import annotations

from typing import Any

from smoldpo.config.importers.hf_trainer import ENGINE, NOISE
from smoldpo.config.importers.mapping import Draft, Rules, drop, find, is_off, same, to, unsupported

ALONE = "adapters alone train; leave it out, or train the weights themselves (train, train_layers)"
KIND = (
    "smoldpo's adapters are LoRA and DoRA: the written config trains the upper layers themselves "
    "(freeze_layers' default), which takes little memory too"
)
RATE = (
    "The recipe trains {kind} adapters, the written config the model's upper layers. Rates for adapters are "
    "usually about ten times those for the weights themselves: lower learning_rate, or set freeze_layers"
)
PLUS = unsupported("set learning_rates: *.lora_B.*=RATE, with RATE so many times learning_rate")
BEGINNING = unsupported("A begins at random and B at 0, so that the policy starts as its reference")


def _targets(draft: Draft, key: str, value: Any) -> None:
    if value in ("all", "all-linear", ["all-linear"]):
        draft.same(key, "all linear layers of the decoder, as by default")
    else:
        names = value if isinstance(value, list) else str(value).split(",")
        draft.keep(key, "lora_target_modules", [str(name).strip() for name in names])


def _layers(draft: Draft, key: str, value: Any) -> None:
    numbers = value if isinstance(value, list) else [value]
    draft.keep(key, "train_layers", [str(number) for number in numbers])


RULES: Rules = {
    "lora_r": to("lora_r"),
    "lora_rank": to("lora_r"),
    "lora_alpha": to("lora_alpha"),
    "lora_dropout": drop(NOISE, matters=True),
    "lora_target": _targets,
    "lora_target_modules": _targets,
    "lora_target_linear": same("all linear layers of the decoder, as by default"),
    "*use_rslora": to("use_rslora"),
    "*use_dora": to("use_dora"),
    "*_layers_to_transform": _layers,
    "merge_lora": to("merge"),
    "lora_modules_to_save": unsupported(ALONE),
    "additional_target": unsupported(ALONE),
    "lora_target_parameters": unsupported("adapters are for linear layers: lora_target_modules"),
    "lora_task_type": drop("of causal language models, always"),
    "lora_fan_in_fan_out": drop("read from the layers themselves"),
    "lora_on_cpu": drop(ENGINE),
    "lora_*_kernel": drop(ENGINE),
    "lora_model_dir": unsupported("set model to that adapter's folder, and merge"),
    "create_new_adapter": drop("always so"),
    "loraplus_*": PLUS,
    "pissa_*": BEGINNING,
    "peft_init_lora_weights": BEGINNING,
    "peft": unsupported("set the lora_ settings"),
    "adapter_folder": drop("the adapter is in the run folder"),
    "oft_*": drop("of OFT"),
    "module_dropout": drop("of OFT"),
}


def adapters(draft: Draft, kind: str | None, switch: str, keys: tuple[str, ...]) -> None:
    """LoRA's switch and settings; `kind` is what the recipe trains, None the weights themselves."""
    known = kind in ("lora", "qlora")
    if kind is None:
        draft.default("(what trains)", "freeze_layers", 0, "the recipe trains all layers")
    elif known and switch not in draft.recipe:
        draft.default("(what trains)", "use_peft", True, "adapters, on all layers")
    for key in draft.without(switch):
        if kind is None:
            draft.same(key, "all weights train")
        elif kind == "lora":
            draft.keep(key, "use_peft", True, "adapters, on all layers")
        elif kind == "qlora":
            reason = "adapters, on all layers; the weights under them are not quantised"
            draft.keep(key, "use_peft", True, reason, matters=True)
        else:
            draft.refuse(key, KIND)
    for key in draft.without(*keys):
        value = draft.recipe[key]
        if kind is None:
            draft.drop(key, "of adapters, which the recipe does not train")
        elif is_off(value):
            draft.drop(key, "off in the recipe" if value is False else "empty")
        elif not known:
            draft.refuse(key, f"of the adapters: see {switch}", matters=False)
        else:
            rule = find(RULES, key)
            assert rule is not None, f"{key} has a rule"
            rule(draft, key, value)
    if kind is not None and not known:
        draft.notes.append(RATE.format(kind=kind.upper()))
