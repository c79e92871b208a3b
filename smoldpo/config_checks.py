"""What is wrong between settings that are each fine alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from smoldpo.loss_facts import needs_reference
from smoldpo.loss_settings import loss_checks
from smoldpo.optim_settings import optim_checks
from smoldpo.training_checks import training_checks

if TYPE_CHECKING:
    from smoldpo.config import TrainConfig


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
