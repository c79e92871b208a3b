"""Low-rank adapters (LoRA, DoRA) through peft: where they go, and the policy with and without them.

A linear layer x Wᵀ becomes x (W + s B A)ᵀ with A [r, D] and B [F, r] that train and W that does not
(Hu et al. 2021); s is alpha / r, or alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023). DoRA (Liu et al.
2024) also trains the length of each row of W + s B A. At the start B is 0, so the policy is its own
reference.

peft makes the modules, their first values and their files; the fast engine computes them its own
way (engine/kernels/lora.py).
"""

from __future__ import annotations

import contextlib
import copy
import fnmatch
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from smoldpo.config.layer_spec import LayerSelection
from smoldpo.models.freeze import decoder_layers, layer_of
from smoldpo.models.hf_logging import quiet
from smoldpo.models.weights import copy_sharing
from smoldpo.utils.errors import UsageError, nearest

NAME = "default"
"""peft's name for a model's only adapter; a part of parameter names."""
ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class AdapterSettings:
    """What adapters a run asks for; see the settings of these names in config/schema.py."""

    lora_r: int
    lora_alpha: float
    lora_target_modules: tuple[str, ...]
    use_dora: bool
    use_rslora: bool
    layers: LayerSelection
    seed: int


@dataclass(frozen=True)
class Adapter:
    """A policy's adapter: peft's own description, and how many layers from below lack one."""

    config: Any
    frozen_layers: int
    full: torch.dtype
    """The adapters' precision."""

    @torch.no_grad()
    def on(self, model: PreTrainedModel, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        """peft's model of `model` (changed in place) with this adapter; its weights by name."""
        from peft import get_peft_model

        with torch.random.fork_rng(devices=[]), quiet(), _shapes_in(self.full, model):
            adapted = get_peft_model(model, copy.deepcopy(self.config))
        parameters = dict(adapted.named_parameters())
        for name, weight in weights:
            parameters[f"base_model.model.{name}"].copy_(weight)
        return adapted

    def merged(self, adapted: Any) -> PreTrainedModel:
        """The plain model of peft's, each adapter added into its weight, in full precision."""
        for module in adapted_modules(adapted):
            weight = module.base_layer.weight
            weight.data = weight.data.to(self.full)
        return adapted.merge_and_unload()


def add_adapters(model: PreTrainedModel, settings: AdapterSettings, full: torch.dtype) -> Adapter:
    """Put adapters into `model`, in place; nothing else trains then.

    Where A begins is a pure function of the seed. Adapters are in `full`, whatever the model's
    weights are.

    Raises:
        UsageError: layers that there are not; a target that fits no linear layer, or the LM head; a
            model whose layers are named otherwise.
    """
    from peft import LoraConfig, inject_adapter_in_model

    total = decoder_layers(model)
    layers, below = settings.layers.training_layers(total), settings.layers.frozen_layers(total)
    if not layers:
        raise UsageError(
            f"freeze_layers is {below}, so no layer is left for adapters; freeze fewer layers"
        )
    scale: Any = _plain_number(settings.lora_alpha)  # peft takes fractions too
    targets: dict[str, Any] = _targets(model, layers, settings.lora_target_modules)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_r,
        lora_alpha=scale,
        lora_dropout=0.0,
        use_dora=settings.use_dora,
        use_rslora=settings.use_rslora,
        **targets,
    )
    with torch.random.fork_rng(devices=[]), quiet(), _shapes_in(full, model):
        torch.manual_seed(settings.seed)
        inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    _measure_rows(model, full)
    return Adapter(config, below, full)


@contextlib.contextmanager
def _shapes_in(full: torch.dtype, model: nn.Module) -> Iterator[None]:
    """Within the block weights of another dtype have shapes alone, in `full`, and no memory.

    peft makes adapters in the precision of the weights that they are for, and would round where
    they begin.
    """
    there = [(weight, weight.data) for weight in model.parameters() if weight.dtype != full]
    for weight, values in there:
        weight.data = values.new_zeros((), dtype=full).expand(values.shape)
    try:
        yield
    finally:
        for weight, values in there:
            weight.data = values


def _plain_number(value: float) -> float:
    """Whole numbers as such: some readers of adapter_config.json take no others."""
    return int(value) if value == int(value) else value


def _targets(
    model: PreTrainedModel, layers: set[int], patterns: Sequence[str]
) -> dict[str, list[Any]]:
    """peft's names for what the patterns match in these layers: last or whole names."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if all(layer_of(name) < 0 for name in linear):
        raise UsageError(
            "use_peft: adapters go on linear layers in modules named layers.0, layers.1, ..., and "
            f"a model of type {model.config.model_type!r} has none; leave use_peft out, and choose "
            "with train"
        )
    inside = [name for name in linear if layer_of(name) in layers]
    chosen = set() if patterns else set(inside)
    for pattern in patterns:
        matched = {name for name in inside if _fits(name, pattern)}
        if not matched:
            raise UsageError(_no_target(model, pattern, linear))
        chosen |= matched
    last_names = {_last(name) for name in chosen}
    if chosen != {name for name in inside if _last(name) in last_names}:
        return {"target_modules": sorted(chosen)}
    found: dict[str, list[Any]] = {"target_modules": sorted(last_names)}
    if len(layers) < decoder_layers(model):
        found["layers_to_transform"] = sorted(layers)
    return found


def _fits(name: str, pattern: str) -> bool:
    """A pattern is a module's last names (q_proj, mlp.up_proj), or a pattern of its whole name."""
    same = f".{name}".endswith(f".{pattern}")
    return pattern == ALL_LINEAR or same or fnmatch.fnmatchcase(name, pattern)


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _no_target(model: PreTrainedModel, pattern: str, linear: Sequence[str]) -> str:
    """Why a pattern has no target, in words."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if any(_fits(name, pattern) for name, module in model.named_modules() if module in ends):
        return (
            f"lora_target_modules: {pattern!r} is the LM head or the embeddings, which get no "
            "adapters here (in tied models they are one matrix); give linear layers of the decoder"
        )
    if any(_fits(name, pattern) for name in linear):
        return (
            f"lora_target_modules: {pattern!r} fits nothing in the layers that may train; freeze "
            "fewer, or choose others with train_layers"
        )
    known = sorted({_last(name) for name in linear if layer_of(name) >= 0})
    return (
        f"lora_target_modules: {pattern!r} fits no linear layer{nearest(pattern, known)}; give "
        f"names such as {', '.join(known)}, or patterns such as '*.mlp.*'"
    )


@torch.no_grad()
def _measure_rows(model: PreTrainedModel, full: torch.dtype) -> None:
    """Let DoRA's magnitudes be the lengths of W's rows, in full precision, and keep them.

    They are peft's, to the last bit. Its forward divides by them and the fast engine by the ones
    kept, so in both engines the policy starts as its reference.
    """
    for module in adapted_modules(model):
        if magnitude := magnitude_of(module):
            lengths = torch.linalg.norm(module.base_layer.weight.to(full), dim=1)
            magnitude.weight.copy_(lengths)
            module.smoldpo_lengths = lengths


def is_adapted(module: nn.Module) -> bool:
    """Whether it is a module of peft's that holds a layer and its adapter."""
    return hasattr(module, "lora_A") and hasattr(module, "base_layer")


def adapted_modules(model: nn.Module) -> list[Any]:
    """peft's modules that hold a layer and its adapter."""
    return [module for module in model.modules() if is_adapted(module)]


def magnitude_of(module: Any) -> Any | None:
    """The module with DoRA's magnitudes, if it is DoRA."""
    return dict(module.lora_magnitude_vector.items()).get(NAME)


@contextlib.contextmanager
def adapters_off(model: PreTrainedModel) -> Iterator[None]:
    """In the block the model computes without its adapters."""

    def switch(off: bool) -> None:
        for module in adapted_modules(model):
            module._disable_adapters = off

    switch(off=True)
    try:
        yield
    finally:
        switch(off=False)


def without_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that shares all weights and computes without its adapters: the policy's reference."""
    base = copy_sharing(model)
    for module in adapted_modules(base):
        module._disable_adapters = True  # peft's method would freeze the shared weights as well
    return base
