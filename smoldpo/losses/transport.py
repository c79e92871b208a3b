"""AOT: losses of whole distributions, Melnyk et al. 2024 (https://arxiv.org/abs/2406.05882).

Quantiles are sorted against quantiles, so the loss of a step is no sum over its pairs: it needs all
log-probabilities of the step at once, and the values returned, [pairs], belong to ranks and not to pairs.
"""

from __future__ import annotations

import torch

from smoldpo.losses.difference import logistic
from smoldpo.losses.inputs import LossInput


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
