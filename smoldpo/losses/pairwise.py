"""The losses, each one number a pair, [pairs], whose mean over the step is the loss.

In formulas, c is the chosen and r the rejected answer, |y| its scored tokens,

    a = log π(c|x) - log π_ref(c|x),    b = log π(r|x) - log π_ref(r|x),    h = a - b

DPO's logits; under another f-divergence h is the difference of the f' (divergences.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from smoldpo.losses.divergences import LARGEST_EXPONENT
from smoldpo.losses.inputs import LossInput


def logistic(rewards: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """-(1 - ε) log σ(z) - ε log σ(-z), z = `rewards`: Bradley and Terry's loss."""
    return -F.logsigmoid(rewards) * (1 - label_smoothing) - F.logsigmoid(-rewards) * label_smoothing


def sigmoid_loss(inputs: LossInput, label_smoothing: float = 0.0) -> torch.Tensor:
    """DPO, Rafailov et al. 2023 (https://arxiv.org/abs/2305.18290), equation 7: -log σ(β h).

    With `label_smoothing` ε in [0, 0.5), the labels are taken to be flipped with probability ε
    (conservative DPO, Mitchell 2023): -(1 - ε) log σ(β h) - ε log σ(-β h).

    With a margin m of the pair's own: -log σ(β h - m) (ODPO, Amini et al. 2024,
    https://arxiv.org/abs/2402.10571).
    """
    return logistic(inputs.beta * inputs.difference - inputs.margin, label_smoothing)


def sigmoid_norm_loss(inputs: LossInput) -> torch.Tensor:
    """Length-normalised DPO of Tülu 3, Lambert et al. 2024 (https://arxiv.org/abs/2411.15124).

    -log σ(β (log-ratio of chosen / |c| - log-ratio of rejected / |r|)).
    """
    return logistic(inputs.beta * inputs.difference_per_token)


def robust_loss(inputs: LossInput, label_smoothing: float = 0.0) -> torch.Tensor:
    """Provably robust DPO, Chowdhury et al. 2024 (https://arxiv.org/abs/2403.00409).

    (-(1 - ε) log σ(β h) + ε log σ(-β h)) / (1 - 2ε): DPO's loss on clean labels, unbiased where
    each is flipped with probability ε = `label_smoothing` < 0.5. It may be negative.
    """
    rewards = inputs.beta * inputs.difference - inputs.margin
    clean = -F.logsigmoid(rewards) * (1 - label_smoothing)
    flipped = -F.logsigmoid(-rewards) * label_smoothing
    return (clean - flipped) / (1 - 2 * label_smoothing)


def hinge_loss(inputs: LossInput) -> torch.Tensor:
    """max(0, 1 - β h): SLiC's loss (Zhao et al. 2023, https://arxiv.org/abs/2305.10425).

    In the form of RSO, with the log-ratio to the reference (Liu et al. 2023,
    https://arxiv.org/abs/2309.06657).
    """
    return torch.relu(1 - (inputs.beta * inputs.difference - inputs.margin))


def ipo_loss(inputs: LossInput) -> torch.Tensor:
    """IPO, Azar et al. 2023 (https://arxiv.org/abs/2310.12036), equation 17, by averages per token.

    (h' - 1 / (2β))², h' the difference of log-ratios each divided by its answer's tokens; β is the
    paper's τ. The paper does not speak of length; TRL says that its authors confirmed this form.
    """
    return (inputs.difference_per_token - 1 / (2 * inputs.beta)) ** 2


def ipo_sum_loss(inputs: LossInput) -> torch.Tensor:
    """IPO as equation 17 stands, log-probabilities summed over tokens: (h - 1 / (2β))²."""
    return (inputs.difference - 1 / (2 * inputs.beta)) ** 2


def exo_pair_loss(inputs: LossInput, label_smoothing: float) -> torch.Tensor:
    """EXO-pref, Ji et al. 2024 (https://arxiv.org/abs/2402.00856), equation 16.

    KL(p || q) of p = (σ(β h), σ(-β h)) and q = (1 - ε, ε), ε = `label_smoothing` > 0: the reverse
    of the KL that DPO minimises.
    """
    rewards = inputs.beta * inputs.difference
    smoothing = torch.tensor(label_smoothing, dtype=rewards.dtype, device=rewards.device)
    log_ratio = F.logsigmoid(rewards) - torch.log1p(-smoothing)
    flipped = F.logsigmoid(-rewards) - torch.log(smoothing)
    return torch.sigmoid(rewards) * log_ratio + torch.sigmoid(-rewards) * flipped


def discopop_loss(inputs: LossInput, discopop_tau: float = 0.05) -> torch.Tensor:
    """DiscoPOP, Lu et al. 2024 (https://arxiv.org/abs/2406.08414), equation 5: found by search.

    (1 - σ(β h / τ)) (-log σ(β h)) + σ(β h / τ) exp(-β h).
    """
    rewards = inputs.beta * inputs.difference
    share = torch.sigmoid(rewards / discopop_tau)
    # exp overflows only where its share is 0, and 0 · inf would be NaN.
    exponential = torch.exp((-rewards).clamp(max=LARGEST_EXPONENT))
    return -F.logsigmoid(rewards) * (1 - share) + exponential * share


def dpop_loss(inputs: LossInput, dpop_lambda: float = 50.0) -> torch.Tensor:
    """DPO-positive (Smaug), Pal et al. 2024 (https://arxiv.org/abs/2402.13228).

    -log σ(β (h - λ max(0, log π_ref(c|x) - log π(c|x)))): a fall of the chosen answer is paid for.
    """
    fall = torch.relu(-inputs.chosen_ratio)
    return logistic(inputs.beta * (inputs.difference - dpop_lambda * fall))


def nca_pair_loss(inputs: LossInput) -> torch.Tensor:
    """NCA for pairs, Chen et al. 2024 (https://arxiv.org/abs/2402.05369).

    -log σ(β a) - ½ log σ(-β a) - ½ log σ(-β b): absolute likelihoods, so that chosen does not sink.
    """
    chosen, rejected = inputs.beta * inputs.chosen_ratio, inputs.beta * inputs.rejected_ratio
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def bco_pair_loss(inputs: LossInput) -> torch.Tensor:
    """Binary classifier optimisation of pairs: Jung et al. 2024 (https://arxiv.org/abs/2404.04656).

    -log σ(β a) - log σ(-β b). As in TRL 1.16 without the paper's shift δ, a running mean of
    rewards: a loss that remembers earlier batches would depend on their order.
    """
    chosen, rejected = inputs.beta * inputs.chosen_ratio, inputs.beta * inputs.rejected_ratio
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


def sppo_hard_loss(inputs: LossInput) -> torch.Tensor:
    """SPPO, Wu et al. 2024 (https://arxiv.org/abs/2405.00675), equation 4.7, with wins of 1 and 0.

    (a - 1 / (2β))² + (b + 1 / (2β))².
    """
    target = 0.5 / inputs.beta
    return (inputs.chosen_ratio - target) ** 2 + (inputs.rejected_ratio + target) ** 2


def apo_zero_loss(inputs: LossInput) -> torch.Tensor:
    """APO-zero, D'Oosterlinck et al. 2024 (https://arxiv.org/abs/2408.06266), equation 7.

    1 - σ(β a) + σ(β b): chosen up, rejected down. For chosen answers better than the model's own.
    """
    chosen, rejected = inputs.beta * inputs.chosen_ratio, inputs.beta * inputs.rejected_ratio
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


def apo_down_loss(inputs: LossInput) -> torch.Tensor:
    """APO-down, D'Oosterlinck et al. 2024 (https://arxiv.org/abs/2408.06266), equation 8.

    σ(β a) + 1 - σ(β (a - b)): both down, rejected more. For chosen answers worse than the model's
    own.
    """
    chosen, rejected = inputs.chosen_ratio, inputs.rejected_ratio
    return torch.sigmoid(inputs.beta * chosen) + torch.sigmoid(-inputs.beta * (chosen - rejected))


def aot_loss(inputs: LossInput, label_smoothing: float = 0.0) -> torch.Tensor:
    """AOT for paired data, Melnyk et al. 2024 (https://arxiv.org/abs/2406.05882).

    The policy's log π(c|x) - log π(r|x), sorted, against the reference's, sorted: the former is to
    dominate. So the loss needs the whole step at once, and its values belong to ranks, not pairs.
    """
    policy, reference = (
        (logps.chosen - logps.rejected).sort().values
        for logps in (inputs.policy, inputs.known_reference)
    )
    return logistic(inputs.beta * (policy - reference), label_smoothing)


def aot_unpaired_loss(inputs: LossInput, label_smoothing: float = 0.0) -> torch.Tensor:
    """AOT for unpaired data (aot_pair in earlier versions of TRL).

    The log-ratios of all chosen answers, sorted, against those of all rejected, sorted.
    """
    difference = inputs.chosen_ratio.sort().values - inputs.rejected_ratio.sort().values
    return logistic(inputs.beta * difference, label_smoothing)


def kto_loss(
    inputs: LossInput, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> torch.Tensor:
    """KTO, Ethayarajh et al. 2024 (https://arxiv.org/abs/2402.01306), equation 8.

    λ_D (1 - σ(β (a - z))) of an answer that people liked, λ_U (1 - σ(β (z - a))) of another. z is
    the mean over the step of log π - log π_ref of other prompts' answers, at least 0 and without
    gradient: an estimate of KL(π || π_ref). As in TRL, but that TRL's mean is over a micro-batch.

    Of pairs, as in an evaluation, the mean of both answers' losses with z = 0.
    """
    if inputs.liked is None:
        return apo_zero_unpaired_loss(inputs, desirable_weight, undesirable_weight)
    divergence = inputs.rejected_ratio.detach().mean().clamp(min=0)
    rewards = inputs.beta * (inputs.chosen_ratio - divergence)
    return torch.where(
        inputs.liked,
        desirable_weight * torch.sigmoid(-rewards),
        undesirable_weight * torch.sigmoid(rewards),
    )


def apo_zero_unpaired_loss(
    inputs: LossInput, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> torch.Tensor:
    """APO-zero of single answers, as in TRL: λ_D (1 - σ(β a)), or λ_U σ(β a) of one not liked.

    Of pairs, as in an evaluation, the mean of both answers' losses.
    """
    chosen, rejected = inputs.beta * inputs.chosen_ratio, inputs.beta * inputs.rejected_ratio
    liked, not_liked = desirable_weight * torch.sigmoid(-chosen), undesirable_weight
    if inputs.liked is None:
        return (liked + not_liked * torch.sigmoid(rejected)) / 2
    return torch.where(inputs.liked, liked, not_liked * torch.sigmoid(chosen))


def sft_loss(inputs: LossInput) -> torch.Tensor:
    """Negative log-likelihood of chosen, as TRL's `sft`: the mean over the step's chosen tokens."""
    return -inputs.chosen_likelihood / inputs.mean_chosen_tokens


def nll_per_answer(inputs: LossInput) -> torch.Tensor:
    """RPO's term, Pang et al. 2024 (https://arxiv.org/abs/2404.19733), eq. 1: -log π(c|x) / |c|.

    Unlike in `sft` every answer weighs alike, however long it is.
    """
    return -inputs.chosen_likelihood / inputs.chosen_tokens


def simpo_loss(
    inputs: LossInput, simpo_gamma: float = 0.5, label_smoothing: float = 0.0
) -> torch.Tensor:
    """SimPO, Meng et al. 2024 (https://arxiv.org/abs/2405.14734), equation 6.

    -log σ(β (log π(c|x) / |c| - log π(r|x) / |r|) - γ).
    """
    policy = inputs.policy
    difference = policy.chosen / inputs.chosen_tokens - policy.rejected / inputs.rejected_tokens
    return logistic(inputs.beta * difference - simpo_gamma, label_smoothing)


def cpo_loss(
    inputs: LossInput, cpo_alpha: float = 1.0, label_smoothing: float = 0.0
) -> torch.Tensor:
    """CPO, Xu et al. 2024 (https://arxiv.org/abs/2401.08417), section 3.

    -log σ(β (log π(c|x) - log π(r|x))) + α NLL(c), the latter as in `sft`, like TRL's.
    """
    difference = inputs.policy.chosen - inputs.policy.rejected
    return logistic(inputs.beta * difference, label_smoothing) + cpo_alpha * sft_loss(inputs)


def orpo_loss(inputs: LossInput) -> torch.Tensor:
    """ORPO, Hong et al. 2024 (https://arxiv.org/abs/2403.07691), equation 6, with λ = β.

    NLL(c) - β log σ(log odds(c) - log odds(r)), odds = p / (1 - p) of p = exp(log π(y|x) / |y|).
    The NLL is that of the answer, as in `sft`; TRL's has the prompt's tokens in it too.
    """
    chosen = _log_odds(inputs.policy.chosen / inputs.chosen_tokens)
    rejected = _log_odds(inputs.policy.rejected / inputs.rejected_tokens)
    return sft_loss(inputs) - inputs.beta * F.logsigmoid(chosen - rejected)


def _log_odds(logp: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p)) from log p; certainty itself is taken as the next number below it."""
    logp = logp.clamp(max=-torch.finfo(logp.dtype).tiny)
    return logp - torch.log(-torch.expm1(logp))
