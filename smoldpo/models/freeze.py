"""Which parameters of a model train, by a LayerSelection (config/layer_spec.py).

    freeze_layers N     all but the embeddings and the first N decoder layers
    train_layers ...    these decoder layers, and nothing else
    train NAMES         of those, what fits one of the names
    freeze NAMES        less what fits one of these

A name is a group (embeddings, norms, biases) or a pattern of parameter names, as file names have
them ('*.mlp.*').

In SmolLM and SmolLM2 the LM head is the token embedding (tied weights), so freezing the embeddings
freezes the head too; it is one parameter.
"""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from smoldpo.config.layer_spec import LayerSelection
from smoldpo.utils.errors import UsageError, nearest

LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
GROUPS = ("embeddings", "norms", "biases")


@dataclass(frozen=True)
class ParameterGroup:
    """One line of the table that a run prints."""

    name: str
    parameters: int
    trainable: int


def decoder_layers(model: PreTrainedModel) -> int:
    """Number of decoder layers."""
    return model.config.get_text_config().num_hidden_layers


def freeze(model: PreTrainedModel, selection: LayerSelection) -> int:
    """Set `requires_grad` of every parameter, and return how many layers froze from below.

    Raises:
        UsageError: layers that there are not, a name that fits no parameter, or nothing left to
            train.
    """
    total = decoder_layers(model)
    inside, below = selection.training_layers(total), selection.frozen_layers(total)
    parameters = dict(model.named_parameters())
    training = {name for name in parameters if layer_of(name) in inside}
    if not selection.train_layers:
        outside = {name for name in parameters if layer_of(name) < 0}
        training |= outside - (_group(model, "embeddings") if below else set())
    if selection.train:
        chosen = [parameters_of(model, "train", name) for name in selection.train]
        for name, found in zip(selection.train, chosen, strict=True):
            if not found & training:
                raise UsageError(
                    f"train: {name!r} fits nothing in the layers that may train; freeze fewer, or "
                    "choose others with train_layers"
                )
        training &= set().union(*chosen)
    for name in selection.freeze:
        training -= parameters_of(model, "freeze", name)
    if not training:
        raise UsageError("everything is frozen, so nothing could train; freeze fewer layers")
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in training)
    return below


def layer_of(name: str) -> int:
    """The decoder layer that a parameter belongs to, or -1."""
    found = LAYER.search(name)
    return int(found.group(1)) if found else -1


def parameters_of(model: PreTrainedModel, setting: str, name: str) -> set[str]:
    """Names of the parameters that a group or pattern means.

    Args:
        setting: where it stands, for the error.

    Raises:
        UsageError: there are none.
    """
    parameters = [parameter for parameter, _ in model.named_parameters()]
    matched = _group(model, name) or set(fnmatch.filter(parameters, name))
    if not matched:
        absent = f"{name!r} fits no parameter" if name not in GROUPS else f"the model has no {name}"
        raise UsageError(
            f"{setting}: {absent}{nearest(name, GROUPS)}; give {', '.join(GROUPS)}, or a "
            f"pattern such as '*.mlp.*' (names look like {parameters[-2]})"
        )
    return matched


def _group(model: PreTrainedModel, group: str) -> set[str]:
    if group == "biases":
        return {name for name, _ in model.named_parameters() if name.endswith(".bias")}
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
