"""What a layer computes between its matrix products: pure functions, each of which may be compiled.

Eager, each line is a pass over memory. torch.compile makes one pass of each function, which saves 5 to
15% of the time on a CPU and takes some twenty seconds to do. So whether it is done is a matter of
the run's length (engine/compile.py), and the results differ by rounding alone.

Every function takes and returns [rows, width] tensors; `wide` is float32, or float64 for float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F


class Region:
    """A function, plain or compiled; shapes are dynamic, so that it is not compiled for each.

    torch.compile also tells a parameter, a view and what requires a gradient from other tensors, and after
    eight such variants goes on without compiling. No derivative is taken of a region, so it is given all of
    them detached, which are alike.
    """

    def __init__(self, function: Callable[..., Any]):
        self.plain = function
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, *arguments: Any) -> Any:
        if self._compiled is None:
            return self.plain(*arguments)
        return self._compiled(*(_detached(argument) for argument in arguments))

    def switch(self, compiled: bool) -> None:
        self._compiled = torch.compile(self.plain, dynamic=True) if compiled else None


def _detached(argument: Any) -> Any:
    return argument.detach() if isinstance(argument, torch.Tensor) else argument


def switch_regions(compiled: bool) -> None:
    """Compile all regions from their next call on, or go back to the plain functions."""
    for found in globals().values():
        if isinstance(found, Region):
            found.switch(compiled)


@Region
def normed(
    states: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm: w x r, and r = (mean(x²) + ε)^-1/2 [rows, 1] in wide."""
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = norm.square().div(states.shape[-1]).add(epsilon).rsqrt()
    # Rounded before the weight is applied, as transformers does.
    return (wide * scale).to(weight.dtype) * weight, scale


@Region
def normed_slopes(
    states: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx = r (w g - n mean(w g n)) with n = x r, and dw = sum over rows of g n, in wide."""
    unit = states.to(scale.dtype) * scale
    slope = grad.to(scale.dtype)
    d_weight = (slope * unit).sum(0)
    slope = slope * weight
    shared = (slope * unit).sum(-1, keepdim=True) / -states.shape[-1]
    return torch.addcmul(slope, unit, shared).mul(scale).to(states.dtype), d_weight


@Region
def gated_product(gated: torch.Tensor, raised: torch.Tensor) -> torch.Tensor:
    """silu(a) u."""
    return F.silu(gated) * raised


@Region
def gated_slopes(
    gated: torch.Tensor, raised: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The product silu(a) u again, and from its gradient g: du = g silu(a), da = g u silu'(a)."""
    silu = F.silu(gated)
    d_gated = torch.ops.aten.silu_backward(grad * raised, gated)
    return silu * raised, silu * grad, d_gated


@Region
def rotated(
    states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, direction: int
) -> torch.Tensor:
    """For halves x1, x2: (x1 cos - x2 sin, x2 cos + x1 sin), or with direction -1 the way back."""
    half = states.shape[-1] // 2
    result = states * cos
    result[..., :half].addcmul_(states[..., half:], sin[..., half:], value=-direction)
    result[..., half:].addcmul_(states[..., :half], sin[..., :half], value=direction)
    return result
