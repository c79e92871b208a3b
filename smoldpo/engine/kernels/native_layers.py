"""A layer's parts that compute by the native kernels, where these fit.

A part is taken where its weights are such as the kernels know (`fits`); everything else stays with
torch's functions (kernels/layers.py), so a model's families, adapters and odd shapes all compute.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from smoldpo.engine.kernels import layers
from smoldpo.engine.kernels.layers import apply, with_rotary
from smoldpo.engine.kernels.native.functions import (
    MULTIPLE,
    GatedMLPFunction,
    LinearFunction,
    RMSNormFunction,
    RotaryFunction,
)
from smoldpo.engine.kernels.native.library import Library


def fits(*weights: torch.Tensor) -> bool:
    """Whether the kernels take these weights: bfloat16 on the CPU, all sides multiples of 32."""
    return all(
        weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and weight.is_contiguous()
        and all(side % MULTIPLE == 0 for side in weight.shape)
        for weight in weights
    )


def rotary(
    native: Library,
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    unsqueeze_dim: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """layers.rotary, with angles [1, T, d] that are not rounded."""
    width = query.shape[-1]
    if query.dtype != torch.bfloat16 or width % MULTIPLE or cos.shape[-1] != width:
        return layers.rotary(query, key, cos, sin, unsqueeze_dim)
    angles = [part[0].float().contiguous() for part in (cos, sin)]
    rotated = [apply(RotaryFunction, native, states, *angles) for states in (query, key)]
    return rotated[0], rotated[1]


class Linear(layers.Linear):
    """A linear layer."""

    native: Library

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[..., D] to [..., F]."""
        return apply(LinearFunction, self.native, states, self.weight, self.bias)


class RMSNorm(layers.RMSNorm):
    """transformers' norms of that name."""

    native: Library

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[..., D] to the same shape."""
        return apply(RMSNormFunction, self.native, states, self.weight, self.variance_epsilon)


class GatedMLP(layers.GatedMLP):
    """Llama's MLP: no bias, SiLU."""

    native: Library

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[..., D] to the same shape."""
        weights = (self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)
        return apply(GatedMLPFunction, self.native, states, *weights, torch.is_grad_enabled())


_PARTS: dict[type[nn.Module], type[nn.Module]] = {
    layers.Linear: Linear,
    layers.RMSNorm: RMSNorm,
    layers.GatedMLP: GatedMLP,
}


def native_kind(
    kind: Callable[[nn.Module], type[nn.Module]], native: Library
) -> Callable[[nn.Module], type[nn.Module]]:
    """`kind` (see layers.own_modules), with native parts in place of torch's where they fit."""

    def of(module: nn.Module) -> type[nn.Module]:
        found = kind(module)
        if found in _PARTS and fits(*(p for n, p in module.named_parameters() if "bias" not in n)):
            part: Any = _PARTS[found]
            return _bound(part, native)
        if found is with_rotary(type(module)):
            return with_rotary(type(module), _rotary_of(native))
        return found

    return of


@cache
def _bound(part: Any, native: Library) -> type[nn.Module]:
    return type(part.__name__, (part,), {"native": native})


@cache
def _rotary_of(native: Library) -> Callable[..., Any]:
    return partial(rotary, native)
