"""TRL's recipes (`trl dpo --config recipe.yaml`, ORPO's, CPO's), and the alignment handbook's.

The handbook has TRL's keys, and mixtures of datasets of its own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from smoldpo.config.importers import hf_trainer as hf
from smoldpo.config.importers import optimizers
from smoldpo.config.importers.adapters import adapters
from smoldpo.config.importers.datasets import (
    RecipeSource,
    as_file,
    held_out_share,
    inner_keys,
    items,
    set_sources,
    sources_of,
    text,
)
from smoldpo.config.importers.mapping import (
    Dialect,
    Draft,
    Rule,
    Table,
    drop,
    is_off,
    keep,
    listed,
    loss,
    number,
    refuse,
    same,
    unsupported,
    where_known,
)

ADAPTER_KEYS = (
    "lora_r lora_alpha lora_dropout lora_target_modules lora_target_parameters "
    "lora_modules_to_save lora_task_type use_rslora use_dora"
)


def _template_path(draft: Draft, key: str, value: Any) -> Rule:
    """A Jinja file; a model's name would mean that model's template."""
    if str(value).endswith((".jinja", ".j2")):
        return keep("chat_template", value)
    return unsupported(hf.TEMPLATE_FILE)


def _max_length(draft: Draft, key: str, value: Any) -> Rule:
    if value is None:
        return refuse("empty means no limit there: set max_length to what the longest pair needs")
    return keep()


RULES: Table = {
    **hf.TRAINER,
    **hf.LOSS_PARTS,
    "model_name_or_path": keep("model"),
    "ref_model_name_or_path": keep("reference"),
    "model_revision": unsupported(hf.REVISION, off=(None, "", "main")),
    "model_code_revision": drop(hf.NO_CODE),
    "tokenizer_name_or_path": unsupported("the tokenizer is the model's own"),
    "chat_template": unsupported(hf.TEMPLATE_FILE),
    "chat_template_path": _template_path,
    "chat_template_kwargs": keep(reason=hf.READ_BY_TEMPLATE, off=(None,)),
    "model_init_kwargs ref_model_init_kwargs": unsupported(
        "the model is loaded as its own config.json says"
    ),
    "load_in_8bit load_in_4bit": unsupported(hf.QUANTISED),
    "bnb_* use_bnb_nested_quant": drop(hf.QUANTISED_PARTS),
    "ignore_bias_buffers": drop(hf.DEVICES),
    "router_aux_loss_coef": unsupported("mixtures of experts have no auxiliary loss here"),
    "env": drop("set environment variables in the shell", matters=True),
    "loss_type": loss,
    "max_length": _max_length,
    "max_prompt_length max_completion_length max_target_length": drop(hf.BUDGET, matters=True),
    "truncation_mode": drop(
        "a dialogue that is too long loses its oldest turns, then the prompt its oldest tokens, "
        "and then completions their ends (truncation)",
        matters=True,
    ),
    "padding_free": same(hf.NO_PADDING),
    "padding_value label_pad_token_id pad_to_multiple_of": drop(hf.NO_PADDING),
    "pad_token": drop("the tokenizer's own"),
    "use_logits_to_keep use_num_logits_to_keep": drop(hf.COMPLETIONS_ONLY),
    "precompute_ref_log_probs disable_dropout": same(hf.ALWAYS),
    "precompute_ref_batch_size": drop("stream_tokens bounds what goes through at once"),
    "generate_during_eval": drop("answers are drawn at the end: generate_prompts"),
    "force_use_ref_model": drop("the reference is the start of the policy, or reference"),
    "dataset_num_proc preprocessing_num_workers": drop(hf.LOADING),
    "tools": unsupported("tools are read from the rows, or from a JSON file (tools)"),
    "base_model_attribute_name": drop(hf.MODEL_FOLDER),
    "model_adapter_name": drop("there is one adapter"),
    "ref_adapter_name": drop("the reference is the policy with its adapter off"),
    "rpo_alpha": where_known(hf.OTHER_LOSS),
    "cpo_alpha simpo_gamma": keep(),
    "is_encoder_decoder": unsupported("decoder models alone are trained"),
    "alpha": unsupported("AlphaPO is not one of smoldpo's losses: leave it out"),
    "trainer_type": drop("loss_type says it"),
    "gamma_beta_ratio sft_weight": drop("of SimPO"),
    "use_flash_attention_2": drop(hf.ENGINE),
}


def data(draft: Draft) -> None:
    """dataset_name with its config and splits, or a list of `datasets`."""
    recipe = draft.recipe
    draft.apply({"dataset_streaming streaming": drop(hf.LOADING)})
    if "datasets" in recipe:
        sources = items(recipe["datasets"])
        set_sources(draft, "datasets", sources_of(sources, "path", "name", "fraction"))
        inner_keys(draft, "datasets", sources, "path name fraction")
        names = "dataset_name dataset_config dataset_train_split dataset_test_split"
        draft.apply({"test_split_size": held_out_share, names: drop("datasets says it")})
        draft.held_out = "eval_fraction" in draft.settings
    elif recipe.get("dataset_name") is not None:
        subset, split, test = (
            text(recipe.get(f"dataset_{part}")) for part in ("config", "train_split", "test_split")
        )
        name = str(recipe["dataset_name"])
        set_sources(draft, "dataset_name", [RecipeSource(name, subset, split)])
        for key, setting in (
            ("dataset_config", "data_subset"),
            ("dataset_train_split", "data_split"),
        ):
            taken = setting in draft.settings
            value = draft.settings.get(setting)
            draft.apply({key: keep(setting, value) if taken else drop("taken by default")})
        _test_split(draft, RecipeSource(name, subset, test))


def _test_split(draft: Draft, source: RecipeSource) -> None:
    key = "dataset_test_split"
    if key not in draft.recipe:
        return
    draft.held_out = source.split is None or source.is_held_out
    evaluates = not is_off(
        draft.recipe.get("eval_strategy", draft.recipe.get("evaluation_strategy"))
    )
    if draft.held_out:
        rule = drop("the data's own test split is what smoldpo evaluates on")
    elif not evaluates:
        rule = drop("the recipe does not evaluate")
    else:
        draft.held_out = True
        why = "write the file first, with the command below"
        rule = keep("eval_data", as_file(draft, source), why, matters=True)
    draft.decide(key, rule)


def adapter(draft: Draft) -> None:
    """LoRA's keys, with peft's default of what gets adapters."""
    kind = None if is_off(draft.recipe.get("use_peft")) else "lora"
    adapters(draft, kind, "use_peft", ADAPTER_KEYS)
    if kind and is_off(draft.recipe.get("lora_target_modules")):
        targets = ["q_proj", "v_proj"]
        draft.default("(adapters)", "lora_target_modules", targets, "peft's own for Llama models")


DIALECT = Dialect(
    "TRL",
    "model_name_or_path dataset_name",
    (
        data,
        adapter,
        {**hf.PRECISION, "torch_dtype dtype": hf.weights_dtype},
        optimizers.schedule,
        optimizers.optimizer,
        optimizers.MOVING_REFERENCE,
        hf.saving,
        hf.evaluating,
    ),
    RULES,
    {
        "learning_rate": 1e-6,
        "lr_scheduler_type": "linear",
        "warmup_ratio": 0.0,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 3.0,
    },
)


def _handbook_data(draft: Draft) -> None:
    """Its own mixtures, or TRL's keys."""
    if "dataset_mixer" in draft.recipe:
        _dataset_mixer(draft)
    elif "dataset_mixture" in draft.recipe:
        _dataset_mixture(draft)
    else:
        data(draft)


def _dataset_mixer(draft: Draft) -> None:
    """The older form: a mapping of names to shares, and the splits that all of them have."""
    recipe = draft.recipe
    mixer = recipe["dataset_mixer"]
    names = list(mixer) if isinstance(mixer, dict) else []
    splits = [str(split) for split in listed(recipe.get("dataset_splits"))] or ["train", "test"]
    configs = listed(recipe.get("dataset_configs")) or [None] * len(names)
    sources = [
        RecipeSource(str(name), text(config), split, number(mixer[name]))
        for name, config in zip(names, configs, strict=False)
        for split in splits
        if "train" in split
    ]
    set_sources(draft, "dataset_mixer", sources, of_source=True)
    why = "data_split has the train split; the data's own test split judges"
    draft.apply({"dataset_splits": same(why, ()), "dataset_configs": same("in data_subset", ())})
    draft.held_out = any("test" in split for split in splits)


def _dataset_mixture(draft: Draft) -> None:
    """The newer form: a list of datasets with split and share, and the share that is held out."""
    mixture: Any = draft.recipe["dataset_mixture"]
    if not isinstance(mixture, dict):
        return
    listed_sources = items(mixture.get("datasets"))
    sources = sources_of(listed_sources, "id", "config", "weight")
    key = "dataset_mixture.datasets"
    set_sources(draft, key, sources, of_source=True)
    inner_keys(draft, key, listed_sources, "id config weight")
    held = any(source.is_held_out for source in sources)
    for name, value in mixture.items():
        if name == "seed":
            rule = drop("of the shuffle before the split; smoldpo splits by prompts")
        elif name == "test_split_size" and held:
            rule = drop("pairs are held out by the data's own test split, not at random")
        elif value is None:
            rule = drop("empty")
        elif name == "test_split_size":
            rule = held_out_share(draft, key, value)
        else:
            rule = refuse("not known of a mixture")
        if name != "datasets":
            draft.decide(f"dataset_mixture.{name}", rule)
    draft.held_out = held or "eval_fraction" in draft.settings


HANDBOOK = replace(
    DIALECT,
    title="the alignment handbook",
    own_keys="dataset_mixer dataset_splits dataset_configs dataset_mixture",
    steps=(_handbook_data, *DIALECT.steps[1:]),
    rules={
        **RULES,
        "auto_insert_empty_system_msg": unsupported(
            "no empty system message is put before a prompt; the model's own template may add one"
        ),
        "text_column": drop(hf.SCHEMA),
        "dataset_kwargs": drop(hf.LOADING),
    },
)
