"""What is wrong between settings that are each fine alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from smoldpo.config.layer_spec import complaint
from smoldpo.config.losses import FACTS, needs_reference
from smoldpo.config.optimizers import OPTIMIZERS, SCHEDULES, OptimSettings, parse_rates
from smoldpo.utils.errors import UsageError

if TYPE_CHECKING:
    from smoldpo.config.schema import TrainConfig


def cross_checks(config: TrainConfig) -> list[str]:
    """Every problem, in words."""
    problems = []
    if config.eval_steps and config.eval_data is None and config.eval_fraction == 0:
        problems.append("eval_steps needs held-out pairs: set eval_data, or eval_fraction above 0")
    fields = type(config).model_fields
    problems += loss_checks(config, fields) + optim_checks(config, fields) + _answer_checks(config)
    problems += training_checks(config)
    for name in ("early_stopping_patience", "load_best_model_at_end"):
        if getattr(config, name) and not config.eval_steps:
            problems.append(f"{name} needs evaluations during training: set eval_steps")
    best = config.metric_for_best_model
    if best.startswith("eval_rewards") and not needs_reference(config.loss_type):
        problems.append(
            f"metric_for_best_model {best} needs a reference, and this loss has none: take eval_loss or "
            "eval_accuracy/logp"
        )
    if config.freeze_layers == "auto" and config.budget is None:
        problems.append("freeze_layers auto needs a budget, such as 20m")
    if config.budget is not None and config.freeze_layers != "auto":
        problems.append("budget is for freeze_layers auto; a number of layers is frozen as it is")
    weights, sources = config.data_weights, config.data
    if weights and len(weights) != len(sources):
        problems.append(
            f"data_weights has {len(weights)} numbers for {len(sources)} sources in data"
        )
    if any(not weight > 0 for weight in weights):
        problems.append("data_weights must be positive numbers")
    problems += [
        f"columns: {item!r} is not name=column, such as prompt=question"
        for item in config.columns
        if not all(map(str.strip, item.partition("=")))
    ]
    return problems


def _answer_checks(config: TrainConfig) -> list[str]:
    problems = []
    held_out = config.eval_data is not None or config.eval_fraction > 0
    if config.fail_under and not held_out:
        problems.append("fail_under needs held-out pairs: set eval_data, or eval_fraction above 0")
    asks = any(gate.split("=")[0].strip() == "win_rate" for gate in config.fail_under)
    if asks and not (config.judges and config.generate_prompts):
        problems.append("fail_under win_rate needs a judge, and generate_prompts above 0")
    if any("://" in judge and ("@" in judge or "?" in judge) for judge in config.judges):
        problems.append(
            "judges: a URL with a name, password or query would be written to config.yaml; give the key in "
            "the environment variable SMOLDPO_JUDGE_API_KEY"
        )
    default = type(config).model_fields["judges"].default
    if config.judges not in ([], default) and not config.generate_prompts:
        problems.append("judges need answers to judge: set generate_prompts above 0")
    return problems


def optim_checks(config: OptimSettings, fields: Mapping[str, Any]) -> list[str]:
    """Every problem, in words.

    Args:
        fields: the settings' definitions, whose `default` says whether one was changed.
    """
    changed = {name for name, field in fields.items() if getattr(config, name) != field.default}
    readers = {name: facts.reads for name, facts in OPTIMIZERS.items()}
    problems = unread(changed, readers, [config.optim])
    problems += unread(changed, SCHEDULES, [config.lr_scheduler_type])
    if config.optim == "adamw_8bit" and config.dtype == "float64":
        problems.append(
            "optim adamw_8bit keeps 8 bits of a float32: leave dtype float64 out, or take adamw_torch_fused"
        )
    try:
        parse_rates(config.learning_rates)
    except ValueError as error:
        problems.append(f"learning_rates: {error}")
    return problems + _moving_reference_checks(config, changed)


def _moving_reference_checks(config: OptimSettings, changed: set[str]) -> list[str]:
    if not config.sync_ref_model:
        return [
            f"{name} is read with sync_ref_model alone"
            for name in ("ref_model_mixup_alpha", "ref_model_sync_steps")
            if name in changed
        ]
    if not needs_reference(config.loss_type):
        return [
            f"sync_ref_model moves the reference, and {', '.join(config.loss_type)} compares with none: "
            "leave it out, or choose another loss_type"
        ]
    return []


def require_sync(config: OptimSettings, total_steps: int) -> None:
    """Refuse a moving reference that would never move before a step.

    Raises:
        UsageError: the run has too few steps.
    """
    if config.sync_ref_model and config.ref_model_sync_steps >= total_steps:
        raise UsageError(
            f"ref_model_sync_steps is {config.ref_model_sync_steps}, and the run has {total_steps} steps, so "
            f"the reference would not move before the last; set it to {max(1, total_steps // 4)}, say, or "
            "leave sync_ref_model out"
        )


# What is wrong between the settings that say what trains (docs/training.md).


def training_checks(config: TrainConfig) -> list[str]:
    """Every problem, in words."""
    problems = [found for item in config.train_layers if (found := complaint(item)) is not None]
    if config.train_layers and config.freeze_layers is not None:
        problems.append(
            "train_layers and freeze_layers both say which layers train: give one of them (last:4 are the "
            "uppermost four)"
        )
    return problems + _adapter_checks(config)


ADAPTER_SETTINGS = (
    *("lora_r", "lora_alpha", "lora_target_modules", "use_dora", "use_rslora", "merge"),
)


def _adapter_checks(config: TrainConfig) -> list[str]:
    problems = []
    if config.lora_dropout:
        problems.append(
            f"lora_dropout is {config.lora_dropout:g}, and must be 0: dropout is off in DPO here, where "
            "policy and reference are compared without noise; leave it out"
        )
    fields = type(config).model_fields
    if not config.use_peft:
        idle = [n for n in ADAPTER_SETTINGS if getattr(config, n) != fields[n].default]
        if idle:
            problems.append(f"{', '.join(idle)}: of adapters, which use_peft trains: set use_peft")
        return problems
    problems += [
        f"{name} is of the weights themselves, and with use_peft the adapters alone train: choose their "
        "layers with train_layers or freeze_layers, and their places with lora_target_modules"
        for name in ("train", "freeze")
        if getattr(config, name)
    ]
    if config.freeze_layers == "auto":
        problems.append(
            "freeze_layers auto chooses how many of the weights train; with use_peft give a number of layers"
        )
    if config.sync_ref_model:
        problems.append(
            "sync_ref_model moves a reference's weights, and with use_peft the reference is the policy with "
            "its adapters off: leave one of them out"
        )
    return problems


# Which settings a choice reads (a loss, an optimizer, a schedule), and those that were set for nothing.


def unread(
    changed: set[str], readers: Mapping[str, Sequence[str]], chosen: Sequence[str]
) -> list[str]:
    """A sentence for each setting that was changed and that none of `chosen` reads, though others do.

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


# What is wrong between the settings of the loss: names, weights, options that nothing reads.


class LossSettings(Protocol):
    """The part of config.TrainConfig that is read here."""

    loss_type: list[str]
    loss_weights: list[float]
    reference: str | None
    rpo_alpha: float | None
    beta_end: float | None
    label_smoothing: float
    f_divergence_type: str
    ld_alpha: float | None
    use_weighting: bool
    fail_under: list[str]
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    column_names: dict[str, str]


def loss_checks(config: LossSettings, fields: Mapping[str, Any]) -> list[str]:
    """Every problem, in words.

    Args:
        fields: the settings' definitions, whose `default` says whether one was changed.
    """
    changed = {name for name, field in fields.items() if getattr(config, name) != field.default}
    return [
        *_sum_checks(config),
        *_option_checks(config, changed),
        *_divergence_checks(config, changed),
        *_token_checks(config),
        *_reference_checks(config),
        *_column_checks(config),
    ]


def _sum_checks(config: LossSettings) -> list[str]:
    names, weights = config.loss_type, config.loss_weights
    problems = []
    if len(set(names)) < len(names):
        problems.append("loss_type names a loss twice; give it a weight in loss_weights instead")
    if weights and len(weights) != len(names):
        problems.append(f"loss_weights has {len(weights)} numbers for {len(names)} losses")
    if any(not weight > 0 for weight in weights):
        problems.append("loss_weights must be positive numbers")
    likelihoods = [name for name in names if FACTS[name].likelihood]
    if config.rpo_alpha is not None:
        likelihoods.append("rpo_alpha")
    if len(likelihoods) > 1:
        problems.append(
            f"{listed(likelihoods)} each add the negative log-likelihood of the chosen answers; keep one of "
            "them, and set its weight"
        )
    if {"apo_zero", "apo_down"} <= set(names):
        problems.append(
            "apo_zero makes the chosen answers more likely and apo_down less; choose one"
        )
    with_beta = [name for name in names if FACTS[name].beta]
    free = [name for name in with_beta if not FACTS[name].needs_reference]
    bound = [name for name in with_beta if FACTS[name].needs_reference]
    if free and bound:
        problems.append(
            f"{listed(free)} cannot be added to {listed(bound)}: without a reference beta means something "
            "else, and there is one beta"
        )
    whole = [name for name in names if FACTS[name].whole_step]
    if whole and config.per_device_train_batch_size * config.gradient_accumulation_steps == 1:
        problems.append(
            f"{listed(whole)} sorts the pairs of a step, which needs more than one: raise "
            "gradient_accumulation_steps"
        )
    return problems


def _option_checks(config: LossSettings, changed: set[str]) -> list[str]:
    options = {name: facts.options for name, facts in FACTS.items()}
    problems = unread(changed, options, config.loss_type)
    if not any(FACTS[name].beta for name in config.loss_type):
        problems += [
            f"{option} has no part in {listed(config.loss_type)}"
            for option in ("beta", "beta_end")
            if option in changed
        ]
    if "exo_pair" in config.loss_type and not config.label_smoothing:
        problems.append(
            "exo_pair needs label_smoothing above 0, for it takes its logarithm; the paper's is 0.001"
        )
    return problems


def _divergence_checks(config: LossSettings, changed: set[str]) -> list[str]:
    problems = []
    kind = config.f_divergence_type
    if "f_alpha_divergence_coef" in changed and kind != "alpha_divergence":
        problems.append("f_alpha_divergence_coef is read with f_divergence_type alpha_divergence")
    if kind == "reverse_kl":
        return problems
    others = [name for name in config.loss_type if not FACTS[name].by_difference]
    if others:
        fit = [name for name, facts in FACTS.items() if facts.by_difference and facts.beta]
        problems.append(
            f"f_divergence_type {kind} has no meaning for {listed(others)}: an unknown term of the prompt "
            f"cancels only in the difference of chosen and rejected; it goes with {listed(fit)}"
        )
    elif not needs_reference(config.loss_type):
        problems.append(f"f_divergence_type has no part in {listed(config.loss_type)}")
    return problems


def _token_checks(config: LossSettings) -> list[str]:
    """Of what needs more of each answer than the sum of its log-probabilities."""
    problems = []
    names = config.loss_type
    unfit = [name for name in names if FACTS[name].beta and not FACTS[name].ld_alpha]
    if config.ld_alpha is not None and unfit:
        fit = [name for name, facts in FACTS.items() if facts.ld_alpha]
        problems.append(
            f"ld_alpha has no meaning for {listed(unfit)}: in an average per token without a reference it "
            f"would make longer answers look likelier; it goes with {listed(fit)}"
        )
    pairwise = any(FACTS[name].beta for name in names)
    if not pairwise:
        told = {"ld_alpha": config.ld_alpha is not None, "use_weighting": config.use_weighting}
        problems += [f"{key} has no part in {listed(names)}" for key in told if told[key]]
    whole = [name for name in names if FACTS[name].whole_step]
    if config.use_weighting and whole:
        problems.append(
            f"use_weighting weighs pairs, and the terms of {listed(whole)} belong to ranks and not to "
            "pairs; leave it out"
        )
    return problems


def _reference_checks(config: LossSettings) -> list[str]:
    if needs_reference(config.loss_type):
        return []
    said = f"{listed(config.loss_type)} compares with no reference"
    problems = []
    if config.reference is not None:
        problems.append(f"{said}: leave reference out, or choose another loss_type")
    gates = {gate.split("=")[0].strip() for gate in config.fail_under}
    if gates & {"reward", "change/reward"}:
        problems.append(
            f"{said}, so there is no implicit reward for fail_under; ask for logp or logp_per_token"
        )
    return problems


def _column_checks(config: LossSettings) -> list[str]:
    """Of columns that hold a pair's own weight, margin or β."""
    facts = {name: FACTS[name] for name in config.loss_type}
    own = [name for name in ("weight", "margin", "beta") if name in config.column_names]
    whole = [name for name in facts if facts[name].whole_step]
    if whole and own:
        return [
            f"columns: {listed(own)} cannot be a pair's own with {listed(whole)}, whose terms belong to "
            "ranks and not to pairs"
        ]
    problems = []
    if "margin" in own and not any(each.margin for each in facts.values()):
        fit = [name for name in FACTS if FACTS[name].margin]
        problems.append(
            f"columns: margin has no part in {listed(config.loss_type)}; it goes with {listed(fit)}"
        )
    if "beta" in own and not any(each.beta for each in facts.values()):
        problems.append(f"columns: beta has no part in {listed(config.loss_type)}")
    return problems
