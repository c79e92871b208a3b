"""axolotl: `axolotl train recipe.yaml` with `rl: dpo`, ipo, orpo or simpo."""

from __future__ import annotations

from typing import Any

from smoldpo.config.importers import hf_trainer, optimizers
from smoldpo.config.importers.adapters import adapters
from smoldpo.config.importers.datasets import RecipeSource, set_held_out_share, set_sources
from smoldpo.config.importers.mapping import (
    Draft,
    Rules,
    drop,
    is_off,
    keep,
    loss,
    number,
    same,
    to,
    unsupported,
    where_known,
)

PER_EPOCH = "counted in epochs: set {setting} to a number of steps"
TOKENIZER = "the tokenizer is the model's own"
ADAPTER_KEYS = (
    *("lora_r", "lora_alpha", "lora_dropout", "lora_target_linear", "lora_target_modules"),
    *("lora_target_parameters", "lora_fan_in_fan_out", "lora_modules_to_save", "lora_model_dir"),
    *(
        "lora_layers_to_transform",
        "lora_on_cpu",
        "peft_use_rslora",
        "peft_use_dora",
        "peft_layers_to_transform",
    ),
    *(
        "loraplus_lr_ratio",
        "loraplus_lr_embedding",
        "lora_mlp_kernel",
        "lora_qkv_kernel",
        "lora_o_kernel",
    ),
    *("peft", "peft_init_lora_weights", "merge_lora"),
)
SCHEMAS = {
    "argilla": "chatml",
    "argilla_chat": "implicit",
    "icr": "chatml",
    "intel": "orca",
    "prompt_pairs": "explicit",
    "ultra": "explicit or ultrafeedback",
    "nectar": "none of smoldpo's",
}
"""The last word of a dataset's `type`, and what smoldpo calls a row of that shape."""
FIELDS = {
    "field_messages": "messages",
    "field_prompt": "prompt",
    "field_system": "system",
    "field_chosen": "chosen",
    "field_rejected": "rejected",
}
FORMATS = {
    "prompt_format": "{prompt}",
    "chosen_format": "{chosen}",
    "rejected_format": "{rejected}",
}


def _template(draft: Draft, key: str, value: Any) -> None:
    if value == "tokenizer_default":
        draft.same(key, "the model's own tokenizer has it")
    else:
        drop(hf_trainer.TEMPLATE, matters=True)(draft, key, value)


RULES: Rules = {
    **hf_trainer.TRAINER,
    **hf_trainer.LOSS_PARTS,
    "base_model": to("model"),
    "base_model_config": drop("read from the model's folder"),
    "model_type": drop("read from the model's folder"),
    "is_*_derived_model": drop("read from the model's folder"),
    "revision_of_model": unsupported(
        "a hub id is read at its newest revision: download this one and set model to its folder"
    ),
    "tokenizer_type": drop(TOKENIZER),
    "tokenizer_config": unsupported(TOKENIZER),
    "tokenizer_use_fast": drop(TOKENIZER),
    "tokenizer_legacy": drop(TOKENIZER),
    "special_tokens": unsupported(
        TOKENIZER + ": save it with these tokens into the model's folder"
    ),
    "added_tokens_overrides": unsupported(TOKENIZER),
    "tokens": unsupported(TOKENIZER + ": the vocabulary stays as it is"),
    "chat_template": _template,
    "chat_template_jinja": unsupported(hf_trainer.TEMPLATE),
    "default_system_message": unsupported("system messages are read from the rows"),
    "load_in_8bit": unsupported(hf_trainer.QUANTISED),
    "load_in_4bit": unsupported(hf_trainer.QUANTISED),
    "bnb_config_kwargs": drop("of quantised weights"),
    "gptq": unsupported(hf_trainer.QUANTISED),
    "unfrozen_parameters": unsupported(
        "regular expressions there: set train to name patterns as file names have them, such as '*.mlp.*'"
    ),
    "trl.beta": to("beta"),
    "rl_beta": to("beta"),
    "dpo_beta": to("beta"),
    "orpo_alpha": drop("of ORPO"),
    "cpo_alpha": to("cpo_alpha"),
    "simpo_gamma": to("simpo_gamma"),
    "kto_*": drop("of KTO"),
    "dpo_label_smoothing": to("label_smoothing"),
    "dpo_loss_type": loss,
    "dpo_loss_weights": where_known(hf_trainer.OTHER_LOSS, "loss_weights"),
    "dpo_use_weighting": where_known(hf_trainer.OTHER_LOSS, "use_weighting"),
    "dpo_norm_loss": unsupported(hf_trainer.OTHER_LOSS),
    "dpo_padding_free": drop("the fast engine never pads"),
    "dpo_use_logits_to_keep": drop("always so: the LM head runs on completions only"),
    "dpo_generate_during_eval": drop("answers are drawn at the end: generate_prompts"),
    "precompute_ref_log_probs": same("always so"),
    "remove_unused_columns": drop("columns that are not read are listed in data.json"),
    "sequence_len": to("max_length"),
    "excess_length_strategy": drop(
        "a pair that is too long loses its prompt's oldest tokens", matters=True
    ),
    "sample_packing*": drop("the fast engine packs by itself, with the same result"),
    "eval_sample_packing": drop("the fast engine packs by itself, with the same result"),
    "pad_to_sequence_len": drop("the fast engine never pads"),
    "train_on_inputs": unsupported("completions alone are scored"),
    "micro_batch_size": to("per_device_train_batch_size"),
    "eval_batch_size": to("per_device_eval_batch_size"),
    "num_epochs": to("num_train_epochs"),
    "cosine_constant_lr_ratio": unsupported("the schedule has no such part"),
    "lr_quadratic_warmup": unsupported("warm-up is linear"),
    "evals_per_epoch": unsupported(PER_EPOCH.format(setting="eval_steps")),
    "saves_per_epoch": unsupported(PER_EPOCH.format(setting="save_steps")),
    "eval_table_size": drop(hf_trainer.SHOWN),
    "eval_max_new_tokens": drop("answers are drawn at the end: max_new_tokens"),
    "eval_causal_lm_metrics": drop(hf_trainer.SHOWN),
    "do_bench_eval": unsupported("no benchmarks are run"),
    "logging_steps": keep,
    "dataset_prepared_path": drop(hf_trainer.LOADING),
    "dataset_processes": drop(hf_trainer.LOADING),
    "dataset_num_proc": drop(hf_trainer.LOADING),
    "dataset_keep_in_memory": drop(hf_trainer.LOADING),
    "push_dataset_to_hub": drop(hf_trainer.HUB),
    "skip_prepare_dataset": drop(hf_trainer.LOADING),
    "shuffle_merged_datasets": drop("the pairs are shuffled in every epoch, by seed"),
    "dataset_exact_deduplication": same("within each source: the cleaning rule exact_duplicate"),
    "hf_use_auth_token": drop("set HF_TOKEN in the shell"),
    "wandb_*": drop(hf_trainer.LOGGERS),
    "use_wandb": drop(hf_trainer.LOGGERS),
    "mlflow_*": drop(hf_trainer.LOGGERS),
    "use_mlflow": drop(hf_trainer.LOGGERS),
    "comet_*": drop(hf_trainer.LOGGERS),
    "use_comet": drop(hf_trainer.LOGGERS),
    "use_tensorboard": drop(hf_trainer.LOGGERS),
    "flash_attention": drop(hf_trainer.ENGINE),
    "flash_attn_*": drop(hf_trainer.ENGINE),
    "flash_optimum": drop(hf_trainer.ENGINE),
    "xformers_attention": drop(hf_trainer.ENGINE),
    "sdp_attention": drop(hf_trainer.ENGINE),
    "eager_attention": drop(hf_trainer.ENGINE),
    "flex_attention": drop(hf_trainer.ENGINE),
    "s2_attention": unsupported("attention is the model's own"),
    "liger_*": drop(hf_trainer.ENGINE),
    "eot_tokens": unsupported(TOKENIZER),
    "loss_watchdog_*": unsupported("a loss that is no number ends the run; nothing else does"),
    "dp_*_size": drop(hf_trainer.DEVICES),
    "plugins": unsupported("there are no plugins"),
    "auto_resume_from_checkpoints": unsupported("a run starts at its beginning"),
    "strict": drop("unknown keys are always an error"),
    "low_cpu_mem_usage": drop(hf_trainer.MEMORY),
    "gc_steps": drop(hf_trainer.MEMORY),
    "device_map": drop(hf_trainer.DEVICES),
    "device": drop("device: auto takes the GPU where there is one"),
    "gpu_memory_limit": drop("max_tokens bounds memory"),
    "max_memory": drop("max_tokens bounds memory"),
    "world_size": drop(hf_trainer.DEVICES),
    "*_parallel_*": drop(hf_trainer.DEVICES),
    "trl.*": unsupported("not known of DPO"),
}
DEFAULTS = {
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.03,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 1.0,
    "max_length": 512,
}
NESTED = ("trl",)


def groups(draft: Draft) -> None:
    """The keys that hang together."""
    _method(draft)
    _data(draft)
    kind = draft.recipe.get("adapter")
    adapters(draft, None if is_off(kind) else f"{kind}", "adapter", ADAPTER_KEYS)
    hf_trainer.precision(draft, "torch_dtype")
    optimizers.lowest_cosine_rate(draft)
    optimizers.schedule(draft, "lr_scheduler")
    optimizers.optimizer(draft, "optimizer")
    optimizers.own_rates(draft, adapters=not is_off(kind))
    optimizers.moving_reference(draft)
    hf_trainer.clipping(draft)
    hf_trainer.length_of_run(draft)
    _total_batch(draft)
    hf_trainer.saving(draft)
    evaluates = _evaluates(draft)
    hf_trainer.evaluating(draft, held_out=evaluates, untold="steps" if evaluates else "no")


def _method(draft: Draft) -> None:
    if draft.recipe.get("rl") == "dpo":
        draft.same("rl", "smoldpo trains DPO")
        for key in draft.without("cpo_alpha", "simpo_gamma"):
            draft.drop(key, "of CPO and SimPO")
    elif draft.method == "dpo":
        loss(draft, "rl", draft.recipe.get("rl"))


def _evaluates(draft: Draft) -> bool:
    return any(name in draft.settings for name in ("eval_fraction", "eval_data"))


def _total_batch(draft: Draft) -> None:
    """batch_size is the whole step's: with micro_batch_size it says the accumulation."""
    for key in draft.without("batch_size"):
        total, micro = number(draft.recipe[key]), number(draft.recipe.get("micro_batch_size", 1))
        if total is None or "gradient_accumulation_steps" in draft.recipe:
            draft.drop(key, "gradient_accumulation_steps says it")
        elif not micro or total % micro:
            draft.refuse(key, "not a multiple of micro_batch_size: set gradient_accumulation_steps")
        else:
            draft.keep(key, "gradient_accumulation_steps", int(total // micro), "as on one GPU")


def _data(draft: Draft) -> None:
    """`datasets`, and what is held out of them: a share, or `test_datasets`."""
    entries = _entries(draft.recipe.get("datasets"))
    if "datasets" in draft.recipe:
        set_sources(draft, "datasets", [_source(entry) for entry in entries], "share of the mix")
        _inner(draft, entries)
    for key in draft.without("test_datasets"):
        judges = [_source(entry) for entry in _entries(draft.recipe[key])]
        if (
            len(judges) == 1
            and judges[0].subset is None
            and judges[0].split in (None, "train", "test")
        ):
            draft.keep(key, "eval_data", judges[0].name)
        else:
            draft.refuse(key, "write the pairs to one file and set eval_data")
    for key in draft.without("val_set_size"):
        value = draft.recipe[key]
        draft.drop(key, "empty") if value is None else set_held_out_share(draft, key, value)


def _entries(value: Any) -> list[dict[str, Any]]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _source(entry: dict[str, Any]) -> RecipeSource:
    """A path; of a reader's kind (`json`), the file that it reads."""
    files = entry.get("data_files")
    files = files if isinstance(files, list) else [files] if files else []
    name = files[0] if len(files) == 1 else entry.get("path")
    subset, split = entry.get("name"), entry.get("split")
    return RecipeSource(str(name), subset and str(subset), split and str(split))


def _inner(draft: Draft, entries: list[dict[str, Any]]) -> None:
    """What else the datasets say: how their rows look. Columns go into `columns`."""
    columns: dict[str, str] = {}
    for entry in entries:
        shape = {**entry, **entry["type"]} if isinstance(entry.get("type"), dict) else entry
        for name, value in shape.items():
            if name in FIELDS and value and value != FIELDS[name]:
                columns[FIELDS[name]] = str(value)
            _inner_key(draft, f"datasets.{name}", str(name), value)
    if columns:
        draft.settings["columns"] = [f"{name}={ours}" for name, ours in columns.items()]
        draft.origins["columns"] = "datasets"


def _inner_key(draft: Draft, key: str, name: str, value: Any) -> None:
    if name in ("path", "name", "split"):
        return
    if name in FIELDS:
        reason = "in columns" if value != FIELDS[name] else "the usual name"
        draft.drop(key, reason)
    elif name == "type":
        draft.drop(key, _shape(value))
    elif name in FORMATS and value == FORMATS[name]:
        draft.drop(key, "nothing is put around the text")
    elif name == "ds_type" or name == "data_files":
        draft.drop(key, "the kind of a file is seen by its name")
    elif name == "message_property_mappings" and value == {"role": "role", "content": "content"}:
        draft.drop(key, "the usual names")
    elif name == "roles":
        draft.drop(key, "roles are known by many names (docs/data-reading.md)")
    else:
        draft.refuse(
            key,
            "not known of a source; write the pairs to a file in one of docs/data-reading.md's schemas",
        )


def _shape(value: Any) -> str:
    if not isinstance(value, str):
        return "the schema is found by looking at the rows"
    schema = SCHEMAS.get(value.rpartition(".")[2])
    seen = (
        f"the schema is found by looking at the rows: {schema} here"
        if schema
        else ("the schema is found by looking at the rows")
    )
    return f"{seen}; the chat template is the model's own"
