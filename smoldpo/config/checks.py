"""What is wrong between settings that are each fine alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from smoldpo.config.layer_spec import complaint
from smoldpo.config.losses import FACTS, needs_reference
from smoldpo.config.optimizers import OPTIMIZERS, SCHEDULES, parse_rates
from smoldpo.utils.errors import UsageError

if TYPE_CHECKING:
    from smoldpo.config.schema import TrainConfig

READERS: dict[str, Mapping[str, Sequence[str]]] = {
    "loss_type": {name: facts.options for name, facts in FACTS.items()},
    "optim": {name: facts.reads for name, facts in OPTIMIZERS.items()},
    "lr_scheduler_type": SCHEDULES,
}
"""Settings that choose, and for each choice the settings that it reads and some others do not."""
ADAPTER_SETTINGS = "lora_r", "lora_alpha", "lora_target_modules", "use_dora", "use_rslora", "merge"
"""What is read with use_peft alone."""


def cross_checks(config: TrainConfig) -> list[str]:
    """Every problem, in words."""
    fields = type(config).model_fields
    changed = {name for name, field in fields.items() if getattr(config, name) != field.default}
    return [
        *_data(config),
        *_evaluation(config),
        *_unread(config, changed),
        *_sum(config),
        *_loss(config, changed),
        *_unpaired(config),
        *_pairs_own_numbers(config),
        *_optimizer(config),
        *_reference(config),
        *_what_trains(config),
        *_adapters(config),
        *_sharded(config),
    ]


def _sharded(config: TrainConfig) -> Iterator[str]:
    """What does not work on weights that are shared out among ranks."""
    others = {
        "engine": config.engine == "fast",
        "ema_decay": config.ema_decay is not None,
        "sync_ref_model": config.sync_ref_model,
        "optim": config.optim in ("adafactor", "adamw_8bit"),
    }
    for name in others if config.fsdp else ():
        if others[name]:
            yield f"fsdp does not work with {name} {getattr(config, name)} yet; leave one of them"


def unread(
    changed: set[str], readers: Mapping[str, Sequence[str]], chosen: Sequence[str]
) -> list[str]:
    """A sentence for each changed setting that none of `chosen` reads, though others do.

    Args:
        readers: which settings each possible choice reads.
    """
    known = dict.fromkeys(setting for reads in readers.values() for setting in reads)
    idle = set(known).difference(*(readers[name] for name in chosen)) & changed
    return [
        f"{setting} is read by {listed([n for n, r in readers.items() if setting in r])}, "
        f"not by {listed(chosen)}"
        for setting in known
        if setting in idle
    ]


def listed(names: Sequence[str]) -> str:
    """a, b and c"""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def require_sync(config: TrainConfig, total_steps: int) -> None:
    """Refuse a moving reference that would never move before a step.

    Raises:
        UsageError: the run has too few steps.
    """
    if config.sync_ref_model and config.ref_model_sync_steps >= total_steps:
        raise UsageError(
            f"ref_model_sync_steps is {config.ref_model_sync_steps}, and the run has {total_steps} "
            "steps, so the reference would not move before the last; set it to "
            f"{max(1, total_steps // 4)}, say, or leave sync_ref_model out"
        )


def _data(config: TrainConfig) -> Iterator[str]:
    weights, sources = config.data_weights, config.data
    if weights and len(weights) != len(sources):
        yield f"data_weights has {len(weights)} numbers for {len(sources)} sources in data"
    if any(not weight > 0 for weight in weights):
        yield "data_weights must be positive numbers"
    for item in config.columns:
        if not all(map(str.strip, item.partition("="))):
            yield f"columns: {item!r} is not name=column, such as prompt=question"


def _evaluation(config: TrainConfig) -> Iterator[str]:
    held_out = config.eval_data is not None or config.eval_fraction > 0
    for name, value in (("eval_steps", config.eval_steps), ("fail_under", config.fail_under)):
        if value and not held_out:
            yield f"{name} needs held-out pairs: set eval_data, or eval_fraction above 0"
    for name in ("early_stopping_patience", "load_best_model_at_end"):
        if getattr(config, name) and not config.eval_steps:
            yield f"{name} needs evaluations during training: set eval_steps"
    if "win_rate" in _gates(config) and not (config.judges and config.generate_prompts):
        yield "fail_under win_rate needs a judge, and generate_prompts above 0"
    if any("://" in judge and ("@" in judge or "?" in judge) for judge in config.judges):
        yield (
            "judges: a URL with a name, password or query would be written to config.yaml; give "
            "the key in the environment variable SMOLDPO_JUDGE_API_KEY"
        )
    default = type(config).model_fields["judges"].default
    if config.judges not in ([], default) and not config.generate_prompts:
        yield "judges need answers to judge: set generate_prompts above 0"


def _gates(config: TrainConfig) -> set[str]:
    return {gate.split("=")[0].strip() for gate in config.fail_under}


def _unread(config: TrainConfig, changed: set[str]) -> Iterator[str]:
    """Settings that were changed and that nothing which was chosen reads."""
    for setting, readers in READERS.items():
        chosen = getattr(config, setting)
        yield from unread(changed, readers, [chosen] if isinstance(chosen, str) else chosen)
    if "f_alpha_divergence_coef" in changed and config.f_divergence_type != "alpha_divergence":
        yield "f_alpha_divergence_coef is read with f_divergence_type alpha_divergence"
    for name in ("ref_model_mixup_alpha", "ref_model_sync_steps"):
        if name in changed and not config.sync_ref_model:
            yield f"{name} is read with sync_ref_model alone"
    idle = [name for name in ADAPTER_SETTINGS if name in changed]
    if idle and not config.use_peft:
        yield f"{', '.join(idle)}: of adapters, which use_peft trains: set use_peft"


def _sum(config: TrainConfig) -> Iterator[str]:
    """What cannot be added up."""
    names, weights = config.loss_type, config.loss_weights
    if len(set(names)) < len(names):
        yield "loss_type names a loss twice; give it a weight in loss_weights instead"
    if weights and len(weights) != len(names):
        yield f"loss_weights has {len(weights)} numbers for {len(names)} losses"
    if any(not weight > 0 for weight in weights):
        yield "loss_weights must be positive numbers"
    likelihoods = [name for name in names if FACTS[name].likelihood]
    likelihoods += ["rpo_alpha"] if config.rpo_alpha is not None else []
    if len(likelihoods) > 1:
        yield (
            f"{listed(likelihoods)} each add the negative log-likelihood of the chosen answers; "
            "keep one of them, and set its weight"
        )
    if {"apo_zero", "apo_down"} <= set(names):
        yield "apo_zero makes the chosen answers more likely and apo_down less; choose one"
    with_beta = [name for name in names if FACTS[name].beta]
    free = [name for name in with_beta if not FACTS[name].needs_reference]
    bound = [name for name in with_beta if FACTS[name].needs_reference]
    if free and bound:
        yield (
            f"{listed(free)} cannot be added to {listed(bound)}: without a reference beta means "
            "something else, and there is one beta"
        )


def _unpaired(config: TrainConfig) -> Iterator[str]:
    """Losses of single answers, and what is of pairs."""
    names = config.loss_type
    single = [name for name in names if FACTS[name].unpaired]
    if not single:
        return
    others = [name for name in names if name not in single]
    if others:
        yield f"{listed(single)} takes single answers and {listed(others)} pairs: choose one kind"
    given = {"rpo_alpha": config.rpo_alpha is not None, "use_weighting": config.use_weighting}
    for name, is_set in given.items():
        if is_set:
            yield f"{name} is of pairs, and {listed(single)} takes single answers"
    if config.metric_for_best_model.startswith("eval_accuracy"):
        yield (
            f"metric_for_best_model {config.metric_for_best_model} is of pairs; take eval_loss or "
            "eval_rewards/margins"
        )


def _loss(config: TrainConfig, changed: set[str]) -> Iterator[str]:
    """Settings that have no part in these losses, or no meaning with them."""
    names, kind = config.loss_type, config.f_divergence_type
    listed_names = listed(names)
    if not any(FACTS[name].beta for name in names):
        given = {"ld_alpha": config.ld_alpha is not None, "use_weighting": config.use_weighting}
        given |= {name: name in changed for name in ("beta", "beta_end")}
        yield from (f"{name} has no part in {listed_names}" for name in given if given[name])
    if "exo_pair" in names and not config.label_smoothing:
        yield (
            "exo_pair needs label_smoothing above 0, for it takes its logarithm; the paper's is "
            "0.001"
        )
    others = [name for name in names if not FACTS[name].by_difference]
    if others and kind != "reverse_kl":
        fit = [name for name, facts in FACTS.items() if facts.by_difference and facts.beta]
        yield (
            f"f_divergence_type {kind} has no meaning for {listed(others)}: an unknown term of the "
            "prompt cancels only in the difference of chosen and rejected; it goes with "
            f"{listed(fit)}"
        )
    elif kind != "reverse_kl" and not needs_reference(names):
        yield f"f_divergence_type has no part in {listed_names}"
    unfit = [name for name in names if FACTS[name].beta and not FACTS[name].ld_alpha]
    if config.ld_alpha is not None and unfit:
        fit = [name for name, facts in FACTS.items() if facts.ld_alpha]
        yield (
            f"ld_alpha has no meaning for {listed(unfit)}: in an average per token without a "
            f"reference it would make longer answers look likelier; it goes with {listed(fit)}"
        )
    whole = [name for name in names if FACTS[name].whole_step]
    if whole and config.per_device_train_batch_size * config.gradient_accumulation_steps == 1:
        does = "compares the answers" if "kto" in whole else "sorts the pairs"
        yield (
            f"{listed(whole)} {does} of a step, which needs more than one: raise "
            "gradient_accumulation_steps"
        )
    if whole and config.use_weighting:
        yield (
            f"use_weighting weighs pairs, and the terms of {listed(whole)} belong to ranks and not "
            "to pairs; leave it out"
        )


def _pairs_own_numbers(config: TrainConfig) -> Iterator[str]:
    """Columns that hold a pair's own weight, margin or β."""
    names = config.loss_type
    own = [name for name in ("weight", "margin", "beta") if name in config.column_names]
    whole = [name for name in names if FACTS[name].whole_step]
    if whole and own:
        yield (
            f"columns: {listed(own)} cannot be a pair's own with {listed(whole)}, whose terms "
            "belong to ranks and not to pairs"
        )
        return
    if "margin" in own and not any(FACTS[name].margin for name in names):
        fit = [name for name in FACTS if FACTS[name].margin]
        yield f"columns: margin has no part in {listed(names)}; it goes with {listed(fit)}"
    if "beta" in own and not any(FACTS[name].beta for name in names):
        yield f"columns: beta has no part in {listed(names)}"


def _optimizer(config: TrainConfig) -> Iterator[str]:
    if config.optim == "adamw_8bit" and config.dtype == "float64":
        yield (
            "optim adamw_8bit keeps 8 bits of a float32: leave dtype float64 out, or take "
            "adamw_torch_fused"
        )
    try:
        parse_rates(config.learning_rates)
    except ValueError as error:
        yield f"learning_rates: {error}"


def _reference(config: TrainConfig) -> Iterator[str]:
    """What needs a reference, with losses that compare with none."""
    if needs_reference(config.loss_type):
        return
    names = listed(config.loss_type)
    if config.reference is not None:
        yield (
            f"{names} compares with no reference: leave reference out, or choose another loss_type"
        )
    if _gates(config) & {"reward", "change/reward"}:
        yield (
            f"{names} compares with no reference, so there is no implicit reward for fail_under; "
            "ask for logp or logp_per_token"
        )
    if config.metric_for_best_model.startswith("eval_rewards"):
        yield (
            f"metric_for_best_model {config.metric_for_best_model} needs a reference, and this "
            "loss has none: take eval_loss or eval_accuracy/logp"
        )
    if config.sync_ref_model:
        yield (
            f"sync_ref_model moves the reference, and {', '.join(config.loss_type)} compares with "
            "none: leave it out, or choose another loss_type"
        )


def _what_trains(config: TrainConfig) -> Iterator[str]:
    """docs/training.md"""
    if config.freeze_layers == "auto" and config.budget is None:
        yield "freeze_layers auto needs a budget, such as 20m"
    if config.budget is not None and config.freeze_layers != "auto":
        yield "budget is for freeze_layers auto; a number of layers is frozen as it is"
    yield from filter(None, map(complaint, config.train_layers))
    if config.train_layers and config.freeze_layers is not None:
        yield (
            "train_layers and freeze_layers both say which layers train: give one of them (last:4 "
            "are the uppermost four)"
        )


def _adapters(config: TrainConfig) -> Iterator[str]:
    if config.lora_dropout:
        yield (
            f"lora_dropout is {config.lora_dropout:g}, and must be 0: dropout is off in DPO here, "
            "where policy and reference are compared without noise; leave it out"
        )
    if not config.use_peft:
        return
    for name in ("train", "freeze"):
        if getattr(config, name):
            yield (
                f"{name} is of the weights themselves, and with use_peft the adapters alone train: "
                "choose their layers with train_layers or freeze_layers, and their places with "
                "lora_target_modules"
            )
    if config.freeze_layers == "auto":
        yield (
            "freeze_layers auto chooses how many of the weights train; with use_peft give a "
            "number of layers"
        )
    if config.sync_ref_model:
        yield (
            "sync_ref_model moves a reference's weights, and with use_peft the reference is the "
            "policy with its adapters off: leave one of them out"
        )
