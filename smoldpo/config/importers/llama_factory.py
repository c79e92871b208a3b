"""LLaMA-Factory: `llamafactory-cli train recipe.yaml` with `stage: dpo`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from smoldpo.config.importers import hf_trainer as hf
from smoldpo.config.importers import optimizers
from smoldpo.config.importers.adapters import adapters
from smoldpo.config.importers.datasets import RecipeSource, held_out_share, set_sources
from smoldpo.config.importers.mapping import (
    OFF,
    Dialect,
    Draft,
    Rule,
    Table,
    drop,
    keep,
    loss,
    number,
    refuse,
    same,
    unsupported,
    where_known,
)

INFO = "dataset_info.json"
POLICY_ALONE = (
    "LLaMA-Factory takes the longer answer's last tokens down in the policy alone; here, as in "
    "the paper and in TRL, in the reference too"
)
VOCABULARY = "the model's vocabulary stays as it is"
PACKING = "the fast engine packs by itself, with the same result"
TEXTS = "texts only"
NOT_ADAPTERS = "of adapters, which the recipe does not train"
ADAPTER_KEYS = (
    "lora_rank lora_alpha lora_dropout lora_target loraplus_lr_ratio loraplus_lr_embedding "
    "use_rslora use_dora pissa_init pissa_iter pissa_convert create_new_adapter additional_target "
    "adapter_folder oft_rank oft_block_size oft_target module_dropout"
)
FROZEN_KEYS = "freeze_trainable_layers freeze_trainable_modules freeze_extra_modules"


def _ld_alpha(draft: Draft, key: str, value: Any) -> Rule:
    rule = where_known("of LD-DPO", off=(None, 1, 1.0))(draft, key, value)
    return rule if rule.setting is None else keep(reason=POLICY_ALONE, matters=True)


def _thinking(draft: Draft, key: str, value: Any) -> Rule:
    if value is None:
        return drop("off in the recipe")
    return keep("chat_template_kwargs", {"enable_thinking": bool(value)}, hf.READ_BY_TEMPLATE)


RULES: Table = {
    **hf.TRAINER,
    **hf.LOSS_PARTS,
    "pref_beta": keep("beta"),
    "pref_loss": loss,
    "dpo_label_smoothing": keep("label_smoothing"),
    "pref_ftx": where_known(hf.OTHER_LOSS, "rpo_alpha"),
    "pref_bco_weight": unsupported(hf.OTHER_LOSS),
    "simpo_gamma": where_known("of the loss simpo", off=(None, 0.5)),
    "ld_alpha": _ld_alpha,
    "kto_*": drop("of KTO"),
    "ppo_* reward_model*": drop("of PPO"),
    "model_name_or_path": keep("model"),
    "ref_model": keep("reference"),
    "ref_model_adapters": unsupported(
        "set reference to the adapter's folder: it is merged when it is loaded"
    ),
    "adapter_name_or_path": unsupported(
        "set model to the adapter's folder: it is merged when it is loaded"
    ),
    "model_revision": unsupported(hf.REVISION, off=(None, "", "main")),
    "ref_model_quantization_bit quantization_*": unsupported(hf.QUANTISED),
    "double_quantization": drop(hf.QUANTISED_PARTS),
    "rope_scaling": unsupported("the model is taken as its own config.json says"),
    "resize_vocab new_special_tokens": unsupported(VOCABULARY),
    "use_fast_tokenizer": drop("the tokenizer is the model's own"),
    "split_special_tokens": drop("control tokens written out in texts are never encoded as such"),
    "flash_attn enable_liger_kernel use_unsloth*": drop(hf.ENGINE),
    "shift_attn": unsupported(hf.ATTENTION),
    "disable_gradient_checkpointing use_reentrant_gc low_cpu_mem_usage": drop(hf.MEMORY),
    "upcast_*": drop(hf.IN_FLOAT32),
    "pure_bf16": keep("dtype", "bfloat16", hf.IN_FLOAT32, off=OFF),
    "cache_dir": drop("the hub's own cache is used"),
    "*_hub_token": drop(hf.TOKEN),
    "template": drop(hf.TEMPLATE, matters=True),
    "default_system": unsupported(hf.SYSTEM),
    "enable_thinking": _thinking,
    "tool_format": drop(hf.TEMPLATE),
    "cutoff_len": keep("max_length"),
    "train_on_prompt": unsupported(hf.COMPLETIONS),
    "mask_history": same("always so: the last answer alone is scored"),
    "packing neat_packing": drop(PACKING),
    "overwrite_cache preprocessing_* tokenized_path streaming buffer_size": drop(hf.LOADING),
    "media_dir image_* video_* freeze_vision_tower freeze_multi_modal_projector": drop(TEXTS),
    "ignore_pad_token_for_loss": drop(hf.NO_PADDING),
    "eval_on_each_dataset": unsupported("held-out pairs are evaluated as one set"),
    "plot_loss": same("always so: report.html"),
    "compute_accuracy": same(hf.ALWAYS),
    "ray_*": drop(hf.DEVICES),
    "use_galore use_apollo use_badam use_adam_mini use_muon": unsupported(
        "smoldpo's optimizer is AdamW"
    ),
    "galore_*": drop("of GaLore"),
    "apollo_*": drop("of APOLLO"),
    "badam_*": drop("of BAdam"),
}


def _what_trains(draft: Draft) -> None:
    """finetuning_type: full, freeze, or adapters (lora is what LLaMA-Factory does without it)."""
    key = "finetuning_type"
    kind = str(draft.recipe.get(key) or "lora")
    if kind == "freeze":
        _some_layers(draft, key)
        return
    adapters(draft, None if kind == "full" else kind, key, ADAPTER_KEYS)
    draft.apply({FROZEN_KEYS: drop(f"of {key}: freeze, not {kind}")})
    if draft.settings.get("use_peft"):
        draft.default("(rank)", "lora_r", 8, "LLaMA-Factory's own")
        rank = number(draft.settings["lora_r"])
        if rank is not None:
            draft.default("(alpha)", "lora_alpha", 2 * rank, "LLaMA-Factory's own: twice the rank")


def _some_layers(draft: Draft, switch: str) -> None:
    """The last layers train, or with a negative number the first; or some modules of them."""
    layers = number(draft.recipe.get("freeze_trainable_layers", 2))
    if not layers or not layers.is_integer():
        why = "freeze_trainable_layers is no number of layers: set train_layers"
        draft.decide(switch, refuse(why))
    else:
        chosen = f"{'last' if layers > 0 else 'first'}:{abs(int(layers))}"
        draft.apply({f"{switch} freeze_trainable_layers": keep("train_layers", [chosen])})
    modules = _names(draft.recipe.get("freeze_trainable_modules"))
    everything = drop("all of these layers, as by default")
    patterns = keep("train", [f"*.{name}.*" for name in modules])
    extra = "train_layers trains nothing outside its layers: set freeze_layers instead"
    empty = Rule("unsupported", extra, True, off=OFF, off_reason="empty")
    draft.apply(
        {
            "freeze_trainable_modules": everything if modules in ([], ["all"]) else patterns,
            "freeze_extra_modules": empty,
            FROZEN_KEYS: refuse(f"see {switch}"),
            ADAPTER_KEYS: drop(NOT_ADAPTERS),
        }
    )


def _data(draft: Draft) -> None:
    """Names of dataset_info.json, which is read where it lies beside the recipe."""
    recipe = draft.recipe
    info, found = _dataset_info(draft)
    names = _names(recipe.get("dataset"))
    weights = [number(part) for part in _names(recipe.get("interleave_probs"))]
    if len(weights) != len(names):
        weights = [None] * len(names)
    sources = [_source(name, info, found, w) for name, w in zip(names, weights, strict=True)]
    if names:
        set_sources(draft, "dataset", sources)
    unknown = [n for n in names if n not in info and "/" not in n and "." not in n]
    if unknown:
        draft.notes.append(
            f"{', '.join(unknown)}: names from LLaMA-Factory's {INFO}, which does not lie at "
            "dataset_dir beside the recipe: put the files or hub ids under data"
        )

    def eval_dataset(draft: Draft, key: str, value: Any) -> Rule:
        judges = _names(value)
        if len(judges) == 1:
            return keep("eval_data", _source(judges[0], info, found).name)
        joined = refuse("several: join them in one file and set eval_data")
        return joined if judges else drop("empty")

    where = f"{INFO} says where the files are" if found else f"no {INFO} was found there"
    limit = "a limit for each source: shorten the files, or set max_train_samples"
    alone = keep("max_train_samples", recipe.get("max_samples"), "counts training pairs alone")
    draft.apply(
        {
            "stage": same("smoldpo trains DPO and its kin", ()),
            "dataset_dir": drop(where),
            "mix_strategy": _mix_strategy,
            "interleave_probs": _interleave_probs,
            "eval_dataset": eval_dataset,
            "val_size": held_out_share,
            "max_samples": alone if len(names) == 1 else refuse(limit),
        }
    )


def _mix_strategy(draft: Draft, key: str, value: Any) -> Rule:
    if value == "interleave_over":
        return refuse("no pair is taken twice in an epoch: a mix ends when a source has no more")
    return drop("so it is: all pairs, or by data_weights until a source has no more")


def _interleave_probs(draft: Draft, key: str, value: Any) -> Rule:
    if "data_weights" in draft.settings:
        return keep("data_weights", draft.settings["data_weights"])
    return refuse("does not fit the number of sources: set data_weights")


def _dataset_info(draft: Draft) -> tuple[dict[str, Any], Path | None]:
    """What dataset_info.json says of each name, and its folder; nothing where there is none."""
    dataset_dir = str(draft.recipe.get("dataset_dir") or "data")
    for folder in (draft.folder / dataset_dir, Path(dataset_dir)):
        try:
            info = json.loads((folder / INFO).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(info, dict):
            return {name: item for name, item in info.items() if isinstance(item, dict)}, folder
    return {}, None


def _source(
    name: str, info: dict[str, Any], folder: Path | None, weight: float | None = None
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


DIALECT = Dialect(
    "LLaMA-Factory",
    "stage finetuning_type pref_beta pref_loss cutoff_len template dataset_dir",
    (
        _data,
        _what_trains,
        {**hf.PRECISION, "infer_dtype compute_dtype": hf.weights_dtype},
        optimizers.schedule,
        optimizers.optimizer,
        optimizers.MOVING_REFERENCE,
        hf.saving,
        hf.evaluating,
    ),
    RULES,
    {
        "learning_rate": 5e-5,
        "lr_scheduler_type": "linear",
        "warmup_ratio": 0.0,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 3.0,
        "max_length": 2048,
    },
)
