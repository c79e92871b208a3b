"""Shared-prefix attention, registered with transformers' attention interface.

No model code is copied: a model whose attention goes through that interface calls the function
below, and the layout of the stream travels to it as a keyword argument of the model's forward.

    CPU     pair by pair: forward by torch's fused kernel, or by matrix products where those are
            faster on this machine; backward by matrix products, from recomputed weights
            with native kernels (native/), these in both passes, for layers without a window
    CUDA    one FlexAttention call over the stream, whose block mask skips what no query sees
            (flex_attention.py)
    else    pair by pair, masked matrix products with autograd's backward; on CUDA too in float64,
            which FlexAttention's kernel does not keep, and where it cannot be compiled

Pair by pair means: each pair is laid into a slot whose length is a multiple of STEP, padded with
rows that no query sees. Libraries compile a kernel for every shape they meet, which takes
milliseconds and hundreds of kilobytes each, so there must be few shapes.

In the last layer only the rows from each prompt's last token on are read by anyone, so no others
are queries.

Dimensions: T tokens of the stream, S rows of all slots, n of one slot, m queries; H query heads, K
key/value heads, G = H / K, d of one head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from smoldpo.engine.kernels.flex_attention import flex_is_usable, stream_attention
from smoldpo.engine.kernels.native.functions import AttentionFunction, attention_fits
from smoldpo.engine.kernels.native.library import Library
from smoldpo.engine.layout import STEP, Layout, Slot

NAME = "smoldpo_shared_prefix"


@dataclass(frozen=True)
class _Options:
    """What a call of attention has besides queries, keys and values."""

    scaling: float
    layout: Layout
    window: int | None
    read: bool


Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
"""Queries [H, m, d], keys and values [K, n, d], bias [m, n] and scaling to [H, m, d]."""


def shared_prefix_attention(
    module: nn.Module,
    query: torch.Tensor,  # [1, H, T, d]
    key: torch.Tensor,  # [1, K, T, d]
    value: torch.Tensor,  # [1, K, T, d]
    attention_mask: None,
    *,
    scaling: float,
    layout: Layout,
    last_layer: int,
    fused: bool = True,
    native: Library | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within each pair of the stream; returns [1, T, H, d].

    Args:
        last_layer: index of the layer behind which only the rows that are read matter.
        fused: on a CPU, whether the forward pass is torch's fused kernel.
        native: on a CPU, take this library's kernel where it computes what the layer does.
    """
    assert dropout == 0.0 and query.shape[0] == 1
    read = bool(module.layer_idx == last_layer)
    if query.is_cuda and flex_is_usable(query.dtype):
        return stream_attention(query, key, value, scaling, layout.stream, sliding_window), None
    if native is not None and attention_fits(query, sliding_window):
        found = AttentionFunction.apply(native, query, key, value, scaling, layout, read)
        return cast(torch.Tensor, found), None
    out = pair_attention(query, key, value, scaling, layout, sliding_window, read, fused)
    return out, None


def pair_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    layout: Layout,
    window: int | None,
    read: bool,
    fused: bool,
) -> torch.Tensor:
    """Attention pair by pair, [1, T, H, d]; with `read`, right for those rows alone."""
    options = _Options(scaling, layout, window, read)
    if query.device.type != "cpu":
        return _by_blocks(query, key, value, options, _products)
    attend = _fused if fused else _products
    result: torch.Tensor = _SharedPrefix.apply(query, key, value, options, attend)
    return result


def _to_slots(states: torch.Tensor, layout: Layout) -> torch.Tensor:
    """[1, H, T, d] laid into the slots: [H, S, d], rows of a token staying together in memory."""
    return states[0].transpose(0, 1).index_select(0, layout.token_of_row).transpose(0, 1)


def _from_slots(states: torch.Tensor, layout: Layout, tokens: int) -> torch.Tensor:
    """[S, H, d] grads out of the slots: [1, T, H, d], zeros behind the last pair."""
    rows = states.index_select(0, layout.row_of_token)
    return F.pad(rows, (0, 0, 0, 0, 0, tokens - len(rows)))[None]


def _blocks(slot: Slot, read: bool) -> Iterator[tuple[slice, slice]]:
    """Queries of a slot, and the keys among which all that they see lie; all multiples of STEP.

    What a pair shares with others is computed in its own slot. A prompt's tokens do not see the
    answers, so a long prompt has a block of its own.
    """
    first = (slot.segment.prompt - 1 if read else slot.segment.shared) // STEP * STEP
    inside = slot.segment.prompt // STEP * STEP
    if not read and inside - first >= 2 * STEP:
        yield slice(first, inside), slice(0, inside)
        first = inside
    yield slice(first, slot.length), slice(0, slot.length)


def _fold_heads(states: torch.Tensor, groups: int) -> torch.Tensor:
    """[H, m, d] with a group's query heads as further rows, [K, G m, d]: no key is repeated."""
    return states.reshape(states.shape[0] // groups, -1, states.shape[-1])


def _weights(folded: torch.Tensor, keys: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Softmax over the keys that each scaled query [K, G m, d] sees: [K, G m, n]; in float32."""
    scores = torch.matmul(folded, keys.transpose(1, 2))
    groups = scores.shape[1] // len(bias)
    return torch.softmax(scores.unflatten(1, (groups, -1)).add_(bias), dim=-1).flatten(1, 2)


def _products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Attention of one block by matrix products: queries [H, m, d], keys [K, n, d] to [H, m, d]."""
    weights = _weights(_fold_heads(query, len(query) // len(key)) * scaling, key, bias)
    return torch.matmul(weights, value).reshape(query.shape)


def _fused(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, scaling: float
) -> torch.Tensor:
    """The same by torch's fused kernel, without a backward."""
    return F.scaled_dot_product_attention(
        query[None],
        key[None],
        value[None],
        attn_mask=bias,
        scale=scaling,
        enable_gqa=len(key) < len(query),
    )[0]


def _by_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: _Options, attend: Attend
) -> torch.Tensor:
    """`pair_attention` block by block: [1, T, H, d], zeros in rows that are not read."""
    layout, tokens = options.layout, query.shape[2]
    query, key, value = (_to_slots(states, layout) for states in (query, key, value))
    parts = []
    for slot in layout.slots:
        bias = slot.bias(options.window, query)
        blocks = list(_blocks(slot, options.read))
        parts.append(query.new_zeros(blocks[0][0].start, len(query), query.shape[2]))
        for rows, columns in blocks:
            queries, keys = _shifted(rows, slot.start), _shifted(columns, slot.start)
            states = query[:, queries], key[:, keys], value[:, keys]
            parts.append(attend(*states, bias[rows, columns], options.scaling).transpose(0, 1))
    return _from_slots(torch.cat(parts), layout, tokens)


def _shifted(rows: slice, start: int) -> slice:
    return slice(start + rows.start, start + rows.stop)


class _SharedPrefix(torch.autograd.Function):
    """Saves queries, keys and values; the weights exist for one pair at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: _Options,
        attend: Attend,
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.options = options
        return _by_blocks(query, key, value, options, attend)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """W = softmax(S): dV = Wᵀ dO, dS = W (dO Vᵀ - rowsum(W dO Vᵀ)), dQ = dS K, dK = dSᵀ Q.

        Over d_states slots, so that there is one shape to a slot's length; dO is zero in rows not
        read.
        """
        scaling, layout, window = ctx.options.scaling, ctx.options.layout, ctx.options.window
        query, key, value = (_to_slots(states, layout) for states in ctx.saved_tensors)
        groups = len(query) // len(key)
        slot_grads = grad.new_zeros(query.shape[1], len(query), query.shape[2])  # [S, H, d]
        slot_grads.index_copy_(0, layout.row_of_token, grad[0, : len(layout.row_of_token)])
        slot_grads = slot_grads.transpose(0, 1)
        d_query, d_key, d_value = (torch.empty_like(states) for states in (query, key, value))
        scaled_query = query * scaling
        for slot in layout.slots:
            here = slice(slot.start, slot.start + slot.length)
            keys, values = key[:, here], value[:, here]
            scaled = _fold_heads(scaled_query[:, here], groups)
            d_output = _fold_heads(slot_grads[:, here], groups)
            weights = _weights(scaled, keys, slot.bias(window, query))
            d_value[:, here] = torch.bmm(weights.transpose(1, 2), d_output)
            d_weights = torch.bmm(d_output, values.transpose(1, 2))
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            d_query[:, here] = torch.bmm(d_scores, keys).view(len(query), -1, query.shape[2])
            d_key[:, here] = torch.bmm(d_scores.transpose(1, 2), scaled)
        d_query *= scaling
        grads = [
            _from_slots(states.transpose(0, 1), layout, grad.shape[1])
            for states in (d_query, d_key, d_value)
        ]
        if len(layout.prefix_rows):
            # Every pair that goes on from what is shared adds to the gradient of its keys and
            # values.
            for d_states, states in zip(grads[1:], (d_key, d_value), strict=True):
                copies = states.transpose(0, 1)[layout.prefix_rows]  # [pairs, tokens, K, d]
                d_states[0, : copies.shape[1]] += copies.sum(0)
        return *(d_states.transpose(1, 2) for d_states in grads), None, None


AttentionInterface.register(NAME, shared_prefix_attention)
AttentionMaskInterface.register(NAME, lambda *_, **__: None)
