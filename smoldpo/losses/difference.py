"""Losses of the difference between the scores of chosen and rejected: DPO and its nearest kin.

With h = (log π(c|x) - log π_ref(c|x)) - (log π(r|x) - log π_ref(r|x)), DPO's logits; under another
f-divergence h is the difference of the f' (divergences.py). Each function returns one loss a pair, [pairs].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from smoldpo.losses.divergences import LARGEST_EXPONENT
from smoldpo.losses.inputs import LossInput


def logistic(rewards: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """-(1 - ε) log σ(z) - ε log σ(-z) of z = `rewards`, the reward's lead: Bradley and Terry's loss."""
    return -F.logsigmoid(rewards) * (1 - label_smoothing) - F.logsigmoid(-rewards) * label_smoothing


def sigmoid_loss(given: LossInput, label_smoothing: float = 0.0) -> torch.Tensor:
    """DPO, Rafailov et al. 2023 (https://arxiv.org/abs/2305.18290), equation 7: -log σ(β h).

    With `label_smoothing` ε in [0, 0.5), the labels are taken to be flipped with probability ε
    (conservative DPO, Mitchell 2023): -(1 - ε) log σ(β h) - ε log σ(-β h).

    With a margin m of the pair's own: -log σ(β h - m) (ODPO, Amini et al. 2024,
    https://arxiv.org/abs/2402.10571).
    """
    return logistic(given.beta * given.difference - given.margin, label_smoothing)


def sigmoid_norm_loss(given: LossInput) -> torch.Tensor:
    """Length-normalised DPO of Tülu 3, Lambert et al. 2024 (https://arxiv.org/abs/2411.15124).

    -log σ(β (log-ratio of chosen / |c| - log-ratio of rejected / |r|)).
    """
    return logistic(given.beta * given.difference_per_token)


def robust_loss(given: LossInput, label_smoothing: float = 0.0) -> torch.Tensor:
    """Provably robust DPO, Chowdhury et al. 2024 (https://arxiv.org/abs/2403.00409).

    (-(1 - ε) log σ(β h) + ε log σ(-β h)) / (1 - 2ε): DPO's loss on clean labels, unbiased where each is
    flipped with probability ε = `label_smoothing` < 0.5. It may be negative.
    """
    rewards = given.beta * given.difference - given.margin
    clean = -F.logsigmoid(rewards) * (1 - label_smoothing)
    flipped = -F.logsigmoid(-rewards) * label_smoothing
    return (clean - flipped) / (1 - 2 * label_smoothing)


def hinge_loss(given: LossInput) -> torch.Tensor:
    """max(0, 1 - β h): SLiC's loss (Zhao et al. 2023, https://arxiv.org/abs/2305.10425).

    In the form of RSO, with the log-ratio to the reference (Liu et al. 2023,
    https://arxiv.org/abs/2309.06657).
    """
    return torch.relu(1 - (given.beta * given.difference - given.margin))


def ipo_loss(given: LossInput) -> torch.Tensor:
    """IPO, Azar et al. 2023 (https://arxiv.org/abs/2310.12036), equation 17, by averages per token.

    (h' - 1 / (2β))², h' the difference of log-ratios each divided by its answer's tokens; β is the paper's τ.
    The paper does not speak of length; TRL has this form, and says that its authors confirmed it.
    """
    return (given.difference_per_token - 1 / (2 * given.beta)) ** 2


def ipo_sum_loss(given: LossInput) -> torch.Tensor:
    """IPO as equation 17 stands, log-probabilities summed over tokens: (h - 1 / (2β))²."""
    return (given.difference - 1 / (2 * given.beta)) ** 2


def exo_pair_loss(given: LossInput, label_smoothing: float) -> torch.Tensor:
    """EXO-pref, Ji et al. 2024 (https://arxiv.org/abs/2402.00856), equation 16.

    KL(p || q) of p = (σ(β h), σ(-β h)) and q = (1 - ε, ε), ε = `label_smoothing` > 0: the reverse of the KL
    that DPO minimises.
    """
    rewards = given.beta * given.difference
    smoothing = torch.tensor(label_smoothing, dtype=rewards.dtype, device=rewards.device)
    return torch.sigmoid(rewards) * (
        F.logsigmoid(rewards) - torch.log1p(-smoothing)
    ) + torch.sigmoid(-rewards) * (F.logsigmoid(-rewards) - torch.log(smoothing))


def discopop_loss(given: LossInput, discopop_tau: float = 0.05) -> torch.Tensor:
    """DiscoPOP, Lu et al. 2024 (https://arxiv.org/abs/2406.08414), equation 5: found by search.

    (1 - σ(β h / τ)) (-log σ(β h)) + σ(β h / τ) exp(-β h).
    """
    rewards = given.beta * given.difference
    share = torch.sigmoid(rewards / discopop_tau)
    # exp overflows only where its share is 0, and 0 · inf would be NaN.
    exponential = torch.exp((-rewards).clamp(max=LARGEST_EXPONENT))
    return -F.logsigmoid(rewards) * (1 - share) + exponential * share


def dpop_loss(given: LossInput, dpop_lambda: float = 50.0) -> torch.Tensor:
    """DPO-positive (Smaug), Pal et al. 2024 (https://arxiv.org/abs/2402.13228).

    -log σ(β (h - λ max(0, log π_ref(c|x) - log π(c|x)))): a fall of the chosen answer is paid for.
    """
    fall = torch.relu(-given.chosen_ratio)
    return logistic(given.beta * (given.difference - dpop_lambda * fall))
