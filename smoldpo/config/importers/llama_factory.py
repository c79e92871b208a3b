"""LLaMA-Factory: `llamafactory-cli train recipe.yaml` with `stage: dpo`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from smoldpo.config.importers import hf_trainer, optimizers
from smoldpo.config.importers.adapters import adapters
from smoldpo.config.importers.datasets import RecipeSource, set_held_out_share, set_sources
from smoldpo.config.importers.mapping import (
    Draft,
    Rules,
    drop,
    is_off,
    loss,
    number,
    same,
    to,
    unsupported,
    where_known,
)

INFO = "dataset_info.json"
POLICY_ALONE = (
    "LLaMA-Factory takes the longer answer's last tokens down in the policy alone; here, as in the paper and "
    "in TRL, in the reference too"
)
ADAPTER_KEYS = (
    *(
        "lora_rank",
        "lora_alpha",
        "lora_dropout",
        "lora_target",
        "loraplus_lr_ratio",
        "loraplus_lr_embedding",
    ),
    *("use_rslora", "use_dora", "pissa_init", "pissa_iter", "pissa_convert", "create_new_adapter"),
    *(
        "additional_target",
        "adapter_folder",
        "oft_rank",
        "oft_block_size",
        "oft_target",
        "module_dropout",
    ),
)


def _lengths(draft: Draft, key: str, value: Any) -> None:
    where_known("of LD-DPO", off=(None, 1, 1.0))(draft, key, value)
    if key in draft.settings:
        draft.keep(key, key, value, POLICY_ALONE, matters=True)


RULES: Rules = {
    **hf_trainer.TRAINER,
    **hf_trainer.LOSS_PARTS,
    "pref_beta": to("beta"),
    "pref_loss": loss,
    "dpo_label_smoothing": to("label_smoothing"),
    "pref_ftx": where_known(hf_trainer.OTHER_LOSS, "rpo_alpha"),
    "pref_bco_weight": unsupported(hf_trainer.OTHER_LOSS),
    "simpo_gamma": where_known("of the loss simpo", off=(None, 0.5)),
    "ld_alpha": _lengths,
    "kto_*": drop("of KTO"),
    "ppo_*": drop("of PPO"),
    "reward_model*": drop("of PPO"),
    "model_name_or_path": to("model"),
    "ref_model": to("reference"),
    "ref_model_adapters": unsupported(
        "set reference to the adapter's folder: it is merged when it is loaded"
    ),
    "ref_model_quantization_bit": unsupported(hf_trainer.QUANTISED),
    "adapter_name_or_path": unsupported(
        "set model to the adapter's folder: it is merged when it is loaded"
    ),
    "model_revision": unsupported(
        "a hub id is read at its newest revision: download this one and set model to its folder",
        off=(None, "", "main"),
    ),
    "quantization_*": unsupported(hf_trainer.QUANTISED),
    "double_quantization": drop("of quantised weights"),
    "rope_scaling": unsupported("the model is taken as its own config.json says"),
    "resize_vocab": unsupported("the model's vocabulary stays as it is"),
    "new_special_tokens": unsupported("the model's vocabulary stays as it is"),
    "use_fast_tokenizer": drop("the tokenizer is the model's own"),
    "split_special_tokens": drop("control tokens written out in texts are never encoded as such"),
    "flash_attn": drop(hf_trainer.ENGINE),
    "enable_liger_kernel": drop(hf_trainer.ENGINE),
    "use_unsloth*": drop(hf_trainer.ENGINE),
    "shift_attn": unsupported("attention is the model's own"),
    "disable_gradient_checkpointing": drop(hf_trainer.MEMORY),
    "use_reentrant_gc": drop(hf_trainer.MEMORY),
    "low_cpu_mem_usage": drop(hf_trainer.MEMORY),
    "upcast_*": drop("what trains is kept in float32"),
    "cache_dir": drop("the hub's own cache is used"),
    "*_hub_token": drop("set HF_TOKEN in the shell"),
    "template": drop(hf_trainer.TEMPLATE, matters=True),
    "default_system": unsupported("system messages are read from the rows"),
    "enable_thinking": unsupported("the chat template is the model's own, without arguments"),
    "tool_format": drop(hf_trainer.TEMPLATE),
    "cutoff_len": to("max_length"),
    "train_on_prompt": unsupported("completions alone are scored"),
    "mask_history": same("always so: the last answer alone is scored"),
    "packing": drop("the fast engine packs by itself, with the same result"),
    "neat_packing": drop("the fast engine packs by itself, with the same result"),
    "overwrite_cache": drop(hf_trainer.LOADING),
    "preprocessing_*": drop(hf_trainer.LOADING),
    "tokenized_path": drop(hf_trainer.LOADING),
    "streaming": drop(hf_trainer.LOADING),
    "buffer_size": drop(hf_trainer.LOADING),
    "media_dir": drop("texts only"),
    "image_*": drop("texts only"),
    "video_*": drop("texts only"),
    "freeze_vision_tower": drop("texts only"),
    "freeze_multi_modal_projector": drop("texts only"),
    "ignore_pad_token_for_loss": drop("the fast engine never pads"),
    "eval_on_each_dataset": unsupported("held-out pairs are evaluated as one set"),
    "plot_loss": same("always so: report.html"),
    "compute_accuracy": same("always so"),
    "ray_*": drop(hf_trainer.DEVICES),
    "use_galore": unsupported("smoldpo's optimizer is AdamW"),
    "use_apollo": unsupported("smoldpo's optimizer is AdamW"),
    "use_badam": unsupported("smoldpo's optimizer is AdamW"),
    "use_adam_mini": unsupported("smoldpo's optimizer is AdamW"),
    "use_muon": unsupported("smoldpo's optimizer is AdamW"),
    "galore_*": drop("of GaLore"),
    "apollo_*": drop("of APOLLO"),
    "badam_*": drop("of BAdam"),
}
DEFAULTS = {
    "learning_rate": 5e-5,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.0,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 3.0,
    "max_length": 2048,
}


def groups(draft: Draft) -> None:
    """The keys that hang together."""
    draft.same("stage", "smoldpo trains DPO and its kin")
    _data(draft)
    _what_trains(draft)
    hf_trainer.precision(draft, "infer_dtype", "compute_dtype")
    _pure(draft)
    optimizers.schedule(draft)
    optimizers.optimizer(draft)
    optimizers.moving_reference(draft)
    hf_trainer.clipping(draft)
    hf_trainer.length_of_run(draft)
    hf_trainer.saving(draft)
    hf_trainer.evaluating(draft)


def _pure(draft: Draft) -> None:
    for key in draft.without("pure_bf16"):
        if is_off(draft.recipe[key]):
            draft.drop(key, "off in the recipe")
        else:
            draft.keep(key, "dtype", "bfloat16", "what trains is kept in float32")


FROZEN_KEYS = ("freeze_trainable_layers", "freeze_trainable_modules", "freeze_extra_modules")


def _what_trains(draft: Draft) -> None:
    """finetuning_type: full, freeze, or adapters (lora is what LLaMA-Factory does without it)."""
    key = "finetuning_type"
    kind = str(draft.recipe.get(key) or "lora")
    if kind == "freeze":
        _some_layers(draft, key)
        return
    adapters(draft, None if kind == "full" else kind, key, ADAPTER_KEYS)
    for name in draft.without(*FROZEN_KEYS):
        draft.drop(name, f"of finetuning_type: freeze, not {kind}")
    if draft.settings.get("use_peft"):
        draft.default("(rank)", "lora_r", 8, "LLaMA-Factory's own")
        rank = number(draft.settings["lora_r"])
        if rank is not None:
            draft.default("(alpha)", "lora_alpha", 2 * rank, "LLaMA-Factory's own: twice the rank")


def _some_layers(draft: Draft, switch: str) -> None:
    """The last few layers train, or with a negative number the first few; or some modules of them."""
    layers = number(draft.recipe.get("freeze_trainable_layers", 2))
    if layers is None or layers == 0 or layers != int(layers):
        draft.refuse(switch, "freeze_trainable_layers is no number of layers: set train_layers")
    else:
        chosen = f"{'last' if layers > 0 else 'first'}:{abs(int(layers))}"
        for key in draft.without(switch, "freeze_trainable_layers"):
            draft.keep(key, "train_layers", [chosen])
    for key in draft.without("freeze_trainable_modules"):
        names = _names(draft.recipe[key])
        if names in ([], ["all"]):
            draft.drop(key, "all of these layers, as by default")
        else:
            draft.keep(key, "train", [f"*.{name}.*" for name in names])
    for key in draft.without("freeze_extra_modules"):
        if is_off(draft.recipe[key]):
            draft.drop(key, "empty")
        else:
            draft.refuse(
                key, "train_layers trains nothing outside its layers: set freeze_layers instead"
            )
    for key in draft.without(*FROZEN_KEYS):
        draft.refuse(key, f"see {switch}")
    for key in draft.without(*ADAPTER_KEYS):
        draft.drop(key, "of adapters, which the recipe does not train")


def _data(draft: Draft) -> None:
    """Names of dataset_info.json, which is read where it lies beside the recipe."""
    recipe = draft.recipe
    info, found = _dataset_info(draft)
    names = _names(recipe.get("dataset"))
    weights = [number(part) for part in _names(recipe.get("interleave_probs"))]
    if len(weights) != len(names):
        weights = [None] * len(names)
    sources = [
        _source(name, info, found, weight) for name, weight in zip(names, weights, strict=True)
    ]
    if names:
        set_sources(draft, "dataset", sources, "share of the mix")
        _say_unknown(draft, [name for name in names if name not in info])
    for key in draft.without("dataset_dir"):
        draft.drop(
            key, f"{INFO} says where the files are" if found else f"no {INFO} was found there"
        )
    _mixing(draft)
    for key in draft.without("eval_dataset"):
        judges = _names(recipe[key])
        if len(judges) == 1:
            draft.keep(key, "eval_data", _source(judges[0], info, found, None).name)
        elif judges:
            draft.refuse(key, "several: join them in one file and set eval_data")
        else:
            draft.drop(key, "empty")
    for key in draft.without("val_size"):
        set_held_out_share(draft, key, recipe[key])
    for key in draft.without("max_samples"):
        if len(names) == 1:
            draft.keep(key, "max_train_samples", recipe[key], "counts training pairs alone")
        else:
            draft.refuse(
                key, "a limit for each source: shorten the files, or set max_train_samples"
            )


def _mixing(draft: Draft) -> None:
    for key in draft.without("mix_strategy"):
        if draft.recipe[key] == "interleave_over":
            draft.refuse(
                key, "no pair is taken twice in an epoch: a mix ends when a source has no more"
            )
        else:
            draft.drop(key, "so it is: all pairs, or by data_weights until a source has no more")
    for key in draft.without("interleave_probs"):
        if "data_weights" in draft.settings:
            draft.keep(key, "data_weights", draft.settings["data_weights"])
        else:
            draft.refuse(key, "does not fit the number of sources: set data_weights")


def _say_unknown(draft: Draft, unknown: list[str]) -> None:
    names = [name for name in unknown if "/" not in name and "." not in name]
    if names:
        draft.notes.append(
            f"{', '.join(names)}: names from LLaMA-Factory's {INFO}, which does not lie at dataset_dir "
            "beside the recipe: put the files or hub ids under data"
        )


def _dataset_info(draft: Draft) -> tuple[dict[str, Any], Path | None]:
    """What dataset_info.json says of each name, and its folder; nothing where there is none."""
    place = str(draft.recipe.get("dataset_dir") or "data")
    for folder in (draft.folder / place, Path(place)):
        try:
            info = json.loads((folder / INFO).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(info, dict):
            return {name: item for name, item in info.items() if isinstance(item, dict)}, folder
    return {}, None


def _source(
    name: str, info: dict[str, Any], folder: Path | None, weight: float | None
) -> RecipeSource:
    item = info.get(name, {})
    if item.get("file_name") and folder is not None:
        return RecipeSource(str(folder / str(item["file_name"])), weight=weight)
    where = str(item.get("hf_hub_url") or name)
    subset, split = item.get("subset"), item.get("split")
    return RecipeSource(where, subset and str(subset), split and str(split), weight)


def _names(value: Any) -> list[str]:
    parts = value if isinstance(value, list) else str(value).split(",") if value is not None else []
    return [str(part).strip() for part in parts if str(part).strip()]
