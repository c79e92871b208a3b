"""Shared-prefix attention, registered with transformers' attention interface.

No model code is copied: a model whose attention goes through that interface calls the function below,
and the segments of the stream travel to it as a keyword argument of the model's forward.

Dimensions: H query heads, K key/value heads, G = H / K, n tokens of one pair, d of one head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

NAME = "smoldpo_shared_prefix"


class SegmentLike(Protocol):
    """What attention needs to know of a pair in the stream."""

    start: int

    @property
    def length(self) -> int: ...
    def hidden(self, window: int | None, device: torch.device) -> torch.Tensor: ...


def shared_prefix_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, H, T, d]
    key: torch.Tensor,  # [1, K, T, d]
    value: torch.Tensor,  # [1, K, T, d]
    attention_mask: None,
    *,
    scaling: float,
    segments: Sequence[SegmentLike],
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within each pair of the stream; returns [1, T, H, d].

    Plain matrix products with the query heads of a group folded into rows, so that keys and values
    are not repeated for each query head.
    """
    assert dropout == 0.0 and query.shape[0] == 1
    groups = query.shape[1] // key.shape[1]
    outputs = []
    for segment in segments:
        span = slice(segment.start, segment.start + segment.length)
        q = (query[0, :, span] * scaling).reshape(key.shape[1], groups * segment.length, -1)
        k, v = key[0, :, span], value[0, :, span]
        scores = torch.matmul(q, k.transpose(1, 2))  # [K, G n, n]
        hidden = segment.hidden(sliding_window, scores.device)
        scores = scores.unflatten(1, (groups, segment.length)).masked_fill(hidden, float("-inf"))
        wide = torch.promote_types(scores.dtype, torch.float32)
        weights = torch.softmax(scores, dim=-1, dtype=wide).to(v.dtype)
        output = torch.matmul(weights.flatten(1, 2), v)  # [K, G n, d]
        outputs.append(output.reshape(query.shape[1], segment.length, -1).transpose(0, 1))
    return torch.cat(outputs)[None], None


AttentionInterface.register(NAME, shared_prefix_attention)
AttentionMaskInterface.register(NAME, lambda *_, **__: None)


@contextlib.contextmanager
def shared_prefix(model: PreTrainedModel) -> Iterator[None]:
    """Within the block the model attends by segments; after it as before."""
    config = model.config
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
