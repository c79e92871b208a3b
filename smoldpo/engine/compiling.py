"""Whether to compile what lies between matrix products (models/regions.py), and doing it.

Compiling takes COMPILE_SECONDS and then saves SAVED_SHARE of the time, both measured on a CPU; a run is
worth it when it is expected to save more than it costs by some margin. On CUDA it always is.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from smoldpo.engine.precision import matmul_rate
from smoldpo.models import regions

COMPILE_SECONDS = 20.0
SAVED_SHARE = 0.07
MARGIN = 2.0
REACHED = 0.4
"""Share of the floor (engine/work.py) that a run reaches; for the forecast alone."""


@dataclass(frozen=True)
class CompileChoice:
    """Whether regions are compiled, and why in words."""

    compiled: bool
    why: str


def set_up_compiling(
    asked: str, operations: float, dtype: torch.dtype, device: str
) -> CompileChoice:
    """Decide as `asked` (on, off, auto), and compile; where that fails, say so and go on without.

    Args:
        operations: what the run needs at the least (engine/work.py).
    """
    choice = _decide(asked, operations, dtype, device)
    if choice.compiled:
        missing = missing_compiler(device)
        if missing is not None:
            choice = CompileChoice(False, f"{missing}, so nothing is compiled")
    regions.switch_regions(choice.compiled)
    if choice.compiled:
        try:
            _compile_now(dtype, device)
        except Exception as error:  # compilers fail in ways of their own
            regions.switch_regions(False)
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            return CompileChoice(False, f"compiling failed ({reason}), so nothing is compiled")
    return choice


def _decide(asked: str, operations: float, dtype: torch.dtype, device: str) -> CompileChoice:
    if asked != "auto":
        return CompileChoice(asked == "on", "as asked")
    if device != "cpu":
        return CompileChoice(device == "cuda", f"always so on {device}")
    expected = operations / (matmul_rate(dtype, device) * 1e9 * REACHED)
    worth = SAVED_SHARE * expected > MARGIN * COMPILE_SECONDS
    return CompileChoice(
        worth, f"about {expected:,.0f} s of work, compiling takes about {COMPILE_SECONDS:.0f}"
    )


def missing_compiler(device: str) -> str | None:
    """What torch.compile lacks on this device, in words, or None."""
    if device == "cuda" and find_spec("triton") is None:
        return "triton is not installed"
    compilers = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    if device == "cpu" and not any(shutil.which(name) for name in compilers if name):
        return "no C++ compiler is found (install g++ or clang)"
    return None


@torch.no_grad()
def _compile_now(dtype: torch.dtype, device: str) -> None:
    """Call each region once, on sizes that stand for any."""
    rows, width = 24, 64
    first, second, third = (torch.ones(rows, width, dtype=dtype, device=device) for _ in range(3))
    stream = first.to(torch.promote_types(dtype, torch.float32))  # as states are between layers
    _, scale = regions.normed(stream, first[0], 1e-5)
    regions.normed_slopes(stream, scale, first[0], second)
    regions.gated_product(first, second)
    regions.gated_slopes(first, second, third)
    heads = torch.ones(1, rows, 3, width, dtype=dtype, device=device).transpose(1, 2)
    angles = torch.ones(1, 1, rows, width, dtype=dtype, device=device)
    for direction in (1, -1):
        regions.rotated(heads, angles, angles, direction)
