"""Adapters that do not train, beside weights that stay as they are: nothing is merged, and nothing copied."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from smoldpo.models.adapters import NAME, adapted_modules, magnitude_of
from smoldpo.models.lean_adapters import row_lengths


class Adapted(nn.Module):
    """y = c (x Wᵀ) + (x Aᵀ) (s c B)ᵀ + b; c is 1 but for DoRA (lean_adapters.py), and a constant here.

    Args:
        linear: x Wᵀ + b.
        module: peft's, with the adapter.
    """

    @torch.no_grad()
    def __init__(self, linear: nn.Linear, module: Any):
        super().__init__()
        self.linear = linear
        down, up = module.lora_A[NAME].weight, module.scaling[NAME] * module.lora_B[NAME].weight
        magnitude = magnitude_of(module)
        self.scale = None if magnitude is None else magnitude.weight / row_lengths(module)
        if self.scale is not None:
            up = (self.scale[:, None] * up).to(up.dtype)
        self.down, self.up = (nn.Parameter(p.detach(), requires_grad=False) for p in (down, up))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[..., D] to [..., F]."""
        result = self.linear(states)
        if self.scale is not None:
            bias = 0.0 if self.linear.bias is None else self.linear.bias
            result = ((result - bias) * self.scale + bias).to(result.dtype)
        return result + F.linear(F.linear(states, self.down), self.up)


def put_adapters(model: nn.Module, policy: nn.Module) -> None:
    """Give `model`, in place, the adapters that `policy` has in peft's modules, as they are now."""
    adapted = set(adapted_modules(policy))
    for name, module in policy.named_modules():
        if module in adapted:
            model.set_submodule(name, Adapted(model.get_submodule(name), module), strict=True)
