"""Which precision to compute in, found by measuring this machine and not by a name."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterator

import torch

from smoldpo.engine import machine
from smoldpo.engine.memory import letting_go
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
    for dtype, rate in (("float32", slow), ("bfloat16", fast)):
        machine.keep_rate(f"{dtype}, {device}", round(rate, 1))
    measured = f"measured {slow:,.0f} GFLOP/s in float32, {fast:,.0f} in bfloat16"
    worth = STAYS.get(str(machine.chosen_before(f"precision, {device}")), WORTH_IT)
    choice = "bfloat16" if fast > worth * slow else "float32"
    machine.keep(f"precision, {device}", choice)
    return NAMES[choice], f"{choice}: {measured}"


def earlier_rates(dtype: torch.dtype, device: str) -> list[float]:
    """GFLOP/s that the last commands measured at their start, the latest last; those with dtype auto do."""
    return machine.earlier_rates(f"{str(dtype).removeprefix('torch.')}, {device}")


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


def cast(
    model: torch.nn.Module,
    dtype: torch.dtype,
    leaving: Collection[str] = (),
    beside: torch.nn.Module | None = None,
) -> None:
    """Bring every parameter but WIDE to `dtype`, in place; buffers (rotary frequencies) stay as they are.

    Args:
        leaving: names of parameters that may stay as they are, too: those that products convert.
        beside: a model that was cast so. Of weights that have the same values in both there is one tensor
            behind this; neither may train.
    """
    let_go = letting_go()
    there = dict(beside.named_parameters()) if beside is not None else {}
    for name, parameter in model.named_parameters():
        if name in there and there[name].data_ptr() == parameter.data_ptr():
            continue  # shared before
        before = parameter.data
        after = before if WIDE in name or name in leaving else before.to(dtype)
        if name in there and _says(there[name], after, name in leaving):
            after = there[name].data
        if after is not before:
            parameter.data = after
            let_go(before)


def _says(theirs: torch.Tensor, ours: torch.Tensor, narrower: bool) -> bool:
    """Whether the one holds the other's values, in its dtype or, if that may be, in a narrower one."""
    if theirs.shape != ours.shape or theirs.device != ours.device:
        return False
    exact = narrower and torch.promote_types(theirs.dtype, ours.dtype) == ours.dtype
    return (exact or theirs.dtype == ours.dtype) and torch.equal(theirs.to(ours.dtype), ours)


class MasterWeights:
    """What trains, in float32, beside a model that computes in a narrower dtype.

    The optimizer moves the masters; `publish` rounds them into the model. Gradients of micro-batches are
    added up in the masters' precision. Where the model computes in the masters' own dtype they are the
    model's parameters themselves, and nothing is kept twice.
    """

    def __init__(self, model: torch.nn.Module, compute: torch.dtype, leaving: Collection[str] = ()):
        """`leaving`: as `cast` takes it."""
        self._masters: list[_Master] = []
        full = master_dtype(compute)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                wide = parameter
                if compute != full and WIDE not in name:
                    wide = torch.nn.Parameter(parameter.detach().to(full, copy=True))
                self._masters.append(_Master(name, parameter, wide))
        cast(model, compute, leaving)

    def named(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Names and master parameters."""
        return [(master.name, master.wide) for master in self._masters]

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the masters into the model."""
        for master in self._masters:
            if master.narrow is not master.wide:
                master.narrow.copy_(master.wide)

    def drop_gradients(self) -> None:
        """The masters' with their places, and what an interrupted backward pass left in the model."""
        for master in self._masters:
            master.narrow.grad = master.wide.grad = master.place = None

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Within the block gradients add up in the masters' precision; behind it they are theirs."""
        for master in self._masters:
            master.begin()
        hooks = [m.narrow.register_post_accumulate_grad_hook(m.add) for m in self._masters]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for master in self._masters:
                master.wide.grad = master.place if master.begun else None


class _Master:
    """A parameter that trains, as the model has it and as the optimizer moves it, and its gradient's place.

    The place stays from step to step. Gradients made anew by each backward pass would lie among what it
    keeps, and the holes between them take memory that nothing uses: 0.9 GB where all of SmolLM2-135M trains.
    """

    def __init__(self, name: str, narrow: torch.nn.Parameter, wide: torch.nn.Parameter):
        self.name, self.narrow, self.wide = name, narrow, wide
        self.place: torch.Tensor | None = None
        self.begun = False
        """Whether the place holds a gradient."""

    def begin(self) -> None:
        """A gradient that is there already is added to."""
        self.begun = self.wide.grad is not None
        if self.begun:
            self.place = self.wide.grad
        elif self.place is None:
            self.place = torch.empty_like(self.wide)
        self.wide.grad = None

    def add(self, narrow: torch.Tensor) -> None:
        """Move what a backward pass found for `narrow` into the place."""
        assert self.place is not None
        gradient, narrow.grad = narrow.grad, None
        if self.begun:
            self.place.add_(gradient)
        else:
            self.place.copy_(gradient)
        self.begun = True
