"""The native kernels as autograd functions, in bfloat16 on the CPU.

The formulas stand in the sources (source/*.cpp) and, in torch, in kernels/layers.py and
kernels/attention.py.

Dimensions: T rows (padded to a multiple of 32), D model width, F width inside the MLP; H query
heads, K key/value heads, d of one head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from smoldpo.engine.kernels.native.library import Library
from smoldpo.engine.layout import Layout

MULTIPLE = 32
"""Rows and widths are computed in multiples of this."""


def _rows(states: torch.Tensor) -> torch.Tensor:
    """[..., D] as [T, D] in bfloat16, contiguous, with zeros up to a multiple of 32 rows."""
    assert states.dtype == torch.bfloat16
    flat = states.reshape(-1, states.shape[-1])
    padding = -len(flat) % MULTIPLE
    return F.pad(flat, (0, 0, 0, padding)) if padding else flat.contiguous()


def _like(rows: torch.Tensor, states: torch.Tensor, width: int) -> torch.Tensor:
    """The rows without their padding, in the shape of `states` but for the width."""
    return rows[: states.numel() // states.shape[-1]].view(*states.shape[:-1], width)


class _Gradients:
    """Where a kernel puts gradients of weights: as the engine collects them, or in new tensors.

    A leaf of the engine (engine/precision.py) lets the kernel add to its float32 buffer when it is
    the stream's turn, which rounds nothing and saves a pass over memory; autograd is given none.

    Args:
        adding: of each weight, the leaf's context; None where it is an ordinary tensor.
    """

    def __init__(self, weights: Sequence[torch.Tensor], wanted: Sequence[bool], adding: Any):
        self._stack = contextlib.ExitStack()
        self.narrow: list[torch.Tensor | None] = [None] * len(weights)
        self.wide: list[torch.Tensor | None] = [None] * len(weights)
        self.add = [0] * len(weights)
        for index, (weight, wants) in enumerate(zip(weights, wanted, strict=True)):
            if wants and adding[index] is not None:
                self.wide[index], self.add[index] = self._stack.enter_context(adding[index]())
            elif wants:
                self.narrow[index] = torch.empty_like(weight)

    def __enter__(self) -> _Gradients:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)


def _adding(*weights: torch.Tensor) -> list[Any]:
    return [getattr(weight, "adding", None) for weight in weights]


class LinearFunction(torch.autograd.Function):
    """y = x Wᵀ + b."""

    @staticmethod
    def forward(
        ctx: Any,
        native: Library,
        states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        rows = _rows(states)
        ctx.native, ctx.adding = native, _adding(weight)
        ctx.save_for_backward(rows if ctx.needs_input_grad[2] else None, weight)
        result = rows.new_empty(len(rows), len(weight))
        native.call("linear_forward", rows, weight, result, *rows.shape, len(weight))
        if bias is not None:
            result += bias
        return _like(result, states, len(weight))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        states, weight = ctx.saved_tensors
        _, wants_states, wants_weight, wants_bias = ctx.needs_input_grad
        rows, width = _rows(grad), weight.shape[1]
        d_states = rows.new_empty(len(rows), width) if wants_states else None
        with _Gradients([weight], [wants_weight], ctx.adding) as found:
            arguments = (states, rows, weight, d_states, *found.narrow, *found.wide, *found.add)
            ctx.native.call("linear_backward", *arguments, len(rows), width, len(weight))
        d_bias = rows.sum(0, dtype=torch.float32).to(rows.dtype) if wants_bias else None
        d_states = None if d_states is None else _like(d_states, grad, width)
        return None, d_states, *found.narrow, d_bias


class RMSNormFunction(torch.autograd.Function):
    """y = w x r, from states in float32 or bfloat16."""

    @staticmethod
    def forward(
        ctx: Any, native: Library, states: torch.Tensor, weight: torch.Tensor, epsilon: float
    ) -> torch.Tensor:
        assert states.dtype in (torch.float32, torch.bfloat16)
        flat = states.reshape(-1, len(weight)).contiguous()
        scale = flat.new_empty(len(flat), dtype=torch.float32)
        result = torch.empty_like(flat, dtype=weight.dtype)
        narrow = flat.dtype == torch.bfloat16
        native.call("norm_forward", flat, weight, result, scale, narrow, *flat.shape, epsilon)
        ctx.native = native
        ctx.save_for_backward(flat, weight, scale)
        return result.view(states.shape)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        states, weight, scale = ctx.saved_tensors
        flat, narrow = grad.reshape(states.shape).contiguous(), states.dtype == torch.bfloat16
        d_states = torch.empty_like(states)
        d_weight = scale.new_zeros(len(weight)) if ctx.needs_input_grad[2] else None
        arguments = (states, weight, scale, flat, d_states, d_weight, narrow)
        ctx.native.call("norm_backward", *arguments, *states.shape)
        d_weight = None if d_weight is None else d_weight.to(weight.dtype)
        return None, d_states.view(grad.shape), d_weight, None


class GatedMLPFunction(torch.autograd.Function):
    """y = (silu(x Gᵀ) (x Uᵀ)) Dᵀ."""

    @staticmethod
    def forward(
        ctx: Any,
        native: Library,
        states: torch.Tensor,
        gate_weight: torch.Tensor,
        up_weight: torch.Tensor,
        down_weight: torch.Tensor,
        keep: bool,
    ) -> torch.Tensor:
        rows, weights = _rows(states), (gate_weight, up_weight, down_weight)
        shape = (*rows.shape, len(gate_weight))
        inner = rows.new_empty(2, len(gate_weight), len(rows)) if keep else None
        result = torch.empty_like(rows)
        native.call("mlp_forward", rows, *weights, result, inner, *shape)
        if keep:
            ctx.native, ctx.shape, ctx.adding = native, shape, _adding(*weights)
            ctx.save_for_backward(rows if any(ctx.needs_input_grad[2:4]) else None, inner, *weights)
        return _like(result, states, states.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        states, inner, *weights = ctx.saved_tensors
        rows = _rows(grad)
        d_states = torch.empty_like(rows) if ctx.needs_input_grad[1] else None
        with _Gradients(weights, ctx.needs_input_grad[2:5], ctx.adding) as found:
            targets = (*found.narrow, *found.wide, *found.add)
            arguments = (states, rows, inner, *weights, d_states, *targets)
            ctx.native.call("mlp_backward", *arguments, *ctx.shape)
        d_states = None if d_states is None else _like(d_states, grad, grad.shape[-1])
        return None, d_states, *found.narrow, None


class RotaryFunction(torch.autograd.Function):
    """Rotation of [1, H, T, d] that lies in memory as [T, H, d]; angles [T, d] in float32."""

    @staticmethod
    def forward(
        ctx: Any, native: Library, states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        ctx.native = native
        ctx.save_for_backward(cos, sin)
        return _rotated(native, states, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return None, _rotated(ctx.native, grad, cos, sin, -1.0), None, None


def _rotated(
    native: Library, states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, direction: float
) -> torch.Tensor:
    rows = _by_token(states)
    result = torch.empty_like(rows)
    native.call("rotate", rows, cos, sin, result, *rows.shape, direction)
    return result.transpose(0, 1)[None]


def _by_token(states: torch.Tensor) -> torch.Tensor:
    """[1, H, T, d] as [T, H, d], contiguous: how it lies in memory already behind a product."""
    assert states.dtype == torch.bfloat16 and states.shape[0] == 1
    return states[0].transpose(0, 1).contiguous()


class AttentionFunction(torch.autograd.Function):
    """Attention of all pairs of a stream, [1, T, H, d]."""

    @staticmethod
    def forward(
        ctx: Any,
        native: Library,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        layout: Layout,
        read: bool,
    ) -> torch.Tensor:
        query, key, value = map(_by_token, (query, key, value))
        pairs = layout.pairs[int(read)]
        tokens, heads, width = query.shape
        result = torch.zeros_like(query)
        total = query.new_empty(heads, tokens, dtype=torch.float32)
        shape = (tokens, heads, key.shape[1], width)
        arguments = (query, key, value, result, total, pairs, len(pairs))
        native.call("attention_forward", *arguments, *shape, scaling)
        ctx.native, ctx.shape, ctx.scaling, ctx.prefix = native, shape, scaling, layout.prefix
        ctx.save_for_backward(query, key, value, result, total, pairs)
        return result[None]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, result, total, pairs = ctx.saved_tensors
        assert grad.dtype == torch.bfloat16
        grads = [torch.zeros_like(states) for states in (query, key, value)]
        arguments = (query, key, value, result, total, grad[0].contiguous(), *grads, pairs)
        sizes = (len(pairs), ctx.prefix, *ctx.shape)
        ctx.native.call("attention_backward", *arguments, *sizes, ctx.scaling)
        return None, *(states.transpose(0, 1)[None] for states in grads), None, None, None


def attention_fits(query: torch.Tensor, window: int | None) -> bool:
    """Whether the kernel computes this layer's attention: no sliding window, bfloat16."""
    return window is None and query.dtype == torch.bfloat16 and query.shape[-1] % MULTIPLE == 0
