"""What is wrong between the settings that say what trains (docs/training.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from smoldpo.layer_choice import complaint

if TYPE_CHECKING:
    from smoldpo.config import TrainConfig


def training_checks(config: TrainConfig) -> list[str]:
    """Every problem, in words."""
    problems = [found for item in config.train_layers if (found := complaint(item)) is not None]
    if config.train_layers and config.freeze_layers is not None:
        problems.append(
            "train_layers and freeze_layers both say which layers train: give one of them (last:4 are the "
            "uppermost four)"
        )
    return problems
