"""Losses in which chosen and rejected are each held against the reference, not only against each other.

With a = log π(c|x) - log π_ref(c|x) and b = log π(r|x) - log π_ref(r|x). Each returns one loss a pair.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from smoldpo.losses.inputs import LossInput


def nca_pair_loss(given: LossInput) -> torch.Tensor:
    """NCA for pairs, Chen et al. 2024 (https://arxiv.org/abs/2402.05369).

    -log σ(β a) - ½ log σ(-β a) - ½ log σ(-β b): absolute likelihoods, so that chosen does not sink.
    """
    chosen, rejected = given.beta * given.chosen_ratio, given.beta * given.rejected_ratio
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def bco_pair_loss(given: LossInput) -> torch.Tensor:
    """Binary classifier optimisation, Jung et al. 2024 (https://arxiv.org/abs/2404.04656), for pairs.

    -log σ(β a) - log σ(-β b). As in TRL 1.16 without the paper's shift δ, a running mean of rewards: a loss
    that remembers earlier batches would depend on their order.
    """
    return -F.logsigmoid(given.beta * given.chosen_ratio) - F.logsigmoid(
        -given.beta * given.rejected_ratio
    )


def sppo_hard_loss(given: LossInput) -> torch.Tensor:
    """SPPO, Wu et al. 2024 (https://arxiv.org/abs/2405.00675), equation 4.7, with wins of 1 and 0.

    (a - 1 / (2β))² + (b + 1 / (2β))².
    """
    target = 0.5 / given.beta
    return (given.chosen_ratio - target) ** 2 + (given.rejected_ratio + target) ** 2


def apo_zero_loss(given: LossInput) -> torch.Tensor:
    """APO-zero, D'Oosterlinck et al. 2024 (https://arxiv.org/abs/2408.06266), equation 7.

    1 - σ(β a) + σ(β b): chosen up, rejected down. For chosen answers better than the model's own.
    """
    return torch.sigmoid(-given.beta * given.chosen_ratio) + torch.sigmoid(
        given.beta * given.rejected_ratio
    )


def apo_down_loss(given: LossInput) -> torch.Tensor:
    """APO-down, D'Oosterlinck et al. 2024 (https://arxiv.org/abs/2408.06266), equation 8.

    σ(β a) + 1 - σ(β (a - b)): both down, rejected more. For chosen answers worse than the model's own.
    """
    chosen, rejected = given.chosen_ratio, given.rejected_ratio
    return torch.sigmoid(given.beta * chosen) + torch.sigmoid(-given.beta * (chosen - rejected))
