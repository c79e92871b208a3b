"""Preference losses: pure functions of log-probabilities.

inputs.py       LossInput: what a loss may read, names, LD-DPO's lengths, WPO's weights
divergences.py  f-divergences in place of the reverse KL
pairwise.py     the losses: of the difference, of each side, of a whole step, without a reference
objective.py    LOSSES, and the weighted sum that a run minimises

A new loss is a function in pairwise.py, a line in config/losses.py, and a row in docs/losses.md.

Vocabulary (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290):

    logits  = (log π(y_c|x) - log π(y_r|x)) - (log π_ref(y_c|x) - log π_ref(y_r|x))
    reward  = β (log π(y|x) - log π_ref(y|x))          the implicit reward, section 4
"""

from __future__ import annotations

import torch

from smoldpo.losses.inputs import LossInput, betas
from smoldpo.losses.objective import LOSSES, Loss, Objective
from smoldpo.types import PairLogps

__all__ = ["LOSSES", "Loss", "LossInput", "Objective", "betas", "implicit_rewards"]


def implicit_rewards(
    policy: PairLogps, reference: PairLogps, beta: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Implicit rewards β (log π - log π_ref) of chosen and rejected, each [pairs], detached."""
    chosen = beta * (policy.chosen - reference.chosen).detach()
    rejected = beta * (policy.rejected - reference.rejected).detach()
    return chosen, rejected
