"""Freeze depths: what trains at each of them, and which of them the trial runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from smoldpo.config.schema import TrainConfig
from smoldpo.engine.precision import master_dtype
from smoldpo.engine.trunk import below_boundary, boundary, head_weight
from smoldpo.models.freeze import decoder_layers, freeze
from smoldpo.models.mapped_weights import frozen_matrices, holds_exactly
from smoldpo.training.optim import optimizer_bytes
from smoldpo.training.policy_and_reference import PolicyAndReference
from smoldpo.training.setup import layer_selection
from smoldpo.training.state import saved_bytes, step_bytes
from smoldpo.utils import rng
from smoldpo.utils.errors import UsageError


@dataclass(frozen=True)
class FreezeDepth:
    """What one value of freeze_layers means for a model."""

    frozen: int  # The value of freeze_layers
    below: int  # Layers below the boundary: nothing in them, or in the embeddings, trains
    layers: int  # Layers of the model
    trainable: int  # Parameters that train
    head_trains: bool
    optimizer_bytes: int = 0  # The optimizer's state
    checkpoint_bytes: int = 0  # Tensors of one checkpoint
    step_bytes: int = 0
    """Gradients, optimizer state and temporaries, as the run counts them before its first step."""
    unconverted_bytes: int = 0
    """Saved by frozen weights that stay in the narrower dtype of their file."""
    released_bytes: int = 0  # Frozen weights that are released after the first pass
    idle_bytes: int = 0
    """Frozen weights that are released while the model is saved and answers are generated."""

    @property
    def top(self) -> int:
        """Layers above the boundary, which a backward pass goes through."""
        return self.layers - self.below


def all_depths(config: TrainConfig, models: PolicyAndReference) -> list[FreezeDepth]:
    """Each number of frozen layers below the model's own, and the configured one.

    Depths at which nothing trains are left out. With train_layers or adapters only the configured
    depth is there. The policy's `requires_grad` is the same before and after the call.
    """
    policy = models.engine.policy
    if config.use_peft:
        return [_describe(config, models, models.trainable.frozen_layers)]
    selection = layer_selection(config)
    before = {name: p.requires_grad for name, p in policy.named_parameters()}
    numbers = {models.trainable.frozen_layers}
    if not config.train_layers:
        numbers |= set(range(decoder_layers(policy)))
    depths = []
    try:
        for frozen in sorted(numbers):
            try:
                freeze(policy, replace(selection, freeze_layers=frozen))
            except UsageError:  # the patterns leave nothing that trains
                continue
            depths.append(_describe(config, models, frozen))
    finally:
        for name, parameter in policy.named_parameters():
            parameter.requires_grad_(before[name])
    return depths


def _describe(config: TrainConfig, models: PolicyAndReference, frozen: int) -> FreezeDepth:
    """The depth at which the policy is frozen now."""
    policy, dtype = models.engine.policy, master_dtype(models.facts.dtype)
    below = boundary(policy)
    masters = [
        torch.empty(p.shape, dtype=dtype, device="meta")
        for p in policy.parameters()
        if p.requires_grad
    ]
    stored: dict[str, torch.nn.Parameter] = {}
    if models.computing.engine == "fast" and holds_exactly(
        models.facts.dtype, models.facts.stored_dtype
    ):
        stored = frozen_matrices(policy)
    unread = (weight for name, weight in stored.items() if below_boundary(name, below))
    idle: Iterable[torch.Tensor] = stored.values()
    # Where all compute in the dtype of the files, norms and the head are mapped as well.
    if stored and models.facts.dtype == models.facts.stored_dtype:
        idle = (weight for weight in policy.parameters() if not weight.requires_grad)
    item = models.facts.stored_dtype.itemsize
    return FreezeDepth(
        frozen,
        below,
        decoder_layers(policy),
        _numbers(masters),
        head_weight(policy).requires_grad,
        optimizer_bytes=optimizer_bytes(masters, config),
        checkpoint_bytes=saved_bytes(masters, config)
        + sum(state.nbytes for state in rng.capture()[0].values()),
        step_bytes=step_bytes(masters, config),
        unconverted_bytes=_numbers(stored.values()) * (models.facts.dtype.itemsize - item),
        released_bytes=_numbers(unread) * item * models.facts.mapped,
        idle_bytes=_numbers(idle) * item * models.facts.mapped,
    )


def _numbers(weights: Iterable[torch.Tensor]) -> int:
    return sum(weight.numel() for weight in weights)


@dataclass(frozen=True)
class TrialDepth:
    """A depth that the trial runs, and how much of it."""

    depth: FreezeDepth
    one_step: bool = False
    """One step over short pairs is enough: the slowest depth, where it is not the run's own."""
    time_passes: bool = True
    """Whether the policy's passes are timed. The slowest depth's add nothing to the others'."""


def depths_to_try(depths: list[FreezeDepth], configured: int) -> list[TrialDepth]:
    """The configured depth, the deepest (or, where that is configured, about five sixths), depth 0.

    Two depths give the cost of a layer; the shallowest takes the most memory.
    """
    first = next(depth for depth in depths if depth.frozen == configured)
    inner = depths[1:-1] or depths[:1]
    upper = min(inner, key=lambda depth: abs(depth.frozen - depth.layers * 5 // 6))
    other = upper if first is depths[-1] else depths[-1]
    chosen = list(dict.fromkeys([first, other, depths[0]]))
    slowest = max(chosen, key=lambda depth: depth.trainable)
    return [
        TrialDepth(
            depth,
            one_step=depth is slowest and depth is not first,
            time_passes=depth is not slowest or len(chosen) == 1,
        )
        for depth in chosen
    ]
