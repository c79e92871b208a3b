"""Shared-prefix attention, registered with transformers' attention interface.

No model code is copied: a model whose attention goes through that interface calls the function below,
and the segments of the stream travel to it as a keyword argument of the model's forward.

Three forms of the same function:

    CPU     pair by pair: forward by torch's fused kernel, or by matrix products where those are faster on
            this machine; backward by matrix products, from weights formed anew
    CUDA    one FlexAttention call over the stream, whose block mask skips what no query sees (flex.py)
    else    pair by pair, masked matrix products with autograd's backward

In the last layer only the rows from each prompt's last token on are read by anyone, so only they are
queries; the others' outputs are zeros.

Dimensions: T tokens of the stream, n of one pair, m queries of it; H query heads, K key/value heads,
G = H / K, d of one head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from smoldpo.models.lean import lean_rotary

NAME = "smoldpo_shared_prefix"


class SegmentLike(Protocol):
    """What attention needs to know of a pair in the stream."""

    start: int
    prompt: int

    @property
    def length(self) -> int: ...
    def bias(self, window: int | None, like: torch.Tensor) -> torch.Tensor: ...


def shared_prefix_attention(
    module: nn.Module,
    query: torch.Tensor,  # [1, H, T, d]
    key: torch.Tensor,  # [1, K, T, d]
    value: torch.Tensor,  # [1, K, T, d]
    attention_mask: None,
    *,
    scaling: float,
    segments: Sequence[SegmentLike],
    last_layer: int,
    fused: bool = True,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within each pair of the stream; returns [1, T, H, d].

    Args:
        last_layer: index of the layer behind which only the rows that are read matter.
        fused: on a CPU, whether the forward pass is torch's fused kernel.
    """
    assert dropout == 0.0 and query.shape[0] == 1
    read = module.layer_idx == last_layer
    call = (query, key, value, scaling, segments, sliding_window, read)
    return pair_attention(*call, fused), None


def pair_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    segments: Sequence[SegmentLike],
    window: int | None,
    read: bool,
    fused: bool,
) -> torch.Tensor:
    """Attention pair by pair, [1, T, H, d]; with `read`, of the rows that are read after the last layer."""
    call = (query, key, value, scaling, segments, window, read)
    return _SharedPrefix.apply(*call, fused) if query.device.type == "cpu" else _masked(*call)


class _Block:
    """Some queries of one pair and the keys that they may see, with the query heads of a group folded into
    rows, so that keys and values are not repeated for each query head."""

    def __init__(
        self, query: torch.Tensor, key: torch.Tensor, segment: SegmentLike, rows: slice, window: Any
    ):
        self.rows = slice(segment.start + rows.start, segment.start + rows.stop)
        # What a prompt sees ends with the prompt; what an answer sees, with the pair.
        keys = segment.prompt if rows.stop == segment.prompt else segment.length
        self.keys = slice(segment.start, segment.start + keys)
        self.groups = query.shape[1] // key.shape[1]
        self.bias = segment.bias(window, query)[rows, :keys]  # [m, n]

    def folded(self, states: torch.Tensor) -> torch.Tensor:
        """[1, H, T, d] to these queries, [K, G m, d]."""
        rows = states[0, :, self.rows]
        return rows.reshape(rows.shape[0] // self.groups, -1, rows.shape[-1])

    def unfolded(self, states: torch.Tensor) -> torch.Tensor:
        """[K, G m, d] back to [H, m, d]."""
        return states.reshape(states.shape[0] * self.groups, -1, states.shape[-1])

    def weights(self, folded: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Softmax over the keys that each scaled query sees: [K, G m, n]; float32 inside."""
        scores = torch.matmul(folded, key[0, :, self.keys].transpose(1, 2))
        shape = scores.shape
        scores = scores.view(shape[0], self.groups, -1, shape[-1]) + self.bias
        return torch.softmax(scores, dim=-1).view(shape)


def _blocks(
    query: torch.Tensor, key: torch.Tensor, segments: Sequence[SegmentLike], window: Any, read: bool
) -> Iterator[_Block]:
    """Each pair's prompt, then its answers; where only what is read matters, from the prompt's last token."""
    for segment in segments:
        if read:
            yield _Block(query, key, segment, slice(segment.prompt - 1, segment.length), window)
        else:
            yield _Block(query, key, segment, slice(0, segment.prompt), window)
            yield _Block(query, key, segment, slice(segment.prompt, segment.length), window)


def _masked(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    segments: Sequence[SegmentLike],
    window: int | None,
    read: bool,
) -> torch.Tensor:
    """Matrix products, with autograd's backward."""
    output = query.new_zeros(query.shape[1], query.shape[2], query.shape[3])  # [H, T, d]
    for block in _blocks(query, key, segments, window, read):
        weights = block.weights(block.folded(query) * scaling, key)
        output[:, block.rows] = block.unfolded(torch.matmul(weights, value[0, :, block.keys]))
    return output.transpose(0, 1)[None]


class _SharedPrefix(torch.autograd.Function):
    """Keeps queries, keys and values; the weights exist for one block at a time, and never twice."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        segments: Sequence[SegmentLike],
        window: int | None,
        read: bool,
        fused: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.call = scaling, segments, window, read
        if not fused:
            return _masked(query, key, value, scaling, segments, window, read)
        output = query.new_zeros(1, query.shape[2], query.shape[1], query.shape[3])  # [1, T, H, d]
        for block in _blocks(query, key, segments, window, read):
            found = F.scaled_dot_product_attention(
                query[:, :, block.rows],
                key[:, :, block.keys],
                value[:, :, block.keys],
                attn_mask=block.bias,
                scale=scaling,
                enable_gqa=block.groups > 1,
            )
            output[0, block.rows] = found[0].transpose(0, 1)
        return output

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """With W = softmax(S):  dV = Wᵀ dO,  dS = W (dO Vᵀ - rowsum(W dO Vᵀ)),  dQ = dS K,  dK = dSᵀ Q."""
        query, key, value = ctx.saved_tensors
        scaling, segments, window, read = ctx.call
        heads_first = grad.transpose(1, 2)  # [1, H, T, d]
        d_query, d_key, d_value = (torch.zeros_like(states) for states in (query, key, value))
        for block in _blocks(query, key, segments, window, read):
            keys, values = key[0, :, block.keys], value[0, :, block.keys]
            scaled, slope = block.folded(query) * scaling, block.folded(heads_first)
            weights = block.weights(scaled, key)
            d_value[0, :, block.keys] += torch.bmm(weights.transpose(1, 2), slope)
            d_weights = torch.bmm(slope, values.transpose(1, 2))
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            d_query[0, :, block.rows] = block.unfolded(torch.bmm(d_scores, keys).mul_(scaling))
            d_key[0, :, block.keys] += torch.bmm(d_scores.transpose(1, 2), scaled)
        return d_query, d_key, d_value, None, None, None, None, None


AttentionInterface.register(NAME, shared_prefix_attention)
AttentionMaskInterface.register(NAME, lambda *_, **__: None)


@contextlib.contextmanager
def shared_prefix(model: PreTrainedModel) -> Iterator[None]:
    """Within the block the model attends by segments and rotates leanly; after it as before."""
    config = model.config
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        with lean_rotary(model):
            yield
    finally:
        config._attn_implementation = before
