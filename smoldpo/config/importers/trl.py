"""TRL's recipes: `trl dpo --config recipe.yaml`, and its scripts for ORPO and CPO.

Their other keys are those of all of Hugging Face.
"""

from __future__ import annotations

from typing import Any

from smoldpo.config.importers import hf_trainer, optimizers
from smoldpo.config.importers.adapters import adapters
from smoldpo.config.importers.datasets import RecipeSource, as_file, set_held_out_share, set_sources
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

ADAPTER_KEYS = (
    *("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_parameters"),
    *("lora_modules_to_save", "lora_task_type", "use_rslora", "use_dora"),
)
MODEL: Rules = {
    "model_name_or_path": to("model"),
    "ref_model_name_or_path": to("reference"),
    "model_revision": unsupported(
        "a hub id is read at its newest revision: download this one and set model to its folder",
        off=(None, "", "main"),
    ),
    "model_code_revision": drop("no code of a model is ever run"),
    "tokenizer_name_or_path": unsupported("the tokenizer is the model's own"),
    "chat_template": unsupported(hf_trainer.TEMPLATE),
    "model_init_kwargs": unsupported("the model is loaded as its own config.json says"),
    "ref_model_init_kwargs": unsupported("the model is loaded as its own config.json says"),
    "load_in_8bit": unsupported(hf_trainer.QUANTISED),
    "load_in_4bit": unsupported(hf_trainer.QUANTISED),
    "bnb_*": drop("of quantised weights"),
    "use_bnb_nested_quant": drop("of quantised weights"),
    "ignore_bias_buffers": drop(hf_trainer.DEVICES),
    "router_aux_loss_coef": unsupported("mixtures of experts have no auxiliary loss here"),
    "env": drop("set environment variables in the shell", matters=True),
}


def _budget(draft: Draft, key: str, value: Any) -> None:
    if value is None:
        draft.refuse(
            key, "empty means no limit there: set max_length to what the longest pair needs"
        )
    else:
        draft.keep(key, "max_length", value)


DPO: Rules = {
    "loss_type": loss,
    "max_length": _budget,
    "max_prompt_length": drop(hf_trainer.BUDGET, matters=True),
    "max_completion_length": drop(hf_trainer.BUDGET, matters=True),
    "max_target_length": drop(hf_trainer.BUDGET, matters=True),
    "truncation_mode": drop(
        "a pair that is too long loses its prompt's oldest tokens first", matters=True
    ),
    "padding_free": same("the fast engine never pads"),
    "padding_value": drop("the fast engine never pads"),
    "label_pad_token_id": drop("the fast engine never pads"),
    "pad_to_multiple_of": drop("the fast engine never pads"),
    "pad_token": drop("the tokenizer's own"),
    "use_logits_to_keep": drop("always so: the LM head runs on completions only"),
    "use_num_logits_to_keep": drop("always so: the LM head runs on completions only"),
    "precompute_ref_log_probs": same("always so"),
    "precompute_ref_batch_size": drop("max_tokens bounds what goes through at once"),
    "disable_dropout": same("always so"),
    "generate_during_eval": drop("answers are drawn at the end: generate_prompts"),
    "force_use_ref_model": drop("the reference is the start of the policy, or reference"),
    "dataset_num_proc": drop(hf_trainer.LOADING),
    "preprocessing_num_workers": drop(hf_trainer.LOADING),
    "tools": unsupported("tools are read from the rows"),
    "base_model_attribute_name": drop("read from the model's folder"),
    "model_adapter_name": drop("there is one adapter"),
    "ref_adapter_name": drop("the reference is the policy with its adapter off"),
    "rpo_alpha": where_known(hf_trainer.OTHER_LOSS),
    "cpo_alpha": to("cpo_alpha"),
    "simpo_gamma": to("simpo_gamma"),
    "is_encoder_decoder": unsupported("decoder models alone are trained"),
    "alpha": unsupported("AlphaPO is not one of smoldpo's losses: leave it out"),
    "trainer_type": drop("loss_type says it"),
    "gamma_beta_ratio": drop("of SimPO"),
    "sft_weight": drop("of SimPO"),
    "use_flash_attention_2": drop(hf_trainer.ENGINE),
}
RULES: Rules = {**hf_trainer.TRAINER, **hf_trainer.LOSS_PARTS, **MODEL, **DPO}

DEFAULTS = {
    "learning_rate": 1e-6,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.0,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 3.0,
}


def groups(draft: Draft) -> None:
    """The keys that hang together."""
    common(draft, data(draft))


def common(draft: Draft, held_out: bool) -> None:
    """What every recipe for TRL's trainer has besides its data."""
    kind = None if is_off(draft.recipe.get("use_peft")) else "lora"
    adapters(draft, kind, "use_peft", ADAPTER_KEYS)
    if kind and is_off(draft.recipe.get("lora_target_modules")):
        targets = ["q_proj", "v_proj"]
        draft.default("(adapters)", "lora_target_modules", targets, "peft's own for Llama models")
    hf_trainer.precision(draft, "torch_dtype", "dtype")
    optimizers.schedule(draft)
    optimizers.optimizer(draft)
    optimizers.moving_reference(draft)
    hf_trainer.clipping(draft)
    hf_trainer.length_of_run(draft)
    hf_trainer.saving(draft)
    hf_trainer.evaluating(draft, held_out=held_out)


def data(draft: Draft) -> bool:
    """dataset_name with its config and splits, or a list of `datasets`; whether it says what judges."""
    recipe = draft.recipe
    for key in draft.without("dataset_streaming", "streaming"):
        draft.drop(key, hf_trainer.LOADING)
    if "datasets" in recipe:
        _mixture(draft)
        for key in draft.without(
            "dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split"
        ):
            draft.drop(key, "datasets says it")
        return "eval_fraction" in draft.settings
    name = recipe.get("dataset_name")
    if name is None:
        return False
    source = RecipeSource(
        str(name), _text(recipe.get("dataset_config")), _text(recipe.get("dataset_train_split"))
    )
    set_sources(draft, "dataset_name", [source], "share of the mix")
    for key, setting in (("dataset_config", "data_subset"), ("dataset_train_split", "data_split")):
        for _ in draft.without(key):
            if setting in draft.settings:
                draft.keep(key, setting, draft.settings[setting])
            else:
                draft.drop(key, "taken by default")
    return _test_split(draft, source)


def _test_split(draft: Draft, source: RecipeSource) -> bool:
    key = "dataset_test_split"
    judge = _text(draft.recipe.get(key))
    if key not in draft.recipe:
        return False
    held = RecipeSource(source.name, source.subset, judge)
    if judge is None or held.is_held_out:
        draft.drop(key, "the data's own test split is what smoldpo evaluates on")
        return True
    if is_off(draft.recipe.get("eval_strategy", draft.recipe.get("evaluation_strategy"))):
        draft.drop(key, "the recipe does not evaluate")
        return False
    draft.keep(
        key,
        "eval_data",
        as_file(draft, held),
        "write the file first, with the command below",
        matters=True,
    )
    return True


def _mixture(draft: Draft) -> None:
    listed = draft.recipe["datasets"]
    entries = (
        [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    )
    sources = [source_of(entry, "path", "name", "fraction") for entry in entries]
    set_sources(draft, "datasets", sources, "share of the mix")
    inner_keys(draft, "datasets", entries, {"path", "name", "split", "fraction"})
    for key in draft.without("test_split_size"):
        set_held_out_share(draft, key, draft.recipe[key])


def source_of(entry: dict[str, Any], name: str, subset: str, weight: str) -> RecipeSource:
    """A source from one item of a list."""
    return RecipeSource(
        str(entry.get(name)),
        _text(entry.get(subset)),
        _text(entry.get("split")),
        number(entry.get(weight)),
    )


def inner_keys(draft: Draft, key: str, entries: list[dict[str, Any]], known: set[str]) -> None:
    """The further keys of listed sources: columns are found by looking, others are not known."""
    for name in dict.fromkeys(str(name) for entry in entries for name in entry):
        if name == "columns":
            draft.drop(f"{key}.columns", "the columns are found by looking at the rows")
        elif name not in known:
            draft.refuse(f"{key}.{name}", "not known of a source; give the pairs as a file")


def _text(value: Any) -> str | None:
    """A name; `default` is what the hub calls the only subset of a dataset."""
    return None if value in (None, "", "default") else str(value)
