"""Splitting a model where training begins: the frozen trunk below, the top above.

Policy and reference are identical below the boundary and nothing there trains, so what the trunk
gives for a pair is computed once and kept: for the reference, the policy, and every epoch.

Trunk and top are shallow copies of the base model whose `layers` are slices of its own; the weights
are the same objects. Neither has the final norm, which is for the rows that are read alone; the top
begins at `inputs_embeds`.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from smoldpo.models.freeze import decoder_layers, layer_of

ROWS_MULTIPLE = 128
"""Rows that are read are padded to a multiple of this (kernels/attention.py)."""

Module = TypeVar("Module", bound=torch.nn.Module)


def boundary(model: PreTrainedModel) -> int:
    """How many layers from below, with the embeddings, take no part in training: 0 is no trunk."""
    if model.get_input_embeddings().weight.requires_grad:
        return 0
    trains = (layer_of(name) for name, p in model.named_parameters() if p.requires_grad)
    return min((layer for layer in trains if layer >= 0), default=decoder_layers(model))


def head_weight(model: PreTrainedModel) -> torch.nn.Parameter:
    """The LM head's weights [V, D]."""
    weight: torch.nn.Parameter = model.get_output_embeddings().weight
    return weight


def below_boundary(name: str, at: int) -> bool:
    """Whether a weight is of the embeddings or of a layer below `at`, where nothing trains."""
    return at > 0 and layer_of(name) < at


class LastLayer(torch.nn.Module):
    """The last layer, its MLP on the rows that are read alone; for the others that gives zeros."""

    def __init__(self, layer: torch.nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, states: torch.Tensor, *, rows: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """[1, T, D] to [1, T, D]; `rows` [N] are those that are read."""
        mlp = _SelectedRowsMLP(self.layer.get_submodule("mlp"), rows)
        result: torch.Tensor = _with(self.layer, mlp=mlp)(states, **kwargs)
        return result


class _SelectedRowsMLP(torch.nn.Module):
    def __init__(self, mlp: torch.nn.Module, rows: torch.Tensor):
        super().__init__()
        self.mlp, self.rows = mlp, rows

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        padding = -len(self.rows) % ROWS_MULTIPLE
        found = self.mlp(F.pad(states[0, self.rows], (0, 0, 0, padding)))[: len(self.rows)]
        return torch.zeros_like(states[0]).index_put((self.rows,), found)[None]


def split_base(base: Module, at: int) -> tuple[Module | None, Module]:
    """The trunk (layers below `at`; None without any) and the top (the others), without the norm.

    A forward pass of the top is given the `rows` that are read, for its `LastLayer`.
    """
    layers = base.get_submodule("layers")
    assert isinstance(layers, torch.nn.ModuleList)
    top = list(layers[at:])
    top[-1:] = map(LastLayer, top[-1:])
    trunk = None if at == 0 else _with(base, layers=layers[:at], norm=torch.nn.Identity())
    return trunk, _with(base, layers=torch.nn.ModuleList(top), norm=torch.nn.Identity())


def _with(module: Module, **children: torch.nn.Module) -> Module:
    """A shallow copy with other children; everything else is the same objects."""
    part = copy.copy(module)
    part._modules = {**module._modules, **children}
    return part
