"""Which device a run computes on."""

from __future__ import annotations

import torch

from smoldpo.utils.errors import UsageError


def pick_device(name: str) -> str:
    """The device for `name`; auto takes cuda, then mps, then cpu.

    Raises:
        UsageError: the device asked for is not there.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return next(device for device, is_there in available.items() if is_there)
    if not available[name]:
        raise UsageError(f"device {name}: this machine, or this build of torch, has none")
    return name
