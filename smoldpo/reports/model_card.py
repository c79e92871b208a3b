"""The model card, README.md beside the saved model: Markdown with the metadata that hubs read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from smoldpo._version import __version__
from smoldpo.config.losses import needs_reference
from smoldpo.config.schema import TrainConfig
from smoldpo.evaluation.metrics import METRICS
from smoldpo.evaluation.schema import Evaluation, all_alarms
from smoldpo.models.builtin import CARD_BASE


def model_card(
    config: TrainConfig, evaluation: Evaluation | None, train_pairs: int, steps: int
) -> str:
    """The model card, Markdown with the metadata that hubs read."""
    base = CARD_BASE.get(config.model, config.model)
    lines = [
        "---",
        f"library_name: {'peft' if _is_adapter(config) else 'transformers'}",
        "pipeline_tag: text-generation",
        *([] if Path(base).exists() else [f"base_model: {json.dumps(base)}"]),
        f"tags: [dpo, preference-tuning, smoldpo{', lora' if config.use_peft else ''}]",
        "---",
        "",
        f"# {Path(base).name}, tuned on preferences",
        "",
        f"`{base}` tuned by {_method(config)} with smoldpo {__version__}.",
        "",
        f"- {train_pairs:,} preference pairs from `{', '.join(config.data)}`, {steps:,} optimizer "
        f"steps of {config.per_device_train_batch_size * config.gradient_accumulation_steps} pairs",
        f"- β {config.beta:g}, learning rate {config.learning_rate:g} "
        f"({config.lr_scheduler_type}), seed {config.seed}",
        *_about_adapter(config),
        *_about_training(config),
        *_about_template(evaluation.chat_template if evaluation else {}),
        "",
        *_how_to_load(config),
    ]
    if evaluation:
        lines += [
            f"## Preference accuracy on {evaluation.n} held-out pairs",
            "",
            evaluation.headline,
            "",
            "| accuracy by | before | after |",
            "| --- | --- | --- |",
            *(
                f"| {title} | {_percent(evaluation.before.accuracy[name])} "
                f"| {_percent(evaluation.after.accuracy[name])} |"
                for name, title in METRICS.items()
            ),
            "",
            _about_ties(config),
            "",
            *_about_answers(evaluation),
        ]
        if alarms := all_alarms(evaluation):
            lines += ["## Alarms", "", *(f"- {alarm.text}" for alarm in alarms), ""]
    lines += [
        "Preference accuracy says how often the model ranks the preferred answer higher, not that "
        "its answers are true or harmless. The licence is the base model's.",
        "",
    ]
    return "\n".join(lines)


def _is_adapter(config: TrainConfig) -> bool:
    """Whether model/ holds an adapter, and not a whole model."""
    return config.use_peft and not config.merge


def _about_adapter(config: TrainConfig) -> list[str]:
    if not config.use_peft:
        return []
    kind = "DoRA" if config.use_dora else "LoRA"
    scaled = ", rank-stabilised" if config.use_rslora else ""
    targets = ", ".join(config.lora_target_modules) or "all linear layers"
    end = ", merged into the weights" if config.merge else ""
    return [f"- {kind} of rank {config.lora_r}, α {config.lora_alpha:g}{scaled}, on {targets}{end}"]


def _how_to_load(config: TrainConfig) -> list[str]:
    """Code that loads what is beside the card; only where that is more than a plain model."""
    if not _is_adapter(config):
        return []
    lines = [
        "## How to load it",
        "",
        "What is saved (`model/` of a run folder) is an adapter. With peft installed:",
        "",
        "```python",
        "from peft import AutoPeftModelForCausalLM",
        "",
        'model = AutoPeftModelForCausalLM.from_pretrained("path/to/model")',
        "model = model.merge_and_unload()  # a plain model, if wanted",
        "```",
        "",
    ]
    if config.use_dora:
        lines += [
            "Not by `AutoModelForCausalLM`: transformers (5.23) loads a DoRA adapter without its "
            "magnitudes, and says so in a warning only.",
            "",
        ]
    if config.model in CARD_BASE:
        lines += [
            f"That takes `{CARD_BASE[config.model]}` from the hub. The adapter was trained, and "
            "the accuracies measured, on smoldpo's built-in copy, whose weights were once rounded "
            "to 4 bits: smoldpo's own commands take that one, and `merge` saves its weights with "
            "the adapter in them.",
            "",
        ]
    return lines


def _about_template(given: dict[str, Any]) -> list[str]:
    """What the chat template was given, and a model in use should be given, too."""
    parts = [f"{name}={json.dumps(value)}" for name, value in given.get("kwargs", {}).items()]
    parts += [f"{len(given[name])} {name}" for name in ("tools", "documents") if given.get(name)]
    lines = [f"- rendered with {', '.join(parts)}"] if parts else []
    if date := given.get("date"):
        lines.append(f"- the chat template writes the day; here it was always {date}")
    return lines


def _method(config: TrainConfig) -> str:
    extra = [] if config.rpo_alpha is None else [f"rpo_alpha {config.rpo_alpha:g}"]
    extra += [] if config.ld_alpha is None else [f"ld_alpha {config.ld_alpha:g}"]
    extra += ["use_weighting"] if config.use_weighting else []
    if config.loss_type == ["sigmoid"] and not extra:
        return "Direct Preference Optimization"
    return f"preference optimization (loss: {' + '.join([*config.loss_type, *extra])})"


def _about_training(config: TrainConfig) -> list[str]:
    """A line each for what is not as usual."""
    lines = []
    if config.optim != type(config).model_fields["optim"].default:
        lines.append(f"- optimizer {config.optim}")
    if config.learning_rates:
        lines.append(f"- rates of their own: {', '.join(config.learning_rates)}")
    if config.sync_ref_model:
        lines.append(
            f"- the reference moved {config.ref_model_mixup_alpha:g} of the way to the policy "
            f"every {config.ref_model_sync_steps} steps (TR-DPO); evaluated against its start"
        )
    if config.ema_decay is not None:
        lines.append(
            f"- these weights are a moving average of the weights ({config.ema_decay:g} a step)"
        )
    return lines


def _about_ties(config: TrainConfig) -> str:
    if not needs_reference(config.loss_type):
        return (
            "A tie counts one half. The loss compares with no reference: there is no implicit "
            "reward."
        )
    if config.reference:
        return "A tie counts one half."
    return "A tie counts one half: before training, policy and reference are equal."


def _about_answers(evaluation: Evaluation) -> list[str]:
    """Whether answers end, and how far they repeat themselves; nothing where none were drawn."""
    answers = evaluation.generation
    if answers is None:
        return []
    before, after = answers.reference, answers.policy
    return [
        f"Of {answers.prompts} answers, {_percent(after.ended)} ended by themselves within "
        f"{answers.max_new_tokens} tokens, before {_percent(before.ended)}; "
        f"{_percent(after.repetition)} of an answer's runs of four words stood in it before, "
        f"before training {_percent(before.repetition)}.",
        "",
    ]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
