"""Which of two equal ways to compute is faster on this machine, found by measuring and not by a name."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from smoldpo.engine import machine
from smoldpo.engine.head import completion_logps
from smoldpo.engine.packing import Layout, Segment
from smoldpo.models.attention import pair_attention

CLOSE = 1.25
"""So near, the first is taken: results kept from earlier runs are found only if the choice stays the same."""
STAYS = 2.0
"""A choice of an earlier run stands until the other way is this many times faster."""


@dataclass(frozen=True)
class Kernels:
    """Ways to compute; whichever is taken, results differ by rounding alone.

    On other devices than a CPU both are False, and attention is what models/attention.py says.
    """

    fused_attention: bool = True
    """Attention's forward pass by torch's fused kernel, not by matrix products."""
    fused_head: bool = True
    """The LM head by torch's fused attention kernel, not by chunks of logits."""

    def __str__(self) -> str:
        ways = {name.removeprefix("fused_"): fused for name, fused in asdict(self).items()}
        return ", ".join(f"{name} {'fused' if w else 'by products'}" for name, w in ways.items())


def choose_kernels(dtype: torch.dtype, device: str) -> Kernels:
    """The faster ways for a model of SmolLM2-135M's shape, or an earlier run's if near: about 0.15 s."""
    if device != "cpu":
        return Kernels(fused_attention=False, fused_head=False)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    query, key, value = random(1, 9, 256, 64), random(1, 3, 256, 64), random(1, 3, 256, 64)
    layout = Layout.of([Segment(0, 128, 64, 64)], torch.zeros(256, dtype=torch.long))
    states, head = random(256, 576), random(8192, 576)
    targets = torch.zeros(256, dtype=torch.long)
    ways: dict[str, Callable[[bool], object]] = {
        "fused_attention": lambda fused: pair_attention(
            query, key, value, 0.125, layout, None, False, fused
        ),
        "fused_head": lambda fused: completion_logps(states, head, targets, fused),
    }
    before = {name: machine.chosen_before(f"{name}, {dtype}") for name in ways}
    choice = {name: _first_is_faster(way, before[name]) for name, way in ways.items()}
    for name, is_first in choice.items():
        machine.keep(f"{name}, {dtype}", is_first)
    return Kernels(**choice)


@torch.no_grad()
def _first_is_faster(way: Callable[[bool], object], before: Any = None) -> bool:
    """Whether way(True) is to be taken, and not way(False); `before` is what an earlier run found."""
    best = {True: float("inf"), False: float("inf")}
    for _ in range(4):
        for fused in best:
            start = time.perf_counter()
            way(fused)
            best[fused] = min(best[fused], time.perf_counter() - start)
    close = STAYS if before is True else 1 / STAYS if before is False else CLOSE
    return best[True] <= close * best[False]
