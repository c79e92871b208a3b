"""What a forecast leaves out, in words."""

from __future__ import annotations

from smoldpo.config import TrainConfig


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
    if config.early_stopping_patience:
        notes.append("training may stop earlier (early_stopping_patience)")
    return notes
