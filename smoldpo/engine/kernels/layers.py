"""A decoder layer's parts with fewer passes over memory and closed-form backward passes.

transformers wires the layers; an engine computes with modules of its own (`own_modules`), which
share the model's parameters and compute by the classes below:

    RMSNorm           y = w x r,  r = (mean(x²) + ε)^-1/2   saves x and r, not five such tensors
    gated MLP         y = (silu(x Gᵀ) (x Uᵀ)) Dᵀ            saves x, xGᵀ, xUᵀ; product recomputed
    linear layers     y = x Wᵀ + b                          in blocks of rows (below); both save x
                                                            only where a weight's gradient needs it
    rotary embedding  y = x cos + rot(x) sin                its backward is the opposite rotation

Frozen matrices may lie in a narrower dtype than x: both passes upcast what they need, so that
between them nothing wider is saved. Every number of bfloat16 and float16 is one of float32, so
nothing is rounded.

Why blocks of rows: a CPU's matrix product may add in another order for another number of rows
(oneDNN on AMX does), so a pair's log-probabilities would depend on what else is in the stream, in
bfloat16 by whole nats. Every forward product here has the same number of rows, the last block
padded, so a row's result depends on that row alone, to the last bit. That is why the first loss is
ln 2 exactly, and why stored trunk states equal recomputed ones. Backward products are not
padded: they are not compared across streams.

Dimensions: T rows, D model width, F width inside the MLP.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from smoldpo.engine.kernels import attention
from smoldpo.engine.kernels.elementwise import (
    gated_product,
    gated_product_grads,
    rms_norm,
    rms_norm_grads,
    rotate,
)
from smoldpo.engine.layout import ROWS
from smoldpo.utils.functions import uses_global, with_globals


def row_blocks(states: torch.Tensor, rows: int) -> list[slice]:
    """Blocks of so many rows of a [T, ...] tensor; on other devices than a CPU all rows at once."""
    total = len(states)
    size = rows if states.device.type == "cpu" else total
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def block_product(
    block: torch.Tensor, weight: torch.Tensor, result: torch.Tensor, rows: int
) -> None:
    """block [n, D] weightᵀ -> result [n, F], padded to `rows`: each row as if it were alone."""
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


def upcast(weight: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """The weight in the states' dtype where that is exact; else unchanged: the product refuses."""
    exact = torch.promote_types(weight.dtype, states.dtype) == states.dtype
    return weight.to(states.dtype) if exact else weight


class LinearFunction(torch.autograd.Function):
    """y = x Wᵀ + b."""

    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, rows: int
    ) -> torch.Tensor:
        ctx.save_for_backward(states if ctx.needs_input_grad[1] else None, weight)
        result = rows_product(states.flatten(0, -2), upcast(weight, states), rows)
        if bias is not None:
            result += bias
        return result.view(*states.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        states, weight = ctx.saved_tensors
        flat = grad.flatten(0, -2)
        d_states = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            d_states = (flat @ upcast(weight, flat)).view(*grad.shape[:-1], -1)
        if ctx.needs_input_grad[1]:
            d_weight = flat.T @ states.flatten(0, -2)
        if ctx.needs_input_grad[2]:
            sum_dtype = torch.promote_types(flat.dtype, torch.float32)
            d_bias = flat.sum(0, dtype=sum_dtype).to(flat.dtype)
        return d_states, d_weight, d_bias, None


class RMSNormFunction(torch.autograd.Function):
    """y = w x r."""

    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, weight: torch.Tensor, epsilon: float
    ) -> torch.Tensor:
        flat = states.flatten(0, -2)
        result = torch.empty_like(flat, dtype=weight.dtype)
        scale_dtype = torch.promote_types(states.dtype, torch.float32)
        scale = flat.new_empty(len(flat), 1, dtype=scale_dtype)
        for rows in row_blocks(flat, ROWS):
            result[rows], scale[rows] = rms_norm(flat[rows], weight, epsilon)
        ctx.save_for_backward(flat, weight, scale)
        return result.view(states.shape)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        states, weight, scale = ctx.saved_tensors
        flat = grad.flatten(0, -2)
        d_states, d_weight = torch.empty_like(states), scale.new_zeros(len(weight))
        for rows in row_blocks(flat, ROWS):
            d_states[rows], part = rms_norm_grads(states[rows], scale[rows], weight, flat[rows])
            d_weight += part
        wanted = ctx.needs_input_grad[1]
        return d_states.view(grad.shape), d_weight.to(weight.dtype) if wanted else None, None


class GatedMLPFunction(torch.autograd.Function):
    """With a = x Gᵀ, u = x Uᵀ:  y = (silu(a) u) Dᵀ.

    Block by block, so that what is F wide stays in the cache between the steps.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        gate_weight: torch.Tensor,
        up_weight: torch.Tensor,
        down_weight: torch.Tensor,
        keep: bool,
        size: int,
    ) -> torch.Tensor:
        flat = states.flatten(0, -2)
        weights = (gate_weight, up_weight, down_weight)
        gate_weight, up_weight, down_weight = (upcast(weight, flat) for weight in weights)
        result = torch.empty_like(flat)
        blocks = row_blocks(flat, size)
        gate, up = (
            flat.new_empty(len(flat) if keep else blocks[0].stop, len(gate_weight))
            for _ in range(2)
        )
        for rows in blocks:
            into = rows if keep else slice(0, rows.stop - rows.start)
            block_product(flat[rows], gate_weight, gate[into], size)
            block_product(flat[rows], up_weight, up[into], size)
            block_product(gated_product(gate[into], up[into]), down_weight, result[rows], size)
        if keep:
            read = flat if any(ctx.needs_input_grad[1:3]) else None
            ctx.save_for_backward(read, gate, up, *weights)
        return result.view_as(states)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        states, gate, up, *weights = ctx.saved_tensors
        flat = grad.flatten(0, -2)
        gate_weight, up_weight, down_weight = (upcast(weight, flat) for weight in weights)
        product, d_gate, d_up = (torch.empty_like(gate) for _ in range(3))
        d_states = torch.empty_like(flat)
        for rows in row_blocks(flat, ROWS):
            product[rows], d_up[rows], d_gate[rows] = gated_product_grads(
                gate[rows], up[rows], flat[rows] @ down_weight
            )
            torch.mm(d_gate[rows], gate_weight, out=d_states[rows])
            d_states[rows].addmm_(d_up[rows], up_weight)
        return (
            d_states.view_as(grad),
            d_gate.T @ states if ctx.needs_input_grad[1] else None,
            d_up.T @ states if ctx.needs_input_grad[2] else None,
            flat.T @ product if ctx.needs_input_grad[3] else None,
            None,
            None,
        )


class RotaryFunction(torch.autograd.Function):
    """Backward is the rotation by the opposite angles; cos and sin are the same for both halves."""

    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        rotated: torch.Tensor = rotate(states, cos, sin, 1)
        return rotated

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return rotate(grad, *ctx.saved_tensors, -1), None, None


def rotary(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    unsqueeze_dim: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' `apply_rotary_pos_emb`: both rotated by their positions' angles."""
    cos, sin = (part.unsqueeze(unsqueeze_dim).to(query.dtype) for part in (cos, sin))
    return RotaryFunction.apply(query, cos, sin), RotaryFunction.apply(key, cos, sin)


def apply(function: type[torch.autograd.Function], *arguments: Any) -> torch.Tensor:
    """`function.apply`, whose result autograd leaves without a type."""
    result: torch.Tensor = function.apply(*arguments)
    return result


class Linear(nn.Linear):
    """A linear layer in blocks of rows."""

    rows: int

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[..., D] to [..., F]."""
        return apply(LinearFunction, states, self.weight, self.bias, self.rows)


class RMSNorm(nn.Module):
    """transformers' norms of that name."""

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[..., D] to the same shape."""
        return apply(RMSNormFunction, states, self.weight, self.variance_epsilon)


class GatedMLP(nn.Module):
    """Llama's MLP: no bias, SiLU."""

    rows: int
    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[..., D] to the same shape."""
        weights = (self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)
        return apply(GatedMLPFunction, states, *weights, torch.is_grad_enabled(), self.rows)


def kind_of(module: nn.Module) -> type[nn.Module]:
    """The class above that computes what the module does; its own class where there is none."""
    kind: Any = type(module)
    if isinstance(module, nn.Linear):
        return Linear
    if kind.__name__.endswith("RMSNorm"):
        return RMSNorm
    projections = mlp_projections(module)
    if projections and all(isinstance(p, nn.Linear) and p.bias is None for p in projections):
        return GatedMLP
    return with_rotary(kind)


def mlp_projections(module: nn.Module) -> list[nn.Module]:
    """Gate, up and down of an MLP that is gated by SiLU; of other modules none."""
    parts = module._modules  # those of its own: peft's wrappers pass on what they are asked for
    if type(parts.get("act_fn")).__name__ not in ("SiLU", "SiLUActivation"):
        return []
    found = [parts.get(f"{name}_proj") for name in ("gate", "up", "down")]
    return [part for part in found if part is not None] if None not in found else []


def with_rotary(kind: Any, function: Callable[..., Any] = rotary) -> type[nn.Module]:
    """A subclass of an attention class whose forward rotates by `function`; others as they are.

    transformers' attention calls a function of its module, apply_rotary_pos_emb.
    """
    found: type[nn.Module] = _with_rotary(kind, function)
    return found


@cache
def _with_rotary(kind: Any, function: Callable[..., Any]) -> type[nn.Module]:
    if not uses_global(kind.forward, "apply_rotary_pos_emb"):
        same: type[nn.Module] = kind
        return same
    forward = with_globals(kind.forward, apply_rotary_pos_emb=function)
    return type(kind.__name__, (kind,), {"forward": forward})


def own_modules(
    module: nn.Module,
    rows: int = ROWS,
    kind: Callable[[nn.Module], type[nn.Module]] = kind_of,
    known: dict[int, Any] | None = None,
    leaves: Mapping[int, nn.Parameter] | None = None,
) -> Any:
    """A copy of a base model or layer (Llama's shape) that computes by the classes above.

    Parameters are shared. Modules, buffers and configuration are the copy's own, so that the model
    stays as it is, and several copies may compute at once.

    Args:
        rows: of a forward product; whatever must agree with one another must have the same.
        kind: gives the class of each module's copy.
        known: copies that were made before, by the original's id; added to.
        leaves: what the copy has in place of some parameters, by the parameter's id.
    """
    known = {} if known is None else known
    leaves = {} if leaves is None else leaves
    if id(module) in known:
        return known[id(module)]
    new = kind(module)
    part = known[id(module)] = new.__new__(new)
    vars(part).update(vars(module))
    if new is not type(module):
        vars(part)["rows"] = rows
        vars(part).pop("forward", None)  # compute_in sets one
    children = module._modules.items()
    part._modules = {
        name: c if c is None else own_modules(c, rows, kind, known, leaves) for name, c in children
    }
    part._parameters = {name: leaves.get(id(p), p) for name, p in module._parameters.items()}
    buffers = module._buffers.items()
    part._buffers = {name: b if b is None else b.clone() for name, b in buffers}
    if (config := vars(module).get("config")) is not None:
        if id(config) not in known:
            known[id(config)] = copy.deepcopy(config)
            known[id(config)]._attn_implementation = attention.NAME
        vars(part)["config"] = known[id(config)]
    return part


def compute_in(model: nn.Module, dtype: torch.dtype) -> bool:
    """Let linear layers and embeddings whose weights are in another dtype compute in this one."""
    kinds = (nn.Linear, nn.Embedding)
    others = [m for m in model.modules() if isinstance(m, kinds) and m.weight.dtype != dtype]
    for module in others:
        forward: Any = _linear if isinstance(module, nn.Linear) else _embedded
        vars(module)["forward"] = partial(forward, module, dtype)
    return bool(others)


def _linear(module: nn.Linear, dtype: torch.dtype, states: torch.Tensor) -> torch.Tensor:
    return F.linear(states, module.weight.to(dtype), module.bias)


def _embedded(module: nn.Embedding, dtype: torch.dtype, ids: torch.Tensor) -> torch.Tensor:
    return F.embedding(ids, module.weight).to(dtype)
