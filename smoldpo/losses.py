"""Preference losses: pure functions of log-probabilities. This module knows nobody.

Vocabulary (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290):

    logits  = (log π(y_c|x) - log π(y_r|x)) - (log π_ref(y_c|x) - log π_ref(y_r|x))
    reward  = β (log π(y|x) - log π_ref(y|x))          the implicit reward, section 4

Every argument and result has shape [pairs]; log-probabilities are in nats, summed over tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from smoldpo.types import PairLogps

Loss = Callable[..., torch.Tensor]


def sigmoid_loss(
    policy: PairLogps, reference: PairLogps, beta: float, label_smoothing: float = 0.0
) -> torch.Tensor:
    """DPO, Rafailov et al. 2023, equation 7: -log σ(β logits).

    With `label_smoothing` ε in [0, 0.5), the labels are taken to be flipped with probability ε
    (conservative DPO, Mitchell 2023): -(1 - ε) log σ(β logits) - ε log σ(-β logits).

    Returns one loss a pair, [pairs].
    """
    logits = (policy.chosen - policy.rejected) - (reference.chosen - reference.rejected)
    return (
        -F.logsigmoid(beta * logits) * (1 - label_smoothing)
        - F.logsigmoid(-beta * logits) * label_smoothing
    )


def implicit_rewards(
    policy: PairLogps, reference: PairLogps, beta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Implicit rewards β (log π - log π_ref) of chosen and rejected, each [pairs], detached."""
    chosen = beta * (policy.chosen - reference.chosen).detach()
    rejected = beta * (policy.rejected - reference.rejected).detach()
    return chosen, rejected


LOSSES: dict[str, Loss] = {"sigmoid": sigmoid_loss}
