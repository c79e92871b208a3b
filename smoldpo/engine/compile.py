"""Compiling the operations between matrix products (kernels/elementwise.py): whether, and how.

Compiling takes COMPILE_SECONDS and then saves SAVED_SHARE of the time, both measured on a CPU; a
run is worth it when it is expected to save more than it costs by some margin. On CUDA it always is.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from transformers import PreTrainedModel

from smoldpo.engine.autotune import matmul_rate
from smoldpo.engine.kernels import elementwise
from smoldpo.engine.trunk import boundary, head_weight

COMPILE_SECONDS = 20.0
SAVED_SHARE = 0.07
MARGIN = 2.0
REACHED = 0.4
"""Share of the best measured rate that a run reaches; for the forecast alone."""


@dataclass(frozen=True)
class CompileChoice:
    """Whether elementwise functions are compiled, and why in words."""

    compiled: bool
    why: str


def set_up_compiling(
    asked: str, operations: float, dtype: torch.dtype, device: str
) -> CompileChoice:
    """Decide as `asked` (on, off, auto), and compile; where that fails, say so and go on without.

    Args:
        operations: the fewest that the run needs (`Parameters`).
    """
    choice = _decide(asked, operations, dtype, device)
    if choice.compiled:
        missing = missing_compiler(device)
        if missing is not None:
            choice = CompileChoice(False, f"{missing}, so nothing is compiled")
    elementwise.set_compiled(choice.compiled)
    if choice.compiled:
        try:
            _compile_now(dtype, device)
        except Exception as error:  # compilers fail in ways of their own
            elementwise.set_compiled(False)
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            return CompileChoice(False, f"compiling failed ({reason}), so nothing is compiled")
    return choice


def _decide(asked: str, operations: float, dtype: torch.dtype, device: str) -> CompileChoice:
    if asked != "auto":
        return CompileChoice(asked == "on", "as asked")
    if device != "cpu":
        return CompileChoice(device == "cuda", f"always so on {device}")
    expected = operations / (torch.get_num_threads() * matmul_rate(dtype, device) * 1e9 * REACHED)
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
    """Call each function once, on sizes that stand for any."""
    rows, width = 24, 64
    first, second, third = (torch.ones(rows, width, dtype=dtype, device=device) for _ in range(3))
    stream = first.to(torch.promote_types(dtype, torch.float32))  # as states are between layers
    _, scale = elementwise.rms_norm(stream, first[0], 1e-5)
    elementwise.rms_norm_grads(stream, scale, first[0], second)
    elementwise.gated_product(first, second)
    elementwise.gated_product_grads(first, second, third)
    heads = torch.ones(1, rows, 3, width, dtype=dtype, device=device).transpose(1, 2)
    angles = torch.ones(1, 1, rows, width, dtype=dtype, device=device)
    for direction in (1, -1):
        elementwise.rotate(heads, angles, angles, direction)


@dataclass(frozen=True)
class Parameters:
    """Parameters in matrix products, and the fewest operations that the loss needs with them.

    For a pair of p prompt and c completion tokens (both sides together), N_b parameters in layers
    below the freeze boundary, N_t above it, of which N_w train, N_h in the LM head; a product takes
    2 operations a parameter and token forward, and backward 4 where the weights train, else 2:

        once a pair     trunk 2 (p + c) N_b,  reference 2 (p + c) N_t + 2 c N_h
        every epoch     (p + c) (4 N_t + 2 N_w) + 4 c N_h, or 6 c N_h where the head trains

    Adapters count as parameters above the boundary that train, in the reference's pass too, where
    they are off: they are few.
    """

    below: int
    above: int
    above_trains: int
    """Of those above, the ones whose gradients are formed."""
    head: int
    head_trains: bool

    @classmethod
    def of(cls, model: PreTrainedModel) -> Parameters:
        """Counted from a model with `requires_grad` set."""
        at = boundary(model)
        layers = [[p for p in layer.parameters() if p.ndim >= 2] for layer in model.model.layers]
        sizes = [sum(p.numel() for p in layer) for layer in layers]
        trains = sum(p.numel() for layer in layers for p in layer if p.requires_grad)
        head = head_weight(model)
        return cls(sum(sizes[:at]), sum(sizes[at:]), trains, head.numel(), head.requires_grad)

    def once(self, prompt_tokens: float, completion_tokens: float) -> float:
        """Operations of trunk and reference over so many tokens."""
        tokens = prompt_tokens + completion_tokens
        return 2 * tokens * (self.below + self.above) + 2 * completion_tokens * self.head

    def epoch(self, prompt_tokens: float, completion_tokens: float) -> float:
        """Operations of one epoch of the policy over so many tokens."""
        tokens = prompt_tokens + completion_tokens
        passes = 6 if self.head_trains else 4
        inside = 4 * self.above + 2 * self.above_trains
        return tokens * inside + passes * completion_tokens * self.head
