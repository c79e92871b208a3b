"""Adapters that do not train, beside weights that stay as they are: nothing is merged, and nothing copied."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from smoldpo.models.adapters import NAME, adapted_modules, magnitude_of
from smoldpo.models.lean_adapters import row_lengths
from smoldpo.models.widening import widened


class Adapted(nn.Module):
    """y = c (x Wᵀ) + (x Aᵀ) (s c B)ᵀ + b; c is 1 but for DoRA (lean_adapters.py), and a constant here.

    Args:
        linear: x Wᵀ + b; for DoRA the bias is taken out of it.
        module: peft's, with the adapter.
    """

    @torch.no_grad()
    def __init__(self, linear: nn.Linear, module: Any):
        super().__init__()
        self.linear = linear
        down, up = module.lora_A[NAME].weight, module.scaling[NAME] * module.lora_B[NAME].weight
        magnitude = magnitude_of(module)
        self.scale = self.bias = None
        if magnitude is not None:
            self.bias, linear.bias = linear.bias, None
            self.scale = magnitude.weight / row_lengths(module, widened(linear.weight, down))
            up = (self.scale[:, None] * up).to(up.dtype)
        self.down, self.up = (nn.Parameter(p.detach(), requires_grad=False) for p in (down, up))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[..., D] to [..., F]."""
        result = self.linear(states)
        if self.scale is not None:
            result = result.mul_(self.scale)
        result += F.linear(F.linear(states, self.down), self.up)
        return result if self.bias is None else result + self.bias


def put_adapters(model: nn.Module, policy: nn.Module) -> None:
    """Give `model`, in place, the adapters that `policy` has in peft's modules, as they are now."""
    adapted = set(adapted_modules(policy))
    for name, module in policy.named_modules():
        if module in adapted:
            model.set_submodule(name, Adapted(model.get_submodule(name), module), strict=True)
