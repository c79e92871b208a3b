"""What is wrong between the settings of the loss: names, weights, options that nothing reads.

No torch here, so that a wrong command line is answered at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from smoldpo.errors import nearest
from smoldpo.loss_facts import FACTS, needs_reference
from smoldpo.unread_settings import listed, unread

RENAMED = {"aot_pair": "aot_unpaired"}
"""Names in earlier versions of TRL."""


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


def known_losses(names: Any) -> Any:
    """The same, unless it is a list with a name of no loss.

    Raises:
        ValueError: with the nearest name, and all of them.
    """
    unknown = [name for name in names if name not in FACTS] if isinstance(names, list) else []
    if unknown:
        said = ", ".join(f"no loss {name!r}{_meant(str(name))}" for name in unknown)
        raise ValueError(f"{said}; there are {', '.join(FACTS)}")
    return names


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


def _meant(name: str) -> str:
    return f" (now called {RENAMED[name]})" if name in RENAMED else nearest(name, FACTS)


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
