"""What trains at each freeze depth, asked of the run's own freezing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from smoldpo.config.schema import TrainConfig
from smoldpo.engine.precision import master_dtype
from smoldpo.engine.trunk import below_boundary, boundary, frozen_matrices, holds_exactly
from smoldpo.models.freeze import decoder_layers, freeze, layer_of
from smoldpo.plan.workload import Depth
from smoldpo.training.optim import optimizer_bytes
from smoldpo.training.policy_and_reference import PolicyAndReference
from smoldpo.training.state import saved_bytes, step_bytes
from smoldpo.utils import rng
from smoldpo.utils.errors import UsageError


def every_depth(config: TrainConfig, models: PolicyAndReference) -> list[Depth]:
    """Depths 0 to one less than there are layers, and the configured one; without those where nothing trains.

    With train_layers or adapters there is none to choose: what is configured is the only one. The policy's
    `requires_grad` is as before afterwards.
    """
    policy = models.engine.policy
    if config.use_peft:
        return [_depth(config, models, models.frozen_layers)]
    before = {name: p.requires_grad for name, p in policy.named_parameters()}
    layers = decoder_layers(policy)
    wanted = sorted({*range(layers), models.frozen_layers})
    if config.train_layers:
        wanted = [models.frozen_layers]
    found = []
    try:
        for frozen in wanted:
            try:
                freeze(
                    policy,
                    frozen,
                    config.freeze,
                    train_layers=config.train_layers,
                    train=config.train,
                )
            except UsageError:  # the patterns leave nothing that trains
                continue
            found.append(_depth(config, models, frozen))
    finally:
        for name, parameter in policy.named_parameters():
            parameter.requires_grad_(before[name])
    return found


def _depth(config: TrainConfig, models: PolicyAndReference, frozen: int) -> Depth:
    policy = models.engine.policy
    layers = decoder_layers(policy)
    trains = {
        name: torch.empty(p.shape, dtype=master_dtype(models.dtype), device="meta")
        for name, p in policy.named_parameters()
        if p.requires_grad
    }
    masters = list(trains.values())
    generators = sum(t.numel() * t.element_size() for t in rng.capture()[0].values())
    head = policy.get_output_embeddings().weight.requires_grad
    fast = models.computing["engine"] == "fast"
    if fast:
        below = boundary(policy)
    elif policy.get_input_embeddings().weight.requires_grad:
        below = 0
    else:
        below = min((layer_of(name) for name in trains if layer_of(name) >= 0), default=layers)
    return Depth(
        frozen,
        below,
        layers,
        sum(tensor.numel() for tensor in masters),
        head,
        optimizer=optimizer_bytes(masters, config),
        checkpoint=saved_bytes(masters, config) + generators,
        step=step_bytes(masters, config),
        **_as_stored(models, policy, below if fast else None),
    )


def _as_stored(models: PolicyAndReference, policy: Any, below: int | None) -> dict[str, int]:
    """Bytes of a Depth that hang on what stays as it was loaded; the plain engine (below None) has none."""
    stored: dict[str, torch.Tensor] = {}
    if below is not None and holds_exactly(models.dtype, models.loaded):
        stored = dict(frozen_matrices(policy))
    unread = [weight for name, weight in stored.items() if below_boundary(name, below or 0)]
    resting = list(stored.values())
    if stored and models.dtype == models.loaded:
        # Then norms and the head are a part of their file as well.
        resting = [weight for weight in policy.parameters() if not weight.requires_grad]
    item = models.loaded.itemsize
    return {
        "unconverted": _numbers(stored.values()) * (models.dtype.itemsize - item),
        "released": _numbers(unread) * item * models.mapped,
        "resting": _numbers(resting) * item * models.mapped,
    }


def _numbers(weights: Iterable[torch.Tensor]) -> int:
    return sum(weight.numel() for weight in weights)


@dataclass(frozen=True)
class Visit:
    """A depth that is tried, and how much of it."""

    depth: Depth
    once: bool = False
    """The dearest, and not the run's own: one step over short pairs is enough."""
    passes: bool = True
    """Whether the policy's passes are timed: those of the dearest tell nothing that others do not."""


def depths_to_try(depths: list[Depth], configured: int) -> list[Visit]:
    """The configured one first, then the deepest, or one in the upper part if that is it, and the shallowest.

    Two tell what a layer costs; the shallowest has the most memory.
    """
    first = next(depth for depth in depths if depth.frozen == configured)
    inner = depths[1:-1] or depths[:1]
    upper = min(inner, key=lambda depth: abs(depth.frozen - depth.layers * 5 // 6))
    other = upper if first is depths[-1] else depths[-1]
    chosen = list(dict.fromkeys([first, other, depths[0]]))
    dearest = max(chosen, key=lambda depth: depth.trainable)
    alone = len(chosen) == 1
    return [
        Visit(
            depth,
            once=depth is dearest and depth is not first,
            passes=depth is not dearest or alone,
        )
        for depth in chosen
    ]
