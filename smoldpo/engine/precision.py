"""Which precision to compute in, found by measuring this machine and not by a name."""

from __future__ import annotations

import time

import torch

NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
WORTH_IT = 1.3
"""bfloat16 must be this many times faster than float32 to be chosen for its lower precision."""


def compute_dtype(name: str, device: str) -> tuple[torch.dtype, str]:
    """The dtype for `name` (auto measures), and how that was decided, in words."""
    if name != "auto":
        return NAMES[name], f"{name}, as asked"
    slow, fast = (matmul_rate(NAMES[n], device) for n in ("float32", "bfloat16"))
    measured = f"measured {slow:,.0f} GFLOP/s in float32, {fast:,.0f} in bfloat16"
    if fast > WORTH_IT * slow:
        return torch.bfloat16, f"bfloat16: {measured}"
    return torch.float32, f"float32: {measured}"


def master_dtype(compute: torch.dtype) -> torch.dtype:
    """What trainable parameters are kept in: float32, or float64 when computing in float64."""
    return torch.float64 if compute == torch.float64 else torch.float32


def matmul_rate(dtype: torch.dtype, device: str, seconds: float = 0.15) -> float:
    """GFLOP/s of a product at the shapes of a small model's MLP (512 x 576 by 576 x 1536)."""
    rows, inner, columns = 512, 576, 1536
    left = torch.randn(rows, inner, device=device).to(dtype)
    right = torch.randn(columns, inner, device=device).to(dtype)
    torch.nn.functional.linear(left, right)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(4):
            torch.nn.functional.linear(left, right)
        if device != "cpu":
            getattr(torch, device).synchronize()
        best = min(best, (time.perf_counter() - start) / 4)
    return 2 * rows * inner * columns / best / 1e9


def pick_device(name: str) -> str:
    """The device for `name`; auto takes cuda, then mps, then cpu."""
    if name != "auto":
        return name
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
