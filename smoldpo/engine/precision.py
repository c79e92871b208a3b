"""Which precision to compute in, found by measuring this machine and not by a name."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch

from smoldpo.engine import machine
from smoldpo.engine.memory import let_go_of_file_pages
from smoldpo.errors import UsageError

NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
WORTH_IT = 1.3
"""bfloat16 must be this many times faster than float32 to be chosen for its lower precision."""
STAYS = {"bfloat16": 1.0, "float32": 2.0}
"""The same where an earlier run has chosen: its choice stands until the other is clearly better."""

SHAPE, SECONDS = (512, 576, 1536), 0.15
"""Rows, inner width and columns of the product that is measured, a small model's MLP; and for how long."""


def compute_dtype(name: str, device: str) -> tuple[torch.dtype, str]:
    """The dtype for `name` (auto measures; an earlier choice stands if near), and how that was decided."""
    if name != "auto":
        return NAMES[name], f"{name}, as asked"
    slow, fast = (matmul_rate(NAMES[n], device) for n in ("float32", "bfloat16"))
    measured = f"measured {slow:,.0f} GFLOP/s in float32, {fast:,.0f} in bfloat16"
    worth = STAYS.get(str(machine.chosen_before(f"precision, {device}")), WORTH_IT)
    choice = "bfloat16" if fast > worth * slow else "float32"
    machine.keep(f"precision, {device}", choice)
    return NAMES[choice], f"{choice}: {measured}"


def master_dtype(compute: torch.dtype) -> torch.dtype:
    """What trainable parameters are kept in: float32, or float64 when computing in float64."""
    return torch.float64 if compute == torch.float64 else torch.float32


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


def pick_device(name: str) -> str:
    """The device for `name`; auto takes cuda, then mps, then cpu.

    Raises:
        UsageError: the device asked for is not there.
    """
    there = {
        "cuda": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
        "cpu": lambda: True,
    }
    if name != "auto":
        if not there[name]():
            raise UsageError(f"device {name}: this machine, or this build of torch, has none")
        return name
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


WIDE = "lora_magnitude_vector"
"""DoRA's magnitudes, one number a row, scale whole results: they compute in the masters' precision."""


def cast(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Bring every parameter but WIDE to `dtype`, in place; buffers (rotary frequencies) stay as they are."""
    for name, parameter in model.named_parameters():
        if WIDE in name:
            continue
        before = parameter.data
        after = before.to(dtype)
        if after is not before:
            parameter.data = after
            let_go_of_file_pages([before])


class MasterWeights:
    """What trains, in float32, beside a model that computes in a narrower dtype.

    The optimizer moves the masters; `publish` rounds them into the model. Gradients of micro-batches are
    added up in the masters' precision. Where the model computes in the masters' own dtype they are the
    model's parameters themselves, and nothing is kept twice.
    """

    def __init__(self, model: torch.nn.Module, compute: torch.dtype):
        self._pairs: list[tuple[str, torch.nn.Parameter, torch.nn.Parameter]] = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                wide = parameter
                if parameter.dtype != compute and WIDE not in name:
                    wide = torch.nn.Parameter(parameter.detach().clone())
                self._pairs.append((name, parameter, wide))
        cast(model, compute)
        self._places: list[torch.Tensor | None] = [None] * len(self._pairs)

    def named(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Names and master parameters."""
        return [(name, wide) for name, _, wide in self._pairs]

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the masters into the model."""
        for _, narrow, wide in self._pairs:
            if narrow is not wide:
                narrow.copy_(wide)

    def drop_gradients(self) -> None:
        """The masters' with their places, and what an interrupted backward pass left in the model."""
        for _, narrow, wide in self._pairs:
            narrow.grad = wide.grad = None
        self._places = [None] * len(self._pairs)

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Within the block gradients add up in the masters' precision; behind it they are the masters' own.

        Each has a place that stays from step to step. Gradients made anew by each backward pass would lie
        among what it keeps, and the holes between them take memory that nothing uses: 0.9 GB where all of
        SmolLM2-135M trains.
        """
        sums = [
            _Sum(narrow, wide, place)
            for (_, narrow, wide), place in zip(self._pairs, self._places, strict=True)
        ]
        self._places = [each.place for each in sums]
        hooks = [each.narrow.register_post_accumulate_grad_hook(each.add) for each in sums]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for each in sums:
                each.wide.grad = each.place if each.begun else None


class _Sum:
    """A gradient that adds up in a place of its own."""

    def __init__(
        self, narrow: torch.nn.Parameter, wide: torch.nn.Parameter, place: torch.Tensor | None
    ):
        self.narrow, self.wide = narrow, wide
        self.begun = wide.grad is not None
        if wide.grad is not None:
            place = wide.grad
        self.place = torch.empty_like(wide) if place is None else place
        wide.grad = None

    def add(self, narrow: torch.Tensor) -> None:
        """Move what a backward pass found for `narrow` into the sum."""
        gradient, narrow.grad = narrow.grad, None
        if self.begun:
            self.place.add_(gradient)
        else:
            self.place.copy_(gradient)
        self.begun = True
