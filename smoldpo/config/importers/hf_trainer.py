"""Keys of Hugging Face's trainers, which TRL, the alignment handbook and LLaMA-Factory share."""

from __future__ import annotations

from typing import Any

from smoldpo.config.importers.mapping import (
    KEPT,
    OFF,
    Draft,
    Rule,
    Table,
    complaint,
    default_of,
    drop,
    is_off,
    keep,
    listed,
    number,
    refuse,
    same,
    unsupported,
    where_known,
)
from smoldpo.config.losses import needs_reference

LOGGERS = "smoldpo writes metrics.jsonl and report.html in the run folder; report_to adds others"
HUB = "nothing is uploaded; the model is in the run folder, with its card"
MEMORY = "nothing to recompute: the fast engine's memory is flat (stream_tokens bounds it)"
DEVICES = "one process on one device"
SHARDING = f"{DEVICES}; a small model needs no sharding"
LOADING = "the data is read, tokenised and kept by smoldpo itself"
ENGINE = "the engine has its own exact kernels"
MODEL_FOLDER = "read from the model's folder"
SHOWN = "no such output"
BEGINNING = "a run starts at its beginning"
DEVICE = "device: auto takes the GPU where there is one"
PROGRESS = "progress goes to standard error"
SCHEMA = "the schema is found by looking at the rows"
NO_PADDING = "the fast engine never pads"
COMPLETIONS_ONLY = "always so: the LM head runs on completions only"
COMPLETIONS = "completions alone are scored"
SYSTEM = "system messages are read from the rows"
ATTENTION = "attention is the model's own"
TOKEN = "set HF_TOKEN in the shell"
NO_CODE = "no code of a model is ever run"
QUANTISED_PARTS = "of quantised weights"
ALWAYS = "always so"
BEFORE_AND_AFTER = "before and after are always evaluated"
IN_FLOAT32 = "what trains is kept in float32"
BEST = "needs evaluations every so many steps: set eval_steps too"
BUDGET = "smoldpo has one budget for prompt and completion together, max_length"
TEMPLATE = (
    "prompts get the chat template of the model's own tokenizer; look with smoldpo data show DATA "
    "--row 1 --model MODEL"
)
READ_BY_TEMPLATE = "refused at the start where the model's chat template does not read it"
TEMPLATE_FILE = "write the template to a file, and set chat_template to its path"
QUANTISED = "weights are not quantised: a small model needs no 4 or 8 bits"
OTHER_LOSS = "part of a loss that smoldpo does not have (yet); leave it out, or train this with TRL"
NOISE = "smoldpo trains without dropout and noise, as exactness needs"
REVISION = "a hub id is read at its newest revision: download this one and set model to its folder"
HELD_OUT = (
    "The recipe evaluates on nothing. smoldpo does: on the data's own test split, or else on "
    f"{default_of('eval_fraction'):.0%} of the prompts, which it then does not "
    "train on. eval_fraction: 0 trains on all of them"
)


def _report_to(draft: Draft, key: str, value: Any) -> Rule:
    """Left out: somebody else's recipe does not decide that a service is told."""
    names = value if isinstance(value, list) else [value]
    known = not is_off(value) and complaint("report_to", names) is None
    return drop(f"left to you: --report-to {','.join(names)}" if known else LOGGERS)


def _save_total_limit(draft: Draft, key: str, value: Any) -> Rule:
    """How many checkpoints stay; none or less than one stands for all of them."""
    limit = number(value)
    if value is None or (limit is not None and limit <= 0):
        return drop("no limit there: keep_checkpoints says how many stay")
    return keep("keep_checkpoints")


def _max_steps(draft: Draft, key: str, value: Any) -> Rule:
    """-1 stands for none."""
    none = value is None or number(value) == -1
    return drop("none: num_train_epochs holds") if none else keep()


def _max_grad_norm(draft: Draft, key: str, value: Any) -> Rule:
    """0 stands for no clipping."""
    return keep(key, None if number(value) == 0 else value)


LOSS_PARTS: Table = {
    "loss_weights rpo_alpha use_weighting reference_free": where_known(OTHER_LOSS),
    "ld_alpha": where_known(OTHER_LOSS, off=(None, 1, 1.0)),
    "f_divergence_type": where_known(OTHER_LOSS, off=(None, "reverse_kl")),
    "f_alpha_divergence_coef": where_known(OTHER_LOSS, off=(None, 1, 1.0, 0.5)),
    "discopop_tau": where_known(OTHER_LOSS, off=(None, 0.05)),
    "label_smoothing beta": keep(),
}
TRAINER: Table = {
    "learning_rate per_device_train_batch_size gradient_accumulation_steps weight_decay seed "
    "per_device_eval_batch_size num_train_epochs adam_beta1 adam_beta2 adam_epsilon logging_steps "
    "output_dir": keep(),
    "max_steps": _max_steps,
    "max_grad_norm": _max_grad_norm,
    "save_total_limit": _save_total_limit,
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
        "set per_device_train_batch_size; memory is bounded by stream_tokens"
    ),
    "group_by_length": drop("the order of the pairs follows from seed alone", matters=True),
    "train_sampling_strategy": drop("the order of the pairs follows from seed alone"),
    "length_column_name": drop("of group_by_length"),
    "dataloader_drop_last": unsupported("the last batch of an epoch is used, though it is smaller"),
    "dataloader_*": drop(LOADING),
    "deepspeed* fsdp*": drop(SHARDING, matters=True),
    "num_processes num_machines accelerate_config": drop(DEVICES, matters=True),
    "average_tokens_across_devices ddp_* accelerator_config parallelism_config local_rank "
    "log_on_each_node save_on_each_node eval_use_gather_object": drop(DEVICES),
    "use_cpu no_cuda": drop(DEVICE),
    "gradient_checkpointing* activation_* torch_empty_cache_steps eval_accumulation_steps "
    "use_cache": drop(MEMORY),
    "torch_compile*": drop("compile: auto decides by whether it pays"),
    "use_liger_kernel liger_kernel_config use_liger_loss attn_implementation": drop(ENGINE),
    "tf32": drop("dtype says the precision"),
    "report_to": _report_to,
    "project trackio_* use_swanlab swanlab_* logging_*": drop(LOGGERS),
    "log_* disable_tqdm": drop(PROGRESS),
    "include_* eval_do_concat_batches prediction_loss_only batch_eval_metrics": drop(SHOWN),
    "push_to_hub* hub_*": drop(HUB),
    "trust_remote_code": drop(NO_CODE),
    "save_safetensors eval_on_start": same(ALWAYS),
    "save_only_model": drop("a checkpoint holds the model"),
    "enable_jit_checkpoint": drop("set save_steps"),
    "early_stopping_*": unsupported("a better evaluation is better by any amount"),
    "do_eval": Rule(KEPT, BEFORE_AND_AFTER, off=OFF, off_reason=BEFORE_AND_AFTER),
    "bf16_full_eval fp16_full_eval": drop("evaluation computes in dtype, as training does"),
    "eval_delay": unsupported("evaluations start with the first eval_steps"),
    "label_names": drop(SCHEMA),
    "remove_unused_columns": drop("columns that are not read are listed in data.json"),
    "ignore_data_skip restore_callback_states_from_checkpoint": drop(BEGINNING),
    "full_determinism": same("runs repeat to the last bit on one machine"),
    "skip_memory_metrics": drop("timings.json has the memory of each phase"),
    "debug": drop("no such mode"),
}


def _computes_in_bf16(draft: Draft) -> bool:
    """Mixed precision, which wins over the weights' dtype, as it does in the trainers."""
    return not is_off(draft.recipe.get("bf16"))


def _bf16(draft: Draft, key: str, value: Any) -> Rule:
    if is_off(value):
        return drop("off in the recipe; dtype: auto decides")
    return keep("dtype") if value == "auto" else keep("dtype", "bfloat16", IN_FLOAT32)


def _fp16(draft: Draft, key: str, value: Any) -> Rule:
    if is_off(value) or _computes_in_bf16(draft):
        return drop("off in the recipe" if is_off(value) else "bf16 is what computes")
    return refuse("float16 would need loss scaling; dtype: auto picks bfloat16 or float32")


def weights_dtype(draft: Draft, key: str, value: Any) -> Rule:
    """The dtype of the weights; after PRECISION."""
    if value is None or _computes_in_bf16(draft):
        return drop(f"{IN_FLOAT32}; dtype says what computes")
    if value in ("float16", "fp16", "half"):
        return _fp16(draft, key, value)
    if complaint("dtype", value) is None:
        return keep("dtype", value, IN_FLOAT32)
    return refuse("dtype is auto, float32, bfloat16 or float64")


PRECISION: Table = {"bf16 bfloat16": _bf16, "fp16 float16": _fp16}


def saving(draft: Draft) -> None:
    """save_strategy and save_steps."""
    off = is_off(draft.recipe.get("save_strategy", "steps"))
    _every(draft, "save_steps", "save_strategy", "the final model is always saved", off)


def evaluating(draft: Draft) -> None:
    """eval_strategy (evaluation_strategy of old) and eval_steps, and what holds without them."""
    old = "evaluation_strategy" in draft.recipe and "eval_strategy" not in draft.recipe
    name = "evaluation_strategy" if old else "eval_strategy"
    off = is_off(draft.recipe.get(name, draft.eval_strategy))
    _every(draft, "eval_steps", name, BEFORE_AND_AFTER, off)
    if off and not draft.held_out and not {"eval_fraction", "eval_data"} & draft.settings.keys():
        draft.notes.append(HELD_OUT)
    _best(draft)


def _every(draft: Draft, steps: str, strategy: str, always: str, off: bool) -> None:
    """A strategy (no, steps, epoch) and its steps, which count only with the strategy `steps`."""
    given, value = draft.recipe.get(strategy), draft.recipe.get(steps)
    otherwise = (
        same(f"{steps} says it")
        if given == "steps"
        else refuse(f"{always}; in between, set {steps}")
    )
    amount = number(value)
    if off or value is None:
        rule = drop("off in the recipe")
    elif given not in (None, "steps"):
        rule = drop(f"{strategy} is not steps")
    elif amount is not None and 0 < amount < 1:
        rule = refuse(f"a share of the run: give a number of steps. {always.capitalize()}")
    else:
        rule = keep()
    draft.apply({strategy: drop(always) if off else otherwise, steps: rule})


def _best(draft: Draft) -> None:
    """The best evaluation as the model that is saved, and as the end of the run."""
    patience, best = "early_stopping_patience", "load_best_model_at_end"
    for key, setting in {best: best, patience: patience, "early_stopping_steps": patience}.items():
        evaluates = "eval_steps" in draft.settings
        draft.apply({key: keep(setting, off=OFF) if evaluates else unsupported(BEST)})
    asked = str(draft.recipe.get("metric_for_best_model") or "eval_loss")
    metric = asked if asked.startswith("eval_") else f"eval_{asked}"
    order = "of losses the lowest is the best, of all else the highest"
    greater = not is_off(draft.recipe.get("greater_is_better"))
    for key in ("metric_for_best_model", "greater_is_better"):
        if not {patience, best} & draft.settings.keys() or draft.recipe.get(key) is None:
            rule = drop("of the best evaluation, which nothing here asks for")
        elif key == "metric_for_best_model":
            rule = _metric(draft, metric)
        else:
            rule = refuse(order) if greater == metric.endswith("loss") else same(order, ())
        draft.apply({key: rule})


def _metric(draft: Draft, metric: str) -> Rule:
    losses = listed(draft.settings.get("loss_type", default_of("loss_type")))
    if metric.startswith("eval_rewards") and not needs_reference(losses):
        return refuse("a loss without a reference has no rewards: set eval_accuracy/logp")
    problem = complaint("metric_for_best_model", metric)
    return (
        refuse(f"no such figure: {problem}") if problem else keep("metric_for_best_model", metric)
    )


def note_omissions(draft: Draft) -> None:
    """Notes on what a recipe leaves to its command line: model, data, and how many GPUs run it."""
    for setting in ("model", "data"):
        if setting not in draft.settings:
            draft.notes.append(
                f"The recipe names no {setting}, and smoldpo would take its built-in one: give "
                f"--{setting}"
            )
    each, steps = (
        number(draft.settings.get(name, default_of(name)))
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps")
    )
    if each is None or steps is None:
        return
    draft.notes.append(
        f"{each:g} x {steps:g} = {each * steps:g} pairs go to an optimizer step. A recipe does not "
        "say on how many GPUs it ran. On N of them it was N times as many: multiply "
        "gradient_accumulation_steps by N"
    )
