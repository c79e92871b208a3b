"""axolotl: `axolotl train recipe.yaml` with `rl: dpo`, ipo, orpo or simpo."""

from __future__ import annotations

from typing import Any

from smoldpo.config.importers import hf_trainer as hf
from smoldpo.config.importers import optimizers
from smoldpo.config.importers.adapters import adapters
from smoldpo.config.importers.datasets import RecipeSource, held_out_share, items, set_sources
from smoldpo.config.importers.mapping import (
    Dialect,
    Draft,
    Rule,
    Table,
    drop,
    is_off,
    keep,
    loss,
    number,
    refuse,
    same,
    unsupported,
    where_known,
)

PER_EPOCH = "counted in epochs: set {setting} to a number of steps"
TOKENIZER = "the tokenizer is the model's own"
PACKING = "the fast engine packs by itself, with the same result"
MEMORY_BOUND = "stream_tokens bounds memory"
ADAPTER_KEYS = (
    "lora_r lora_alpha lora_dropout lora_target_linear lora_target_modules lora_target_parameters "
    "lora_fan_in_fan_out lora_modules_to_save lora_model_dir lora_layers_to_transform lora_on_cpu "
    "peft_use_rslora peft_use_dora peft_layers_to_transform loraplus_lr_ratio "
    "loraplus_lr_embedding lora_mlp_kernel lora_qkv_kernel lora_o_kernel peft "
    "peft_init_lora_weights merge_lora"
)


def _template(draft: Draft, key: str, value: Any) -> Rule:
    if value == "tokenizer_default":
        return same("the model's own tokenizer has it", ())
    return drop(hf.TEMPLATE, matters=True)


def _jinja(draft: Draft, key: str, value: Any) -> Rule:
    """A path, or the template itself."""
    if isinstance(value, str) and "{" not in value and value.strip():
        return keep("chat_template", value.strip())
    return unsupported(hf.TEMPLATE_FILE)


def _template_kwargs(draft: Draft, key: str, value: Any) -> Rule:
    if isinstance(value, dict) and value:
        return keep("chat_template_kwargs", value, hf.READ_BY_TEMPLATE)
    return drop("off in the recipe")


RULES: Table = {
    **hf.TRAINER,
    **hf.LOSS_PARTS,
    "base_model": keep("model"),
    "base_model_config model_type is_*_derived_model": drop(hf.MODEL_FOLDER),
    "revision_of_model": unsupported(hf.REVISION),
    "tokenizer_type tokenizer_use_fast tokenizer_legacy": drop(TOKENIZER),
    "tokenizer_config added_tokens_overrides eot_tokens": unsupported(TOKENIZER),
    "special_tokens": unsupported(
        f"{TOKENIZER}: save it with these tokens into the model's folder"
    ),
    "tokens": unsupported(f"{TOKENIZER}: the vocabulary stays as it is"),
    "chat_template": _template,
    "chat_template_jinja": _jinja,
    "chat_template_kwargs": _template_kwargs,
    "default_system_message": unsupported(hf.SYSTEM),
    "load_in_8bit load_in_4bit gptq": unsupported(hf.QUANTISED),
    "bnb_config_kwargs": drop(hf.QUANTISED_PARTS),
    "unfrozen_parameters": unsupported(
        "regular expressions there: set train to name patterns as file names have them, such as "
        "'*.mlp.*'"
    ),
    "trl.beta rl_beta dpo_beta": keep("beta"),
    "orpo_alpha": drop("of ORPO"),
    "cpo_alpha simpo_gamma": keep(),
    "kto_*": drop("of KTO"),
    "dpo_label_smoothing": keep("label_smoothing"),
    "dpo_loss_type": loss,
    "dpo_loss_weights": where_known(hf.OTHER_LOSS, "loss_weights"),
    "dpo_use_weighting": where_known(hf.OTHER_LOSS, "use_weighting"),
    "dpo_norm_loss": unsupported(hf.OTHER_LOSS),
    "dpo_padding_free pad_to_sequence_len": drop(hf.NO_PADDING),
    "dpo_use_logits_to_keep": drop(hf.COMPLETIONS_ONLY),
    "dpo_generate_during_eval": drop("answers are drawn at the end: generate_prompts"),
    "precompute_ref_log_probs": same(hf.ALWAYS),
    "sequence_len": keep("max_length"),
    "excess_length_strategy": drop(
        "a pair that is too long loses its prompt's oldest tokens", matters=True
    ),
    "sample_packing* eval_sample_packing": drop(PACKING),
    "train_on_inputs": unsupported(hf.COMPLETIONS),
    "micro_batch_size": keep("per_device_train_batch_size"),
    "eval_batch_size": keep("per_device_eval_batch_size"),
    "num_epochs": keep("num_train_epochs"),
    "cosine_constant_lr_ratio": unsupported("the schedule has no such part"),
    "lr_quadratic_warmup": unsupported("warm-up is linear"),
    "evals_per_epoch": unsupported(PER_EPOCH.format(setting="eval_steps")),
    "saves_per_epoch": unsupported(PER_EPOCH.format(setting="save_steps")),
    "eval_table_size eval_causal_lm_metrics": drop(hf.SHOWN),
    "eval_max_new_tokens": drop("answers are drawn at the end: max_new_tokens"),
    "do_bench_eval": unsupported("no benchmarks are run"),
    "dataset_prepared_path dataset_processes dataset_num_proc dataset_keep_in_memory "
    "skip_prepare_dataset": drop(hf.LOADING),
    "push_dataset_to_hub": drop(hf.HUB),
    "shuffle_merged_datasets": drop("the pairs are shuffled in every epoch, by seed"),
    "dataset_exact_deduplication": same("within each source: the cleaning rule exact_duplicate"),
    "hf_use_auth_token": drop(hf.TOKEN),
    "wandb_* use_wandb mlflow_* use_mlflow comet_* use_comet use_tensorboard": drop(hf.LOGGERS),
    "flash_attention flash_attn_* flash_optimum xformers_attention sdp_attention eager_attention "
    "flex_attention liger_*": drop(hf.ENGINE),
    "s2_attention": unsupported(hf.ATTENTION),
    "loss_watchdog_*": unsupported("a loss that is no number ends the run; nothing else does"),
    "plugins": unsupported("there are no plugins"),
    "auto_resume_from_checkpoints": unsupported(hf.BEGINNING),
    "strict": drop("unknown keys are always an error"),
    "low_cpu_mem_usage gc_steps": drop(hf.MEMORY),
    "dp_*_size device_map world_size *_parallel_*": drop(hf.DEVICES),
    "device": drop(hf.DEVICE),
    "gpu_memory_limit max_memory": drop(MEMORY_BOUND),
    "trl.*": unsupported("not known of DPO"),
}


def _method(draft: Draft) -> None:
    if draft.recipe.get("rl") == "dpo":
        draft.decide("rl", same("smoldpo trains DPO", ()))
        draft.apply({"cpo_alpha simpo_gamma": drop("of CPO and SimPO")})
    elif draft.method == "dpo":
        draft.decide("rl", loss)


def _adapter(draft: Draft) -> None:
    kind = draft.recipe.get("adapter")
    adapters(draft, None if is_off(kind) else f"{kind}", "adapter", ADAPTER_KEYS)


def _total_batch(draft: Draft, key: str, value: Any) -> Rule:
    """batch_size is the whole step's: with micro_batch_size it says the accumulation."""
    total, micro = number(value), number(draft.recipe.get("micro_batch_size", 1))
    if total is None or "gradient_accumulation_steps" in draft.recipe:
        return drop("gradient_accumulation_steps says it")
    if not micro or total % micro:
        return refuse("not a multiple of micro_batch_size: set gradient_accumulation_steps")
    return keep("gradient_accumulation_steps", int(total // micro), "as on one GPU")


def _data(draft: Draft) -> None:
    """`datasets`, and what is held out of them: a share, or `test_datasets`."""
    listed = items(draft.recipe.get("datasets"))
    if "datasets" in draft.recipe:
        set_sources(draft, "datasets", [_source(item) for item in listed])
        _inner_keys(draft, listed)
    draft.apply({"test_datasets": _test_datasets, "val_set_size": _val_set_size})
    if {"eval_fraction", "eval_data"} & draft.settings.keys():
        draft.held_out, draft.eval_strategy = True, "steps"


def _test_datasets(draft: Draft, key: str, value: Any) -> Rule:
    sources = [_source(item) for item in items(value)]
    if len(sources) == 1 and sources[0].subset_and_split in ((None, None), (None, "test")):
        return keep("eval_data", sources[0].name)
    return refuse("write the pairs to one file and set eval_data")


def _val_set_size(draft: Draft, key: str, value: Any) -> Rule:
    return drop("empty") if value is None else held_out_share(draft, key, value)


def _source(item: dict[str, Any]) -> RecipeSource:
    """A path; of a reader's kind (`json`), the file that it reads."""
    files = item.get("data_files")
    files = files if isinstance(files, list) else [files] if files else []
    name = files[0] if len(files) == 1 else item.get("path")
    subset, split = item.get("name"), item.get("split")
    return RecipeSource(str(name), subset and str(subset), split and str(split))


FIELDS = {
    "field_messages": "messages",
    "field_prompt": "prompt",
    "field_system": "system",
    "field_chosen": "chosen",
    "field_rejected": "rejected",
}
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
USUAL = {
    "prompt_format": ("{prompt}", "nothing is put around the text"),
    "chosen_format": ("{chosen}", "nothing is put around the text"),
    "rejected_format": ("{rejected}", "nothing is put around the text"),
    "message_property_mappings": ({"role": "role", "content": "content"}, "the usual names"),
}
"""Keys of a dataset with the value that changes nothing."""


def _inner_keys(draft: Draft, listed: list[dict[str, Any]]) -> None:
    """What else the datasets say: how their rows look. Columns go into `columns`."""
    columns: dict[str, str] = {}
    for item in listed:
        shape = {**item, **item["type"]} if isinstance(item.get("type"), dict) else item
        for name, value in shape.items():
            if name in FIELDS and value and value != FIELDS[name]:
                columns[FIELDS[name]] = str(value)
            if name not in ("path", "name", "split"):
                draft.decide(f"datasets.{name}", _of_dataset(str(name), value))
    if columns:
        draft.settings["columns"] = [f"{name}={ours}" for name, ours in columns.items()]
        draft.origins["columns"] = "datasets"


def _of_dataset(name: str, value: Any) -> Rule:
    if name in FIELDS:
        return drop("in columns" if value != FIELDS[name] else "the usual name")
    if name == "type":
        schema = SCHEMAS.get(value.rpartition(".")[2]) if isinstance(value, str) else None
        seen = f"{hf.SCHEMA}: {schema} here" if schema else hf.SCHEMA
        template = "; the chat template is the model's own" if isinstance(value, str) else ""
        return drop(seen + template)
    if name in USUAL and value == USUAL[name][0]:
        return drop(USUAL[name][1])
    if name in ("ds_type", "data_files"):
        return drop("the kind of a file is seen by its name")
    if name == "roles":
        return drop("roles are known by many names (docs/data-reading.md)")
    return refuse(
        "not known of a source; write the pairs to a file in one of docs/data-reading.md's schemas"
    )


DIALECT = Dialect(
    "axolotl",
    "base_model rl micro_batch_size sequence_len num_epochs val_set_size adapter",
    (
        _method,
        _data,
        _adapter,
        {
            **hf.PRECISION,
            "torch_dtype": hf.weights_dtype,
            "cosine_min_lr_ratio": optimizers.lowest_cosine_rate,
        },
        lambda draft: optimizers.schedule(draft, "lr_scheduler"),
        lambda draft: optimizers.optimizer(draft, "optimizer"),
        optimizers.own_rates,
        {**optimizers.MOVING_REFERENCE, "batch_size": _total_batch},
        hf.saving,
        hf.evaluating,
    ),
    RULES,
    {
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.03,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 1.0,
        "max_length": 512,
    },
    nested="trl",
)
