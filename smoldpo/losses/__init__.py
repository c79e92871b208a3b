"""Preference losses: pure functions of log-probabilities. This package knows nobody.

inputs.py       LossInput: what a loss may read, and the names in all formulas
divergences.py  f-divergences in place of the reverse KL
difference.py   DPO and its kin: losses of the difference between chosen and rejected
sides.py        losses of each side against the reference
transport.py    losses of a whole step: sorted against sorted
likelihood.py   losses without a reference
token_sums.py   LD-DPO's lengths and WPO's weights: before and after whatever loss
objective.py    LOSSES, and the weighted sum that a run minimises

A new loss is a function, a line in LOSSES, a line in loss_facts.FACTS, and a row in docs/losses.md.

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
