"""Choosing and building an engine for a policy and its reference."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from smoldpo.engine.base import Engine
from smoldpo.engine.fast import FastEngine
from smoldpo.engine.plain import PlainEngine
from smoldpo.engine.precision import MasterWeights, cast
from smoldpo.engine.trunk import unsupported
from smoldpo.errors import UsageError


@dataclass(frozen=True)
class EngineChoice:
    """Which engine, and why in words when it is not the one hoped for."""

    name: str
    reason: str | None = None


def choose_engine(asked: str, *models: PreTrainedModel) -> EngineChoice:
    """The engine for these models: `auto` takes the fast one wherever it is proven.

    Raises:
        UsageError: `fast` was asked for, and cannot run these models.
    """
    reasons = [reason for model in models if (reason := unsupported(model)) is not None]
    if asked == "fast" and reasons:
        raise UsageError(f"engine fast: {reasons[0]}; say --engine plain, or auto")
    if asked == "plain" or reasons:
        return EngineChoice("plain", reasons[0] if asked == "auto" else None)
    return EngineChoice("fast")


def build_engine(
    name: str,
    policy: PreTrainedModel,
    reference: PreTrainedModel | None,
    *,
    compute_dtype: torch.dtype,
    train_batch_size: int,
    eval_batch_size: int,
    max_tokens: int,
) -> Engine:
    """An engine that trains `policy`.

    Args:
        reference: None where the reference is the policy as it is now.
    """
    if name == "fast":
        masters = MasterWeights(policy, compute_dtype)
        if reference is not None:
            cast(reference.requires_grad_(False), compute_dtype)
        return FastEngine(policy, masters, reference, max_tokens)
    return PlainEngine(
        policy,
        copy.deepcopy(policy) if reference is None else reference,
        compute_dtype=compute_dtype,
        train_batch_size=train_batch_size,
        eval_batch_size=eval_batch_size,
    )
