"""Shared-prefix attention of a whole stream in one call, for CUDA: FlexAttention's block mask.

FlexAttention (PyTorch) compiles the rule below into its kernel and skips the blocks of 128 x 128 in
which no query sees any key: other pairs' blocks, that is, and what lies after a query. On a CPU it
has no backward, so there the other forms of engine/kernels/attention.py are used, and the tests
hold this rule against them. On a GPU itself it has not been run yet.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from smoldpo.engine.layout import PADDING, PREFIX, Stream
from smoldpo.utils import progress
from smoldpo.utils.errors import whole_reason


def sees(stream: Stream, window: int | None) -> Callable[..., torch.Tensor]:
    """The rule who sees whom, as FlexAttention asks for it: (batch, head, query, key) -> bool."""

    def rule(_batch: Any, _head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        same = stream.pair[query] == stream.pair[key]
        begins = stream.after_prefix[query] & (stream.pair[key] == PREFIX)
        crosses = (stream.part[query] == 2) & (stream.part[key] == 1)
        visible = (query >= key) & (same | begins) & ~crosses
        if window is not None:
            visible = visible & (stream.position[query] - stream.position[key] < window)
        # Padding sees itself alone, so that its softmax is a number.
        return torch.where(stream.pair[query] == PADDING, query == key, visible)

    return rule


def stream_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    stream: Stream,
    window: int | None,
) -> torch.Tensor:
    """Queries [1, H, T, d], keys and values [1, K, T, d]: [1, T, H, d]."""
    if window not in stream.masks:
        tokens = query.shape[2]
        stream.masks[window] = create_block_mask(
            sees(stream, window), None, None, tokens, tokens, device=query.device
        )
    attend = _compiled() if query.is_cuda else flex_attention
    result: torch.Tensor = attend(
        query,
        key,
        value,
        block_mask=stream.masks[window],
        scale=scaling,
        enable_gqa=query.shape[1] > key.shape[1],
    )
    return result.transpose(1, 2)


@functools.cache
def flex_is_usable(dtype: torch.dtype) -> bool:
    """Whether FlexAttention compiles here for CUDA, forward and backward; tried once.

    Its kernel adds up in float32, so it is not for float64.
    """
    if dtype == torch.float64:
        return False
    probe = torch.zeros(1, 1, 128, 64, dtype=dtype, device="cuda", requires_grad=True)
    try:
        _compiled()(probe, probe, probe).sum().backward()
    except Exception as error:  # compilers fail in ways of their own
        progress.say(
            f"attention: FlexAttention cannot be compiled ({whole_reason(error)}); matrix products "
            "instead"
        )
        return False
    return True


@functools.cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=True)
