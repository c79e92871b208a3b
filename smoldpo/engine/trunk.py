"""Cutting a model where training begins: the frozen trunk below, the top above.

Policy and reference are identical below the boundary and nothing there trains, so what the trunk gives
for a pair is computed once and kept: it serves the reference, the policy, and every epoch.

Trunk and top are shallow copies of the base model whose `layers` are slices of its own; the weights are
the same objects. The trunk ends without the final norm; the top begins at `inputs_embeds`.
"""

from __future__ import annotations

import copy

import torch
from transformers import PreTrainedModel

from smoldpo.models.freeze import layer_of

FAMILIES = {"llama", "smollm3", "qwen2", "qwen3", "mistral"}
"""Model types for which the fast engine is held against the plain one (tests/equivalence)."""


def unsupported(model: PreTrainedModel) -> str | None:
    """Why the fast engine cannot run this model, or None."""
    kind = model.config.model_type
    if kind not in FAMILIES:
        return f"the fast engine is not proven on models of type {kind!r}"
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        return "its LM head has a bias"
    return None


def boundary(model: PreTrainedModel) -> int:
    """How many layers from below, with the embeddings, take no part in training: 0 is no trunk."""
    embeddings = model.get_input_embeddings().weight
    if embeddings.requires_grad:
        return 0
    layers = [
        layer_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad
    ]
    inside = [layer for layer in layers if layer >= 0]
    return min(inside) if inside else len(model.model.layers)


def cut(model: PreTrainedModel, at: int) -> tuple[PreTrainedModel | None, PreTrainedModel]:
    """The trunk (layers below `at`; None if there are none) and the top (the others, final norm)."""
    base = model.model
    if at == 0:
        return None, base
    return _with_layers(base, base.layers[:at], norm=False), _with_layers(base, base.layers[at:])


def _with_layers(
    base: PreTrainedModel, layers: torch.nn.ModuleList, norm: bool = True
) -> PreTrainedModel:
    part = copy.copy(base)
    part._modules = dict(base._modules)
    part._modules["layers"] = layers
    if not norm:
        part._modules["norm"] = torch.nn.Identity()
    return part
