"""Linear layers with adapters as layers.py has those without: blocks of rows, closed-form backward.

    LoRA    y = x Wᵀ + s (x Aᵀ) Bᵀ + b
    DoRA    y = c (x Wᵀ + s (x Aᵀ) Bᵀ) + b,   c = m / |W + s B A| by rows; no gradient through |·|
            (Liu et al. 2024, section 4.3)

W is frozen, so its gradient, a third of a full step's products, is not formed. Nothing of W's size
is either: the lengths come from |w|² + 2 s w·(Aᵀ b) + s² b·(A Aᵀ b) for a row w of W and its row b
of B. With B = 0 the result is that of the layer without adapter, to the last bit, so that both can
share stored log-probabilities.

These are the adapters that models/adapters.py makes. Others that peft can make (several at once,
merged ones, with biases, in another precision than the states) keep peft's own forward, around the
linear layers of layers.py. W may be stored in a narrower dtype.

Dimensions: T rows, D width in, F width out, r rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from smoldpo.engine.kernels import layers
from smoldpo.engine.kernels.elementwise import gated_product, gated_product_grads
from smoldpo.engine.kernels.layers import apply, block_product, row_blocks, upcast
from smoldpo.engine.layout import ROWS
from smoldpo.models.adapters import NAME, is_adapted, magnitude_of


def _add_low_rank(
    low: torch.Tensor, up: torch.Tensor, scaling: float, result: torch.Tensor, rows: int
) -> None:
    """result [n, F] += s low [n, r] upᵀ, padded to `rows`: each row as if it were alone."""
    if len(low) == rows or low.device.type != "cpu":
        result.addmm_(low, up.T, alpha=scaling)
        return
    padded_low, padded = low.new_zeros(rows, low.shape[1]), result.new_zeros(rows, len(up))
    padded_low[: len(low)], padded[: len(low)] = low, result
    result.copy_(padded.addmm_(padded_low, up.T, alpha=scaling)[: len(low)])


class AdaptedLinearFunction(torch.autograd.Function):
    """Saves x and x Aᵀ; for DoRA y. With a `gate`, x is silu(gate) states, recomputed."""

    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        gate: torch.Tensor | None,
        weight: torch.Tensor,
        upcast_weight: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        scale: torch.Tensor | None,
        scaling: float,
        size: int,
    ) -> torch.Tensor:
        flat = states.flatten(0, -2)
        gate = None if gate is None else gate.flatten(0, -2)
        low = flat.new_empty(len(flat), len(down))
        result = flat.new_empty(len(flat), len(weight))
        for rows in row_blocks(flat, size):
            block = flat[rows] if gate is None else gated_product(gate[rows], flat[rows])
            block_product(block, upcast_weight, result[rows], size)
            block_product(block, down, low[rows], size)
            _add_low_rank(low[rows], up, scaling, result[rows], size)
            if scale is not None:
                result[rows].mul_(scale)
        unbiased = result if scale is not None else None
        if bias is not None:
            result = result + bias
        ctx.save_for_backward(flat, gate, low, weight, down, up, scale, unbiased)
        ctx.scaling = scaling
        return result.view(*states.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        states, gate, low, weight, down, up, scale, unbiased = ctx.saved_tensors
        flat, d_scale = grad.flatten(0, -2), None
        if scale is not None:
            if ctx.needs_input_grad[7]:
                d_scale = scale.new_zeros(len(scale))
                for rows in row_blocks(flat, ROWS):
                    d_scale += (flat[rows].to(scale.dtype) * unbiased[rows]).sum(0)
                d_scale = d_scale / scale
            flat = (flat * scale).to(flat.dtype)
        d_low = (flat @ up).mul_(ctx.scaling)
        d_states = d_gate = None
        if any(ctx.needs_input_grad[:2]):
            d_states = (flat @ upcast(weight, flat)).addmm_(d_low, down)
            if gate is not None:
                states, d_gate, d_states = _product_and_grads(gate, states, d_states)
                d_gate = d_gate.view(*grad.shape[:-1], -1)
            d_states = d_states.view(*grad.shape[:-1], -1)
        elif gate is not None:
            states = gated_product(gate, states)
        d_up = (flat.T @ low).mul_(ctx.scaling)
        d_down = d_low.T @ states
        return d_states, d_gate, None, None, None, d_down, d_up, d_scale, None, None


def _product_and_grads(
    gate: torch.Tensor, up: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """silu(a) u, and from its gradient those of a and of u; block by block."""
    product, d_gate, d_up = (torch.empty_like(gate) for _ in range(3))
    for rows in row_blocks(gate, ROWS):
        product[rows], d_up[rows], d_gate[rows] = gated_product_grads(
            gate[rows], up[rows], grad[rows]
        )
    return product, d_gate, d_up


class GatedProductFunction(torch.autograd.Function):
    """silu(a) u; saves a and u alone."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        flat_gate, flat_up = gate.flatten(0, -2), up.flatten(0, -2)
        result = torch.empty_like(flat_gate)
        for rows in row_blocks(result, ROWS):
            result[rows] = gated_product(flat_gate[rows], flat_up[rows])
        return result.view_as(gate)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = (saved.flatten(0, -2) for saved in ctx.saved_tensors)
        _, d_gate, d_up = _product_and_grads(gate, up, grad.flatten(0, -2))
        return d_gate.view_as(grad), d_up.view_as(grad)


@torch.no_grad()
def row_lengths(module: Any, weight: torch.Tensor) -> torch.Tensor:
    """|W + s B A| of each row, [F], in the magnitudes' dtype; with B = 0 exactly the measured |W|.

    As a multiple of |W|: not every kernel's root of a rounded square is the number again.

    Args:
        weight: W in the adapters' precision.
    """
    start: torch.Tensor = module.smoldpo_lengths
    scaling: float = module.scaling[NAME]
    down, up = (getattr(module, part)[NAME].weight for part in ("lora_A", "lora_B"))
    full = up.to(start.dtype)
    crossed = (full * (weight @ down.T).to(full.dtype)).sum(1)
    own = ((up @ (down @ down.T)).to(full.dtype) * full).sum(1)
    squares: torch.Tensor = 1 + (2 * scaling * crossed + scaling**2 * own) / start.square()
    return start * squares.sqrt()


class AdaptedLinear(nn.Module):
    """peft's linear layer with one adapter, computed here."""

    rows: int
    base_layer: nn.Linear
    lora_A: Any
    lora_B: Any
    scaling: dict[str, float]
    _disable_adapters: bool

    def forward(self, states: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        """[..., D] to [..., F]; with a gate the input is silu(gate) states."""
        base = self.base_layer
        if self._disable_adapters:
            result: torch.Tensor = base(
                states if gate is None else apply(GatedProductFunction, gate, states)
            )
            return result
        magnitude, upcast_weight = magnitude_of(self), upcast(base.weight, states)
        return apply(
            AdaptedLinearFunction,
            states,
            gate,
            base.weight,
            upcast_weight,
            base.bias,
            self.lora_A[NAME].weight,
            self.lora_B[NAME].weight,
            None if magnitude is None else magnitude.weight / row_lengths(self, upcast_weight),
            self.scaling[NAME],
            self.rows,
        )


class AdaptedMLP(nn.Module):
    """Llama's MLP with adapters on some of its layers."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[..., D] to the same shape."""
        gate, up = self.gate_proj(states), self.up_proj(states)
        adapted = isinstance(self.down_proj, AdaptedLinear)
        inputs = (up, gate) if adapted else (apply(GatedProductFunction, gate, up),)
        result: torch.Tensor = self.down_proj(*inputs)
        return result


def kind_of(module: nn.Module, dtype: torch.dtype) -> type[nn.Module]:
    """layers.kind_of for models that may have adapters.

    Args:
        dtype: of the states that linear layers are given.
    """
    if is_adapted(module):
        return AdaptedLinear if _is_ours(module, dtype) else type(module)
    if any(map(is_adapted, layers.mlp_projections(module))):
        return AdaptedMLP
    return layers.kind_of(module)


def _is_ours(module: Any, dtype: torch.dtype) -> bool:
    """Whether AdaptedLinear gives what peft's forward of this module gives in `dtype`."""
    if list(module.active_adapters) != [NAME] or module.merged or NAME not in module.lora_A:
        return False
    linear = (module.base_layer, module.lora_A[NAME], module.lora_B[NAME])
    if any(type(part) is not nn.Linear for part in linear) or linear[2].bias is not None:
        return False
    variant = module.lora_variant.get(NAME)  # DoRA is one
    weight, *adapter = (part.weight.dtype for part in linear)
    return (
        {*adapter, torch.promote_types(weight, dtype)} == {dtype}
        and not any(parameter.requires_grad for parameter in module.base_layer.parameters())
        and (variant is None or hasattr(module, "smoldpo_lengths"))
    )


class FrozenAdapter(nn.Module):
    """A linear layer with an adapter that does not train; nothing is merged, and no weight copied.

    y = c (x Wᵀ) + (x Aᵀ) (s c B)ᵀ + b; c is 1 but for DoRA, and a constant here.

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
            self.bias = linear.bias
            linear.register_parameter("bias", None)
            self.scale = magnitude.weight / row_lengths(module, upcast(linear.weight, down))
            up = (self.scale[:, None] * up).to(up.dtype)
        self.down, self.up = (nn.Parameter(p.detach(), requires_grad=False) for p in (down, up))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[..., D] to [..., F]."""
        result: torch.Tensor = self.linear(states)
        if self.scale is not None:
            result = result.mul_(self.scale)
        result += F.linear(F.linear(states, self.down), self.up)
        return result if self.bias is None else result + self.bias


def copy_adapters(model: nn.Module, policy: nn.Module) -> None:
    """Give `model`, in place, the adapters that `policy` has in peft's modules, as they are now."""
    for name, module in policy.named_modules():
        if is_adapted(module):
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            model.set_submodule(name, FrozenAdapter(linear, module), strict=True)
