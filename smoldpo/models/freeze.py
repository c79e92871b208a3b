"""Which parameters train.

    freeze_layers N     the embeddings and the first N decoder layers
    freeze "embeddings" the token embeddings alone
    freeze "norms"      every normalisation weight
    freeze "*.mlp.*"    parameters whose name fits the pattern (as file names do)

In SmolLM and SmolLM2 the LM head is the token embedding (tied weights), so freezing the embeddings
freezes the head too; it is one parameter.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from smoldpo.errors import UsageError, nearest

LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
GROUPS = ("embeddings", "norms")


@dataclass(frozen=True)
class ParameterGroup:
    """One line of the table that a run prints."""

    name: str
    parameters: int
    trainable: int


def decoder_layers(model: PreTrainedModel) -> int:
    """Number of decoder layers."""
    return model.config.get_text_config().num_hidden_layers


def freeze(model: PreTrainedModel, layers: int | None, names: Sequence[str] = ()) -> int:
    """Set `requires_grad` of every parameter, and return how many layers were frozen.

    Args:
        layers: how many decoder layers to freeze from below, the embeddings with them; None freezes
            five sixths of them.
        names: groups ("embeddings", "norms") or patterns of parameter names to freeze too.

    Raises:
        UsageError: more layers than there are, a pattern that fits no parameter, or nothing left
            to train.
    """
    total = decoder_layers(model)
    layers = total * 5 // 6 if layers is None else layers
    if layers > total:
        raise UsageError(
            f"freeze_layers is {layers}, but the model has {total} layers; give at most {total}"
        )
    frozen: set[str] = set()
    parameters = dict(model.named_parameters())
    if layers:
        frozen |= _group(model, "embeddings")
        frozen |= {name for name in parameters if 0 <= layer_of(name) < layers}
    for name in names:
        matched = parameters_of(model, name)
        if not matched:
            raise UsageError(
                f"freeze: {name!r} fits no parameter{nearest(name, GROUPS)}; give embeddings, norms, or a "
                f"pattern such as '*.mlp.*' (names look like {list(parameters)[-2]})"
            )
        frozen |= matched
    if len(frozen) == len(parameters):
        raise UsageError("everything is frozen, so nothing could train; freeze fewer layers")
    for name, parameter in parameters.items():
        parameter.requires_grad_(name not in frozen)
    return layers


def parameters_of(model: PreTrainedModel, name: str) -> set[str]:
    """Names of the parameters that a group ("embeddings", "norms") or a pattern stands for."""
    return _group(model, name) or set(fnmatch.filter(dict(model.named_parameters()), name))


def layer_of(name: str) -> int:
    """The decoder layer that a parameter belongs to, or -1."""
    found = LAYER.search(name)
    return int(found.group(1)) if found else -1


def _group(model: PreTrainedModel, group: str) -> set[str]:
    if group == "embeddings":
        held = {id(model.get_input_embeddings().weight)}
    elif group == "norms":
        norms = [module for module in model.modules() if _is_norm(module)]
        held = {id(parameter) for norm in norms for parameter in norm.parameters(recurse=False)}
    else:
        return set()
    return {name for name, parameter in model.named_parameters() if id(parameter) in held}


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def summarize(model: PreTrainedModel) -> list[ParameterGroup]:
    """Parameters and trainable parameters: embeddings, runs of like layers, final norm, head."""
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is embedding
    counts: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        layer = layer_of(name)
        if layer >= 0:
            group = f"layer {layer}"
        elif parameter is embedding:
            group = "embeddings and LM head (tied)" if tied else "embeddings"
        elif head is not None and parameter is head.weight:
            group = "LM head"
        else:
            group = "final norm" if "norm" in name else "other"
        count = counts.setdefault(group, [0, 0])
        count[0] += parameter.numel()
        count[1] += parameter.numel() * parameter.requires_grad
    return _join_layers([ParameterGroup(name, *count) for name, count in counts.items()])


def _join_layers(groups: list[ParameterGroup]) -> list[ParameterGroup]:
    """One line for neighbouring layers that train alike: "layers 0-24"."""
    joined: list[ParameterGroup] = []
    for group in groups:
        last = joined[-1] if joined else None
        alike = (
            last is not None
            and group.name.startswith("layer ")
            and last.name.startswith("layer")
            and (group.trainable == group.parameters) == (last.trainable == last.parameters)
            and (group.trainable == 0) == (last.trainable == 0)
        )
        if last is not None and alike:
            first = re.split(r"[ -]", last.name)[1]
            joined[-1] = ParameterGroup(
                f"layers {first}-{group.name.split()[1]}",
                last.parameters + group.parameters,
                last.trainable + group.trainable,
            )
        else:
            joined.append(group)
    return joined
