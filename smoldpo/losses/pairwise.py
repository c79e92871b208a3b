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


# Losses in which chosen and rejected are each held against the reference, not only against each other.
#
# With a = log π(c|x) - log π_ref(c|x) and b = log π(r|x) - log π_ref(r|x). Each returns one loss a pair.


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


# AOT: losses of whole distributions, Melnyk et al. 2024 (https://arxiv.org/abs/2406.05882).
#
# Quantiles are sorted against quantiles, so the loss of a step is no sum over its pairs: it needs all
# log-probabilities of the step at once, and the values returned, [pairs], belong to ranks and not to pairs.


def aot_loss(given: LossInput, label_smoothing: float = 0.0) -> torch.Tensor:
    """AOT for paired data.

    The policy's log π(c|x) - log π(r|x), sorted, against the reference's, sorted: the former is to dominate.
    """
    if given.reference is None:
        raise ValueError("aot compares with a reference, and none was given")
    policy = (given.policy.chosen - given.policy.rejected).sort().values
    reference = (given.reference.chosen - given.reference.rejected).sort().values
    return logistic(given.beta * (policy - reference), label_smoothing)


def aot_unpaired_loss(given: LossInput, label_smoothing: float = 0.0) -> torch.Tensor:
    """AOT for unpaired data (aot_pair in earlier versions of TRL).

    The log-ratios of all chosen answers, sorted, against those of all rejected, sorted.
    """
    difference = given.chosen_ratio.sort().values - given.rejected_ratio.sort().values
    return logistic(given.beta * difference, label_smoothing)


# Losses of the policy's log-probabilities alone: no reference takes part, and so none is run.
#
# Each returns one loss a pair, [pairs], whose mean over the step is the loss.


def sft_loss(given: LossInput) -> torch.Tensor:
    """Negative log-likelihood of chosen: over a step, the mean over all its chosen tokens.

    As TRL's `sft`, but over the tokens of the whole step, however that is cut into micro-batches.
    """
    return -given.chosen_likelihood / given.mean_chosen_tokens


def nll_per_answer(given: LossInput) -> torch.Tensor:
    """RPO's term, Pang et al. 2024 (https://arxiv.org/abs/2404.19733), equation 1: -log π(c|x) / |c|.

    Unlike in `sft` every answer weighs alike, however long it is.
    """
    return -given.chosen_likelihood / given.chosen_tokens


def simpo_loss(
    given: LossInput, simpo_gamma: float = 0.5, label_smoothing: float = 0.0
) -> torch.Tensor:
    """SimPO, Meng et al. 2024 (https://arxiv.org/abs/2405.14734), equation 6.

    -log σ(β (log π(c|x) / |c| - log π(r|x) / |r|) - γ).
    """
    policy = given.policy
    difference = policy.chosen / given.chosen_tokens - policy.rejected / given.rejected_tokens
    return logistic(given.beta * difference - simpo_gamma, label_smoothing)


def cpo_loss(
    given: LossInput, cpo_alpha: float = 1.0, label_smoothing: float = 0.0
) -> torch.Tensor:
    """CPO, Xu et al. 2024 (https://arxiv.org/abs/2401.08417), section 3.

    -log σ(β (log π(c|x) - log π(r|x))) + α NLL(c), the latter as in `sft`, like TRL's.
    """
    difference = given.policy.chosen - given.policy.rejected
    return logistic(given.beta * difference, label_smoothing) + cpo_alpha * sft_loss(given)


def orpo_loss(given: LossInput) -> torch.Tensor:
    """ORPO, Hong et al. 2024 (https://arxiv.org/abs/2403.07691), equation 6, with λ = β.

    NLL(c) - β log σ(log odds(c) - log odds(r)), odds = p / (1 - p) of p = exp(log π(y|x) / |y|). The NLL is
    that of the answer, as in `sft`; TRL's has the prompt's tokens in it too.
    """
    odds = _log_odds(given.policy.chosen / given.chosen_tokens) - _log_odds(
        given.policy.rejected / given.rejected_tokens
    )
    return sft_loss(given) - given.beta * F.logsigmoid(odds)


def _log_odds(logp: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p)) from log p; certainty itself is taken as the next number below it."""
    logp = logp.clamp(max=-torch.finfo(logp.dtype).tiny)
    return logp - torch.log(-torch.expm1(logp))
