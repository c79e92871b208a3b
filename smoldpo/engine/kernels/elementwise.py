"""What a layer computes between its matrix products: pure functions, each of which may be compiled.

Eager, each line is a pass over memory. torch.compile makes one pass of each function, which saves 5
to 15% of the time on a CPU and takes some twenty seconds. So the run's length decides whether it is
done (engine/compile.py), and the results differ by rounding alone.

Every function takes and returns [rows, width] tensors. "Full" precision is float32, or float64.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F


class Elementwise:
    """A function, plain or compiled; shapes are dynamic, so that it is not compiled for each.

    torch.compile also tells a parameter, a view and what requires a gradient from other tensors,
    and after eight such variants goes on without compiling. No derivative is taken of these
    functions, so they are given all tensors detached, which are alike.
    """

    def __init__(self, function: Callable[..., Any]):
        self.plain = function
        self.compiled: Callable[..., Any] | None = None

    def __call__(self, *arguments: Any) -> Any:
        if self.compiled is None:
            return self.plain(*arguments)
        tensors = (a.detach() if isinstance(a, torch.Tensor) else a for a in arguments)
        return self.compiled(*tensors)


def _functions() -> list[Elementwise]:
    return [member for member in globals().values() if isinstance(member, Elementwise)]


def set_compiled(compiled: bool) -> None:
    """Compile all functions of this module from their next call on, or stop doing so."""
    for function in _functions():
        function.compiled = (
            # One thread, as all that a worker computes; elsewhere than on a CPU this says nothing.
            torch.compile(function.plain, dynamic=True, options={"cpp.threads": 1})
            if compiled
            else None
        )


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """What the block compiles is compiled in the block alone: others compute as before."""
    before = [(function, function.compiled) for function in _functions()]
    try:
        yield
    finally:
        for function, compiled in before:
            function.compiled = compiled


@Elementwise
def rms_norm(
    states: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm: w x r, and r = (mean(x²) + ε)^-1/2 [rows, 1] in full."""
    full = states.to(torch.promote_types(states.dtype, torch.float32))
    norm = torch.linalg.vector_norm(full, dim=-1, keepdim=True)
    scale = norm.square().div(states.shape[-1]).add(epsilon).rsqrt()
    # Rounded before the weight is applied, as transformers does.
    return (full * scale).to(weight.dtype) * weight, scale


@Elementwise
def rms_norm_grads(
    states: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx = r (w g - n mean(w g n)) with n = x r, and dw = sum over rows of g n, in full."""
    unit = states.to(scale.dtype) * scale
    grad = grad.to(scale.dtype)
    d_weight = (grad * unit).sum(0)
    grad = grad * weight
    shared = (grad * unit).sum(-1, keepdim=True) / -states.shape[-1]
    return torch.addcmul(grad, unit, shared).mul(scale).to(states.dtype), d_weight


@Elementwise
def gated_product(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(a) u, with a the gate."""
    return F.silu(gate) * up


@Elementwise
def gated_product_grads(
    gate: torch.Tensor, up: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The product silu(a) u again, and from its gradient g: du = g silu(a), da = g u silu'(a)."""
    silu = F.silu(gate)
    d_gate = torch.ops.aten.silu_backward(grad * up, gate)
    return silu * up, silu * grad, d_gate


@Elementwise
def rotate(
    states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, direction: int
) -> torch.Tensor:
    """For halves x1, x2: (x1 cos - x2 sin, x2 cos + x1 sin), or with direction -1 the way back."""
    half = states.shape[-1] // 2
    result = states * cos
    result[..., :half].addcmul_(states[..., half:], sin[..., half:], value=-direction)
    result[..., half:].addcmul_(states[..., :half], sin[..., :half], value=direction)
    return result
