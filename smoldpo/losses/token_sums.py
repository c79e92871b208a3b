"""What is made of more than the sums of token log-probabilities: LD-DPO's lengths, WPO's weights."""

from __future__ import annotations

from dataclasses import replace

import torch

from smoldpo.types import PairLogps


def desensitised(logps: PairLogps, ld_alpha: float) -> PairLogps:
    """LD-DPO, Liu et al. 2024 (https://arxiv.org/abs/2409.06411): what is longer counts for less.

    With n the tokens of the pair's shorter answer, log π(y|x) becomes Σ_{t ≤ n} log π(y_t) + α Σ_{t > n} log
    π(y_t), α = `ld_alpha` in [0, 1]: the whole sum less 1 - α of its tail. α 1 changes nothing.

    Raises:
        ValueError: log-probabilities without their tails.
    """
    if logps.chosen_tail is None or logps.rejected_tail is None:
        raise ValueError("ld_alpha needs the log-probabilities' tails, and none were given")
    left_out = 1 - ld_alpha
    return replace(
        logps,
        chosen=logps.chosen - left_out * logps.chosen_tail,
        rejected=logps.rejected - left_out * logps.rejected_tail,
    )


def pair_weights(
    policy: PairLogps, chosen_tokens: torch.Tensor, rejected_tokens: torch.Tensor
) -> torch.Tensor:
    """WPO, Zhou et al. 2024 (https://arxiv.org/abs/2406.11827): w(c) w(r) of each pair, [pairs], detached.

    w(y) = exp of the mean over y's tokens of log π(y_t) - log Σ_v π(v)². Σ_v π(v)² is the probability that π
    gives to a token of its own on the average, so w is near 1 for answers that π itself might give and small
    for others. Not cut off above 1, as in TRL 1.16 and the paper's equation 2.

    Raises:
        ValueError: log-probabilities without their squares.
    """
    if policy.chosen_squares is None or policy.rejected_squares is None:
        raise ValueError(
            "use_weighting needs Σ log Σ p² of the policy: make the engine with use_weighting"
        )
    chosen = (policy.chosen.detach() - policy.chosen_squares) / chosen_tokens
    rejected = (policy.rejected.detach() - policy.rejected_squares) / rejected_tokens
    return torch.exp(chosen + rejected)
