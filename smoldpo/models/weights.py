"""Hashes of weights, and models that share them."""

from __future__ import annotations

import copy
import hashlib
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel


def weights_sha256(
    model: torch.nn.Module,
    dtype: torch.dtype | None = None,
    done: Callable[[torch.Tensor], Any] | None = None,
) -> str:
    """SHA-256 (hex) of every parameter's name, shape and values: fixes a reference by content.

    Args: as tensors_sha256.
    """
    return tensors_sha256(model.named_parameters(), dtype, done)


def tensors_sha256(
    named: Iterable[tuple[str, torch.Tensor]],
    dtype: torch.dtype | None = None,
    done: Callable[[torch.Tensor], Any] | None = None,
) -> str:
    """SHA-256 (hex) of each tensor's name, shape, dtype and values.

    Args:
        dtype: as they are in this one.
        done: called with each tensor behind its turn.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(named, key=lambda item: item[0]):
        values = tensor.detach().to(dtype or tensor.dtype).cpu().contiguous()
        digest.update(f"{name} {tuple(values.shape)} {values.dtype}\n".encode())
        digest.update(values.view(torch.uint8).numpy().reshape(-1).data)
        if done is not None:
            done(tensor)
    return digest.hexdigest()


def copy_sharing(
    model: PreTrainedModel, own: Mapping[str, torch.Tensor] = types.MappingProxyType({})
) -> PreTrainedModel:
    """A copy of the model that shares all its weights, but for those that `own` gives, by name."""
    known = {
        id(weight): torch.nn.Parameter(own[name], requires_grad=False) if name in own else weight
        for name, weight in model.named_parameters()
    }
    return copy.deepcopy(model, known)  # which takes what is known instead of a copy
