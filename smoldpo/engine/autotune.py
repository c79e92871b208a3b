"""Which of two equal ways to compute is faster on this machine, found by measuring and not by a name."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from smoldpo.engine.cache.folder import choices_file, rates_file
from smoldpo.engine.kernels.attention import pair_attention
from smoldpo.engine.kernels.lm_head import completion_logps
from smoldpo.engine.packing import Layout, Segment
from smoldpo.utils.files import processor_name, write_json

CLOSE = 1.25
"""So near, the first is taken: results kept from earlier runs are found only if the choice stays the same."""
SWITCH_KERNELS = 2.0
"""A choice of an earlier run stands until the other way is this many times faster."""


@dataclass(frozen=True)
class KernelChoice:
    """Ways to compute; whichever is taken, results differ by rounding alone.

    On other devices than a CPU both are False, and attention is what engine/kernels/attention.py says.
    """

    fused_attention: bool = True
    """Attention's forward pass by torch's fused kernel, not by matrix products."""
    fused_head: bool = True
    """The LM head by torch's fused attention kernel, not by chunks of logits."""

    def __str__(self) -> str:
        ways = {name.removeprefix("fused_"): fused for name, fused in asdict(self).items()}
        return ", ".join(f"{name} {'fused' if w else 'by products'}" for name, w in ways.items())


def choose_kernels(dtype: torch.dtype, device: str) -> KernelChoice:
    """The faster ways for a model of SmolLM2-135M's shape, or an earlier run's if near: about 0.15 s."""
    if device != "cpu":
        return KernelChoice(fused_attention=False, fused_head=False)
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
    before = {name: stored_choice(f"{name}, {dtype}") for name in ways}
    choice = {name: _first_is_faster(way, before[name]) for name, way in ways.items()}
    for name, is_first in choice.items():
        keep(f"{name}, {dtype}", is_first)
    return KernelChoice(**choice)


@torch.no_grad()
def _first_is_faster(way: Callable[[bool], object], before: Any = None) -> bool:
    """Whether way(True) is to be taken, and not way(False); `before` is what an earlier run found."""
    best = {True: float("inf"), False: float("inf")}
    for _ in range(4):
        for fused in best:
            start = time.perf_counter()
            way(fused)
            best[fused] = min(best[fused], time.perf_counter() - start)
    close = SWITCH_KERNELS if before is True else 1 / SWITCH_KERNELS if before is False else CLOSE
    return best[True] <= close * best[False]


NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
WORTH_IT = 1.3
"""bfloat16 must be this many times faster than float32 to be chosen for its lower precision."""
SWITCH_PRECISION = {"bfloat16": 1.0, "float32": 2.0}
"""The same where an earlier run has chosen: its choice stands until the other is clearly better."""

SHAPE, SECONDS = (512, 576, 1536), 0.15
"""Rows, inner width and columns of the product that is measured, a small model's MLP; and for how long."""


def compute_dtype(name: str, device: str) -> tuple[torch.dtype, str]:
    """The dtype for `name` (auto measures; an earlier choice stands if near), and how that was decided."""
    if name != "auto":
        return NAMES[name], f"{name}, as asked"
    slow, fast = (matmul_rate(NAMES[n], device) for n in ("float32", "bfloat16"))
    for dtype, rate in (("float32", slow), ("bfloat16", fast)):
        store_rate(f"{dtype}, {device}", round(rate, 1))
    measured = f"measured {slow:,.0f} GFLOP/s in float32, {fast:,.0f} in bfloat16"
    worth = SWITCH_PRECISION.get(str(stored_choice(f"precision, {device}")), WORTH_IT)
    choice = "bfloat16" if fast > worth * slow else "float32"
    keep(f"precision, {device}", choice)
    return NAMES[choice], f"{choice}: {measured}"


def earlier_rates(dtype: torch.dtype, device: str) -> list[float]:
    """GFLOP/s that the last commands measured at their start, the latest last; those with dtype auto do."""
    return stored_rates(f"{str(dtype).removeprefix('torch.')}, {device}")


def matmul_rate(dtype: torch.dtype, device: str) -> float:
    """GFLOP/s of a product of SHAPE."""
    rows, inner, columns = SHAPE
    left = torch.randn(rows, inner, device=device).to(dtype)
    right = torch.randn(columns, inner, device=device).to(dtype)
    torch.nn.functional.linear(left, right)
    best, end = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(4):
            torch.nn.functional.linear(left, right)
        if device != "cpu":
            getattr(torch, device).synchronize()
        best = min(best, (time.perf_counter() - start) / 4)
    return 2 * rows * inner * columns / best / 1e9


# What was measured of this machine, and chosen by it, kept in the cache folder: machine.json and rates.json.
#
# A choice of kernels or precision changes the last bits of results and the keys of what is kept between runs.
# Beside other work the same measurement may come out otherwise, so what was chosen before stands until
# something else is clearly better. `smoldpo cache clear` forgets it.


STORED_RATES = 16
"""Rates of so many commands are kept."""


def stored_choice(name: str) -> Any:
    """What was kept under this name; None without, or with another processor, torch or number of threads."""
    return _read(choices_file()).get(name)


def keep(name: str, choice: Any) -> None:
    """Keep a choice (JSON); where nothing can be written, the next run measures afresh."""
    _write(choices_file(), name, choice)


def stored_rates(name: str) -> list[float]:
    """What the last commands kept under this name, the latest last."""
    found = _read(rates_file()).get(name)
    return [float(rate) for rate in found if _is_number(rate)] if isinstance(found, list) else []


def store_rate(name: str, rate: float) -> None:
    """Add to them. Each command does, so they have a file of their own: two at once lose no choice."""
    _write(rates_file(), name, [*stored_rates(name), rate][-STORED_RATES:])


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and value > 0


def _write(file: Path, name: str, value: Any) -> None:
    there = _read(file)
    if there.get(name) != value:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, {"machine": _machine(), "choices": there | {name: value}})


def _machine() -> dict[str, Any]:
    threads = torch.get_num_threads()
    return {"processor": processor_name(), "torch": torch.__version__, "threads": threads}


def _read(file: Path) -> dict[str, Any]:
    """Everything that was kept of this machine; what cannot be read counts as nothing."""
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        choices = kept["choices"] if kept["machine"] == _machine() else {}
    except (OSError, ValueError, LookupError, TypeError):
        return {}
    return choices if isinstance(choices, dict) else {}
