"""f-divergences: Wang et al. 2023, https://arxiv.org/abs/2309.16240, table 1.

A policy held to the reference by an f-divergence has the implicit reward β f'(π/π_ref) + β log Z(x)
(theorem 1), so DPO's log-ratio becomes f'(π/π_ref) and the rest of a loss stays. Each function here
takes log(π/π_ref) of any shape and returns f'(π/π_ref). Constants in f' cancel, and are left out.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

Divergence = Callable[[torch.Tensor], torch.Tensor]

LARGEST_EXPONENT = 80.0
"""exp of it is still a float32; TRL clamps there too. Beyond it the gradient is 0."""


def reverse_kl(ratio: torch.Tensor) -> torch.Tensor:
    """f(u) = u log u, f'(u) = log u + 1: DPO itself."""
    return ratio


def forward_kl(ratio: torch.Tensor) -> torch.Tensor:
    """f(u) = -log u, f'(u) = -1/u; TRL's 1 - 1/u differs by a constant."""
    return 1 - torch.exp((-ratio).clamp(max=LARGEST_EXPONENT))


def js_divergence(ratio: torch.Tensor) -> torch.Tensor:
    """f'(u) = log(2u / (1 + u))."""
    return math.log(2) + F.logsigmoid(ratio)


def alpha_divergence(ratio: torch.Tensor, alpha: float) -> torch.Tensor:
    """f'(u) = (u^(α-1) - 1) / (α - 1) as TRL has it; its limit at α = 1 is reverse KL.

    The paper writes α for what is 1 - α here, and its f' has the same differences.
    """
    if abs(alpha - 1) < 1e-6:
        return ratio
    power = ((alpha - 1) * ratio).clamp(max=LARGEST_EXPONENT)
    return torch.expm1(power) / (alpha - 1)


def divergence(name: str, alpha: float = 0.5) -> Divergence:
    """The f' of a name; α is alpha_divergence's alone."""
    if name == "alpha_divergence":
        return functools.partial(alpha_divergence, alpha=alpha)
    return {f.__name__: f for f in (reverse_kl, forward_kl, js_divergence)}[name]
