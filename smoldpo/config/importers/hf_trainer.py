"""Keys of Hugging Face's trainers, which TRL, the alignment handbook and LLaMA-Factory share."""

from __future__ import annotations

from typing import Any

from smoldpo.config.importers.mapping import (
    Draft,
    Rules,
    complaint,
    drop,
    is_off,
    keep,
    number,
    same,
    unsupported,
    where_known,
)
from smoldpo.config.losses import needs_reference
from smoldpo.config.schema import TrainConfig

LOGGERS = "smoldpo writes metrics.jsonl and report.html in the run folder; report_to adds others"
HUB = "nothing is uploaded; the model is in the run folder, with its card"
MEMORY = "nothing to recompute: the fast engine's memory is flat (max_tokens bounds it)"
DEVICES = "one process on one device"
LOADING = "the data is read, tokenised and kept by smoldpo itself"
ENGINE = "the engine has its own exact kernels"
OWN_MODEL = "read from the model's folder"
SHOWN = "no such output"
BEST = "needs evaluations every so many steps: set eval_steps too"
BUDGET = "smoldpo has one budget for prompt and completion together, max_length"
TEMPLATE = (
    "prompts get the chat template of the model's own tokenizer; look with smoldpo data show DATA --row 1 "
    "--model MODEL"
)
QUANTISED = "weights are not quantised: a small model needs no 4 or 8 bits"
OTHER_LOSS = "part of a loss that smoldpo does not have (yet); leave it out, or train this with TRL"
NOISE = "smoldpo trains without dropout and noise, as exactness needs"
HELD_OUT = (
    "The recipe evaluates on nothing. smoldpo does: on the data's own test split, or else on "
    f"{TrainConfig.model_fields['eval_fraction'].default:.0%} of the prompts, which it then does not "
    "train on. eval_fraction: 0 trains on all of them"
)


def _report_to(draft: Draft, key: str, value: Any) -> None:
    """Left out: it would tell a service, and need its package, because somebody else's recipe says so."""
    names = value if isinstance(value, list) else [value]
    known = not is_off(value) and complaint("report_to", names) is None
    draft.drop(key, f"left to you: --report-to {','.join(names)}" if known else LOGGERS)


LOSS_PARTS: Rules = {
    "loss_weights": where_known(OTHER_LOSS),
    "rpo_alpha": where_known(OTHER_LOSS),
    "ld_alpha": where_known(OTHER_LOSS, off=(None, 1, 1.0)),
    "use_weighting": where_known(OTHER_LOSS),
    "f_divergence_type": where_known(OTHER_LOSS, off=(None, "reverse_kl")),
    "f_alpha_divergence_coef": where_known(OTHER_LOSS, off=(None, 1, 1.0, 0.5)),
    "discopop_tau": where_known(OTHER_LOSS, off=(None, 0.05)),
    "reference_free": where_known(OTHER_LOSS),
    "label_smoothing": keep,
    "beta": keep,
}

TRAINER: Rules = {
    "learning_rate": keep,
    "per_device_train_batch_size": keep,
    "gradient_accumulation_steps": keep,
    "per_device_eval_batch_size": keep,
    "num_train_epochs": keep,
    "weight_decay": keep,
    "adam_beta1": keep,
    "adam_beta2": keep,
    "adam_epsilon": keep,
    "seed": keep,
    "logging_steps": keep,
    "output_dir": keep,
    "run_name": drop("the run has the name of its folder, output_dir"),
    "overwrite_output_dir": drop(
        "a folder that holds a run is refused unless --overwrite is given"
    ),
    "do_train": drop("smoldpo train trains"),
    "do_predict": unsupported("no predictions are written; smoldpo evaluate --rows does that"),
    "data_seed": unsupported("one seed decides the order of the pairs: seed"),
    "resume_from_checkpoint": where_known("start from the checkpoint's folder: set model"),
    "optim_target_modules": unsupported("set train, or lora_target_modules"),
    "neftune_noise_alpha": where_known(NOISE),
    "label_smoothing_factor": unsupported("smooths SFT's labels; DPO's are label_smoothing"),
    "auto_find_batch_size": unsupported(
        "set per_device_train_batch_size; memory is bounded by max_tokens"
    ),
    "group_by_length": drop("the order of the pairs follows from seed alone", matters=True),
    "train_sampling_strategy": drop("the order of the pairs follows from seed alone"),
    "length_column_name": drop("of group_by_length"),
    "dataloader_drop_last": unsupported("the last batch of an epoch is used, though it is smaller"),
    "dataloader_*": drop(LOADING),
    "average_tokens_across_devices": drop(DEVICES),
    "ddp_*": drop(DEVICES),
    "deepspeed*": drop(DEVICES + "; a small model needs no sharding", matters=True),
    "fsdp*": drop(DEVICES + "; a small model needs no sharding", matters=True),
    "num_processes": drop(DEVICES, matters=True),
    "num_machines": drop(DEVICES, matters=True),
    "accelerate_config": drop(DEVICES, matters=True),
    "accelerator_config": drop(DEVICES),
    "parallelism_config": drop(DEVICES),
    "local_rank": drop(DEVICES),
    "log_on_each_node": drop(DEVICES),
    "save_on_each_node": drop(DEVICES),
    "use_cpu": drop("device: auto takes the GPU where there is one"),
    "no_cuda": drop("device: auto takes the GPU where there is one"),
    "gradient_checkpointing*": drop(MEMORY),
    "activation_*": drop(MEMORY),
    "torch_empty_cache_steps": drop(MEMORY),
    "eval_accumulation_steps": drop(MEMORY),
    "use_cache": drop(MEMORY),
    "torch_compile*": drop("compile: auto decides by whether it pays"),
    "use_liger_kernel": drop(ENGINE),
    "liger_kernel_config": drop(ENGINE),
    "use_liger_loss": drop(ENGINE),
    "attn_implementation": drop(ENGINE),
    "tf32": drop("dtype says the precision"),
    "report_to": _report_to,
    "project": drop(LOGGERS),
    "trackio_*": drop(LOGGERS),
    "use_swanlab": drop(LOGGERS),
    "swanlab_*": drop(LOGGERS),
    "logging_*": drop(LOGGERS),
    "log_*": drop("progress goes to standard error"),
    "disable_tqdm": drop("progress goes to standard error"),
    "include_*": drop(SHOWN),
    "push_to_hub*": drop(HUB),
    "hub_*": drop(HUB),
    "trust_remote_code": drop("no code of a model is ever run"),
    "save_safetensors": same("always so"),
    "save_only_model": drop("a checkpoint holds the model"),
    "enable_jit_checkpoint": drop("set save_steps"),
    "early_stopping_*": unsupported("a better evaluation is better by any amount"),
    "eval_on_start": same("always so"),
    "eval_delay": unsupported("evaluations start with the first eval_steps"),
    "eval_do_concat_batches": drop(SHOWN),
    "eval_use_gather_object": drop(DEVICES),
    "prediction_loss_only": drop(SHOWN),
    "batch_eval_metrics": drop(SHOWN),
    "label_names": drop("the schema is found by looking at the rows"),
    "remove_unused_columns": drop("columns that are not read are listed in data.json"),
    "ignore_data_skip": drop("a run starts at its beginning"),
    "restore_callback_states_from_checkpoint": drop("a run starts at its beginning"),
    "full_determinism": same("runs repeat to the last bit on one machine"),
    "skip_memory_metrics": drop("timings.json has the memory of each phase"),
    "debug": drop("no such mode"),
}


def precision(draft: Draft, *names: str) -> None:
    """bf16 and fp16, and under `names` the dtype of the weights, into `dtype`.

    Mixed precision wins over the weights' dtype, as it does in the trainers: it is what computes.
    """
    mixed = not is_off(draft.recipe.get("bf16"))
    for key in draft.without("bf16", "bfloat16"):
        value = draft.recipe[key]
        if is_off(value):
            draft.drop(key, "off in the recipe; dtype: auto decides")
        elif value == "auto":
            draft.keep(key, "dtype", "auto")
        else:
            draft.keep(key, "dtype", "bfloat16", "what trains is kept in float32")
    for key in draft.without("fp16", "float16"):
        _half(draft, key, draft.recipe[key], mixed)
    for key in draft.without(*names):
        value = draft.recipe[key]
        if value is None or mixed:
            draft.drop(key, "what trains is kept in float32; dtype says what computes")
        elif value in ("float16", "fp16", "half"):
            _half(draft, key, value, mixed)
        elif complaint("dtype", value) is None:
            draft.keep(key, "dtype", value, "what trains is kept in float32")
        else:
            draft.refuse(key, "dtype is auto, float32, bfloat16 or float64")
    for key in draft.without("bf16_full_eval", "fp16_full_eval"):
        draft.drop(key, "evaluation computes in dtype, as training does")


def _half(draft: Draft, key: str, value: Any, mixed: bool) -> None:
    if is_off(value) or mixed:
        draft.drop(key, "off in the recipe" if is_off(value) else "bf16 is what computes")
    else:
        draft.refuse(key, "float16 would need loss scaling; dtype: auto picks bfloat16 or float32")


def clipping(draft: Draft) -> None:
    """max_grad_norm, whose 0 means no clipping."""
    for key in draft.without("max_grad_norm"):
        value = draft.recipe[key]
        draft.keep(key, key, None if number(value) == 0 else value)


def length_of_run(draft: Draft) -> None:
    """max_steps, where -1 stands for none."""
    for key in draft.without("max_steps"):
        value = draft.recipe[key]
        if value is None or number(value) == -1:
            draft.drop(key, "none: num_train_epochs holds")
        else:
            draft.keep(key, key, value)


def saving(draft: Draft) -> None:
    """save_strategy and save_steps, and how many checkpoints stay."""
    _every(draft, "save_steps", "save_strategy", "the final model is always saved")
    for key in draft.without("save_total_limit"):
        limit = number(draft.recipe[key])
        if draft.recipe[key] is None or (limit is not None and limit <= 0):
            draft.drop(key, "no limit there: keep_checkpoints says how many stay")
        else:
            draft.keep(key, "keep_checkpoints", draft.recipe[key])


def evaluating(draft: Draft, *, held_out: bool = False, untold: str = "no") -> None:
    """eval_strategy (evaluation_strategy of old) and eval_steps, and what holds without them.

    Args:
        untold: the strategy of a recipe that names none.
    """
    name = next(
        (n for n in ("eval_strategy", "evaluation_strategy") if n in draft.recipe), "eval_strategy"
    )
    off = is_off(draft.recipe.get(name, untold))
    _every(draft, "eval_steps", name, "before and after are always evaluated", off=off)
    for key in draft.without("do_eval"):
        if is_off(draft.recipe[key]):
            draft.drop(key, "before and after are always evaluated")
        else:
            draft.same(key, "before and after are always evaluated")
    if (
        off
        and not held_out
        and "eval_fraction" not in draft.settings
        and "eval_data" not in draft.settings
    ):
        draft.notes.append(HELD_OUT)
    _best(draft)


def _best(draft: Draft) -> None:
    """The best evaluation as the model that is saved, and as the end of the run, where there are any."""
    settings = {
        "load_best_model_at_end": "load_best_model_at_end",
        "early_stopping_patience": "early_stopping_patience",
        "early_stopping_steps": "early_stopping_patience",
    }
    for key in draft.without(*settings):
        if is_off(draft.recipe[key]):
            draft.drop(key, "off in the recipe")
        elif "eval_steps" in draft.settings:
            draft.keep(key, settings[key], draft.recipe[key])
        else:
            draft.refuse(key, BEST)
    used = any(name in draft.settings for name in settings.values())
    said = draft.recipe.get("metric_for_best_model") or "eval_loss"
    metric = str(said) if str(said).startswith("eval_") else f"eval_{said}"
    for key in draft.without("metric_for_best_model", "greater_is_better"):
        if not used or draft.recipe[key] is None:
            draft.drop(key, "of the best evaluation, which nothing here asks for")
        elif key == "metric_for_best_model":
            _metric(draft, key, metric)
        elif is_off(draft.recipe[key]) == metric.endswith("loss"):
            draft.same(key, "of losses the lowest is the best, of all else the highest")
        else:
            draft.refuse(key, "of losses the lowest is the best, of all else the highest")


def _metric(draft: Draft, key: str, metric: str) -> None:
    default = TrainConfig.model_fields["loss_type"].default
    rewards = metric.startswith("eval_rewards")
    if rewards and not needs_reference(draft.settings.get("loss_type", default)):
        draft.refuse(key, "a loss without a reference has no rewards: set eval_accuracy/logp")
    elif (said := complaint(key, metric)) is not None:
        draft.refuse(key, f"no such figure: {said}")
    else:
        draft.keep(key, key, metric)


def _every(draft: Draft, steps: str, strategy: str, always: str, *, off: bool = False) -> None:
    """A strategy (no, steps, epoch) and its steps, which count only with the strategy `steps`."""
    given = draft.recipe.get(strategy)
    off = off or (strategy in draft.recipe and is_off(given))
    by_steps = not off and given in (None, "steps")
    for key in draft.without(strategy):
        if off:
            draft.drop(key, always)
        elif given == "steps":
            draft.same(key, f"{steps} says it")
        else:
            draft.refuse(key, f"{always}; in between, set {steps}")
    for key in draft.without(steps):
        value = draft.recipe[key]
        amount = number(value)
        if not by_steps or value is None:
            draft.drop(
                key, "off in the recipe" if off or value is None else f"{strategy} is not steps"
            )
        elif amount is not None and 0 < amount < 1:
            draft.refuse(key, f"a share of the run: give a number of steps. {always.capitalize()}")
        else:
            draft.keep(key, steps, value)


def nameless(draft: Draft) -> None:
    """Say it where a recipe leaves model or data to its command line."""
    for setting in ("model", "data"):
        if setting not in draft.settings:
            draft.notes.append(
                f"The recipe names no {setting}, and smoldpo would take its built-in one: give --{setting}"
            )


def batch(draft: Draft) -> None:
    """What an optimizer step takes, and what cannot be read from a recipe: how many GPUs ran it."""
    each, steps = (
        number(draft.settings.get(name, TrainConfig.model_fields[name].default))
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps")
    )
    if each is None or steps is None:
        return
    draft.notes.append(
        f"{each:g} x {steps:g} = {each * steps:g} pairs go to an optimizer step. A recipe does not say on "
        "how many GPUs it ran. On N of them it was N times as many: multiply gradient_accumulation_steps by N"
    )
