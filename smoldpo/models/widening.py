"""Layers whose weights lie in a narrower dtype than they compute in, and are converted by each product.

Every number of bfloat16 and of float16 is one of float32, so nothing is rounded: results are to the last
bit those of weights that were converted beforehand.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn


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
