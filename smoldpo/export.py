"""What a run leaves for others: a folder that `from_pretrained` opens, with a model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smoldpo import __version__
from smoldpo.config import TrainConfig
from smoldpo.evaluation.metrics import METRICS
from smoldpo.files import not_saved, staged_folder, write_text
from smoldpo.loss_facts import needs_reference
from smoldpo.models.quiet import quiet

CARD_BASE = {"builtin": "HuggingFaceTB/SmolLM2-135M-Instruct"}


def model_bytes(model: PreTrainedModel) -> int:
    """Bytes of the model's parameters, each counted once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def save_model(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, card: str
) -> None:
    """Save weights (safetensors), tokenizer and card as one folder, whole or not at all.

    Raises:
        SmoldpoError: the disk is full or not writable; what was there before is untouched.
    """
    try:
        with staged_folder(folder) as staging, quiet():
            model.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
            write_text(staging / "README.md", card)
    except (OSError, SafetensorError) as error:
        raise not_saved(folder, "the model", model_bytes(model), error) from None


def model_card(
    config: TrainConfig, evaluation: dict[str, Any] | None, train_pairs: int, steps: int
) -> str:
    """The model card, Markdown with the metadata that hubs read."""
    base = CARD_BASE.get(config.model, config.model)
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        *([] if Path(base).exists() else [f"base_model: {json.dumps(base)}"]),
        "tags: [dpo, preference-tuning, smoldpo]",
        "---",
        "",
        f"# {Path(base).name}, tuned on preferences",
        "",
        f"`{base}` tuned by {_method(config)} with smoldpo {__version__}.",
        "",
        f"- {train_pairs:,} preference pairs from `{', '.join(config.data)}`, {steps:,} optimizer steps of "
        f"{config.per_device_train_batch_size * config.gradient_accumulation_steps} pairs",
        f"- β {config.beta:g}, learning rate {config.learning_rate:g} "
        f"({config.lr_scheduler_type}), seed {config.seed}",
        *_about_training(config),
        "",
    ]
    if evaluation:
        lines += [
            f"## Preference accuracy on {evaluation['n']} held-out pairs",
            "",
            evaluation["headline"],
            "",
            "| accuracy by | before | after |",
            "| --- | --- | --- |",
            *(
                f"| {title} | {_percent(evaluation['before']['accuracy'][name])} "
                f"| {_percent(evaluation['after']['accuracy'][name])} |"
                for name, title in METRICS.items()
            ),
            "",
            _about_ties(config),
            "",
        ]
    lines += [
        "Preference accuracy says how often the model ranks the preferred answer higher, not that its "
        "answers are true or harmless. The licence is the base model's.",
        "",
    ]
    return "\n".join(lines)


def _method(config: TrainConfig) -> str:
    if config.loss_type == ["sigmoid"] and config.rpo_alpha is None:
        return "Direct Preference Optimization"
    extra = [] if config.rpo_alpha is None else [f"rpo_alpha {config.rpo_alpha:g}"]
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
            f"- the reference moved {config.ref_model_mixup_alpha:g} of the way to the policy every "
            f"{config.ref_model_sync_steps} steps (TR-DPO); evaluated against its start"
        )
    if config.ema_decay is not None:
        lines.append(
            f"- these weights are a moving average of the weights ({config.ema_decay:g} a step)"
        )
    return lines


def _about_ties(config: TrainConfig) -> str:
    if not needs_reference(config.loss_type):
        return "A tie counts one half. The loss compares with no reference: there is no implicit reward."
    if config.reference:
        return "A tie counts one half."
    return "A tie counts one half: before training, policy and reference are equal."


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
