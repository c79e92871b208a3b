"""Losses of the policy's log-probabilities alone: no reference takes part, and so none is run.

Each returns one loss a pair, [pairs], whose mean over the step is the loss.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from smoldpo.losses.difference import logistic
from smoldpo.losses.inputs import LossInput


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
