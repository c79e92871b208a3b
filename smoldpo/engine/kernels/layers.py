"""A decoder layer's parts as the same functions, with fewer passes over memory and closed-form backwards.

transformers wires the layers; what it calls inside them is swapped, on the engine's own copy of the model:

    RMSNorm            y = w x r,  r = (mean(x²) + ε)^-1/2     keeps x and r, not five tensors of x's size
    gated MLP          y = (silu(x Gᵀ) (x Uᵀ)) Dᵀ              keeps x, xGᵀ, xUᵀ; the product is formed anew
    linear layers      y = x Wᵀ + b                            in blocks of rows, see below; both keep x only
                                                               where a weight's gradient needs it
    rotary embedding   y = x cos + rot(x) sin                  its backward is the opposite rotation

Frozen matrices may lie in a narrower dtype than x (layers.py): both passes convert what they need, so
that between them nothing wider is kept.

Why blocks of rows: a CPU's matrix product may add in another order for another number of rows (oneDNN on
AMX does), so a pair's log-probabilities would depend on what else is in the stream, in bfloat16 by whole
nats. Every forward product here has the same number of rows, the last block padded, so a row's result
depends on that row alone, to the last bit. That is why the first loss is ln 2 exactly, and why stored trunk
states equal recomputed ones. Backward products are not filled up: they are not compared across streams.

Dimensions: T rows, D model width, F width inside the MLP.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from smoldpo.engine.kernels.elementwise import (
    gated_product,
    gated_slopes,
    normed,
    normed_slopes,
    rotated,
)

ROWS = 512
"""Rows of a forward product on a CPU, and of what is done between products to stay in its cache."""

TRUNK_ROWS = 1920
"""The same below the freeze boundary, where streams are long: the fastest size for SmolLM2-135M on AMX."""


def row_blocks(states: torch.Tensor, rows: int) -> list[slice]:
    """Blocks of so many rows of a [T, ...] tensor; on other devices than a CPU all rows at once."""
    total = len(states)
    size = rows if states.device.type == "cpu" else total
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def block_product(
    block: torch.Tensor, weight: torch.Tensor, result: torch.Tensor, rows: int
) -> None:
    """result [n, F] = block [n, D] times weightᵀ, filled up to `rows`: each row as if it were alone."""
    if len(block) == rows or block.device.type != "cpu":
        torch.mm(block, weight.T, out=result)
        return
    padded = block.new_zeros(rows, block.shape[1])
    padded[: len(block)] = block
    result.copy_(torch.mm(padded, weight.T)[: len(block)])


def rows_product(states: torch.Tensor, weight: torch.Tensor, rows: int = ROWS) -> torch.Tensor:
    """states [T, D] times weightᵀ [D, F], block by block: [T, F]."""
    result = states.new_empty(len(states), len(weight))
    for block in row_blocks(states, rows):
        block_product(states[block], weight, result[block], rows)
    return result


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, rows: int
    ) -> torch.Tensor:
        ctx.save_for_backward(states if ctx.needs_input_grad[1] else None, weight)
        result = rows_product(states.flatten(0, -2), widened(weight, states), rows)
        if bias is not None:
            result += bias
        return result.view(*states.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        states, weight = ctx.saved_tensors
        flat = grad.flatten(0, -2)
        d_states = None
        if ctx.needs_input_grad[0]:
            d_states = (flat @ widened(weight, flat)).view(*grad.shape[:-1], -1)
        d_weight = flat.T @ states.flatten(0, -2) if ctx.needs_input_grad[1] else None
        d_bias = _column_sums(flat) if ctx.needs_input_grad[2] else None
        return d_states, d_weight, d_bias, None


def _column_sums(values: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(values.dtype, torch.float32)
    return values.sum(0, dtype=wide).to(values.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, weight: torch.Tensor, epsilon: float
    ) -> torch.Tensor:
        flat = states.flatten(0, -2)
        wide = torch.promote_types(states.dtype, torch.float32)
        result = torch.empty_like(flat, dtype=weight.dtype)
        scale = flat.new_empty(len(flat), 1, dtype=wide)
        for rows in row_blocks(flat, ROWS):
            result[rows], scale[rows] = normed(flat[rows], weight, epsilon)
        ctx.save_for_backward(flat, weight, scale)
        return result.view(states.shape)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        states, weight, scale = ctx.saved_tensors
        flat = grad.flatten(0, -2)
        result, d_weight = torch.empty_like(states), scale.new_zeros(len(weight))
        for rows in row_blocks(flat, ROWS):
            result[rows], part = normed_slopes(states[rows], scale[rows], weight, flat[rows])
            d_weight += part
        wanted = ctx.needs_input_grad[1]
        return result.view(grad.shape), d_weight.to(weight.dtype) if wanted else None, None


class _GatedMLP(torch.autograd.Function):
    """With a = x Gᵀ, u = x Uᵀ:  y = (silu(a) u) Dᵀ.

    Block by block, so that what is F wide stays in the cache between the steps.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        gate: torch.Tensor,
        up: torch.Tensor,
        down: torch.Tensor,
        keeps: bool,
        size: int,
    ) -> torch.Tensor:
        flat = states.flatten(0, -2)
        weights = (gate, up, down)
        gate, up, down = (widened(weight, flat) for weight in weights)
        result = torch.empty_like(flat)
        blocks = row_blocks(flat, size)
        width = len(flat) if keeps else blocks[0].stop
        gated, raised = (flat.new_empty(width, len(gate)) for _ in range(2))
        for rows in blocks:
            kept = rows if keeps else slice(0, rows.stop - rows.start)
            block_product(flat[rows], gate, gated[kept], size)
            block_product(flat[rows], up, raised[kept], size)
            block_product(gated_product(gated[kept], raised[kept]), down, result[rows], size)
        if keeps:
            read = flat if any(ctx.needs_input_grad[1:3]) else None
            ctx.save_for_backward(read, gated, raised, *weights)
        return result.view_as(states)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        states, gated, raised, *weights = ctx.saved_tensors
        flat = grad.flatten(0, -2)
        gate, up, down = (widened(weight, flat) for weight in weights)
        product, d_gated, d_raised = (torch.empty_like(gated) for _ in range(3))
        d_states = torch.empty_like(flat)
        for rows in row_blocks(flat, ROWS):
            product[rows], d_raised[rows], d_gated[rows] = gated_slopes(
                gated[rows], raised[rows], flat[rows] @ down
            )
            torch.mm(d_gated[rows], gate, out=d_states[rows])
            d_states[rows].addmm_(d_raised[rows], up)
        return (
            d_states.view_as(grad),
            d_gated.T @ states if ctx.needs_input_grad[1] else None,
            d_raised.T @ states if ctx.needs_input_grad[2] else None,
            flat.T @ product if ctx.needs_input_grad[3] else None,
            None,
            None,
        )


class _Rotary(torch.autograd.Function):
    """Backward is the rotation by the opposite angles; cos and sin are the same for both halves."""

    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return rotated(states, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return rotated(grad, cos, sin, -1), None, None


def rotary(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    unsqueeze_dim: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' `apply_rotary_pos_emb`: both rotated by their positions' angles."""
    cos, sin = (part.unsqueeze(unsqueeze_dim).to(query.dtype) for part in (cos, sin))
    return _Rotary.apply(query, cos, sin), _Rotary.apply(key, cos, sin)


def _linear_forward(self: nn.Linear, states: torch.Tensor) -> torch.Tensor:
    return _Linear.apply(states, self.weight, self.bias, self.smoldpo_rows)


def _norm_forward(self: Any, states: torch.Tensor) -> torch.Tensor:
    return _RMSNorm.apply(states, self.weight, self.variance_epsilon)


def _mlp_forward(self: Any, states: torch.Tensor) -> torch.Tensor:
    parts = (self.gate_proj, self.up_proj, self.down_proj)
    weights = (part.weight for part in parts)
    return _GatedMLP.apply(states, *weights, torch.is_grad_enabled(), self.smoldpo_rows)


def make_lean(base: nn.Module, rows: int = ROWS) -> None:
    """Swap the parts of a base model or layer (Llama's shape) for the ones above, in place.

    Args:
        rows: of a forward product; whatever must agree with one another must have the same.
    """
    for module in base.modules():
        module.smoldpo_rows = rows
        if isinstance(module, nn.Linear):
            module.forward = types.MethodType(_linear_forward, module)
        elif type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(_norm_forward, module)
        elif _is_gated_mlp(module):
            module.forward = types.MethodType(_mlp_forward, module)


def leave_lean(base: nn.Module) -> None:
    """Undo `make_lean`: every module computes by its class again."""
    for module in base.modules():
        vars(module).pop("forward", None)
        vars(module).pop("smoldpo_rows", None)


def _is_gated_mlp(module: nn.Module) -> bool:
    parts = [getattr(module, f"{name}_proj", None) for name in ("gate", "up", "down")]
    plain = all(isinstance(part, nn.Linear) and part.bias is None for part in parts)
    return plain and type(module.act_fn).__name__ in ("SiLU", "SiLUActivation")


@contextlib.contextmanager
def lean_rotary(base: nn.Module) -> Iterator[None]:
    """Within the block the model's own module rotates by `rotary`: it calls a function of its module."""
    module = sys.modules[type(base).__module__]
    before = module.apply_rotary_pos_emb
    module.apply_rotary_pos_emb = rotary
    try:
        yield
    finally:
        module.apply_rotary_pos_emb = before


# Layers whose weights lie in a narrower dtype than they compute in, and are converted by each product.
#
# Every number of bfloat16 and of float16 is one of float32, so nothing is rounded: results are to the last
# bit those of weights that were converted beforehand.


def widened(weight: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """The weight in the states' dtype where that holds it exactly; else as it is, and the product refuses."""
    exact = torch.promote_types(weight.dtype, states.dtype) == states.dtype
    return weight.to(states.dtype) if exact else weight


def compute_in(model: nn.Module, dtype: torch.dtype) -> bool:
    """Let linear layers and embeddings whose weights are in another dtype compute in this one; if any are."""
    kinds = (nn.Linear, nn.Embedding)
    narrow = [m for m in model.modules() if isinstance(m, kinds) and m.weight.dtype != dtype]
    for module in narrow:
        forward = _linear if isinstance(module, nn.Linear) else _embedded
        module.forward = partial(forward, module, dtype)
    return bool(narrow)


def _linear(module: nn.Linear, dtype: torch.dtype, states: torch.Tensor) -> torch.Tensor:
    return F.linear(states, module.weight.to(dtype), module.bias)


def _embedded(module: nn.Embedding, dtype: torch.dtype, ids: torch.Tensor) -> torch.Tensor:
    return F.embedding(ids, module.weight).to(dtype)
