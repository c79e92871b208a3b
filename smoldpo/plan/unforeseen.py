"""What a forecast leaves out, in words, and what it refuses."""

from __future__ import annotations

from smoldpo.config import TrainConfig
from smoldpo.errors import UsageError


def require_forecastable(config: TrainConfig) -> None:
    """Refuse what the dry run would tell wrongly.

    Raises:
        UsageError: naming the setting, and what to do.
    """
    if config.sync_ref_model:
        # Its reference stays where it was during the few steps of a dry run, and costs nothing yet.
        raise UsageError(
            "plan cannot forecast a moving reference (sync_ref_model): leave it out, or time some steps of "
            "the run itself with --max-steps"
        )


def unforeseen(config: TrainConfig) -> list[str]:
    """What is not in the figures, or is there as its upper bound."""
    notes = []
    slow = [judge for judge in config.judges if judge != "length"]
    if slow and config.generate_prompts:
        notes.append(f"not counted: what these judges take: {', '.join(slow)}")
    if config.generate_prompts or config.sample_prompt:
        notes.append(
            f"answers are counted as if each had max_new_tokens ({config.max_new_tokens}) tokens"
        )
    if config.load_best_model_at_end:
        notes.append(
            "checkpoints are counted as if every evaluation were the best so far (load_best_model_at_end)"
        )
    if config.early_stopping_patience:
        notes.append("training may stop earlier (early_stopping_patience)")
    return notes
