"""Tensors of which each rank keeps a share (torch's DTensor); all others are left as they are."""

from __future__ import annotations

from typing import Any

import torch

from smoldpo.utils.distributed import world


def is_shared_out(tensor: torch.Tensor) -> bool:
    """Whether this process has a share of the tensor alone."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> torch.Tensor:
    """The tensor with all ranks' shares; all ranks call this, in the same order."""
    found: torch.Tensor = tensor.full_tensor() if is_shared_out(tensor) else tensor
    return found


def kept_by_first(tensor: torch.Tensor) -> torch.Tensor:
    """`whole` on the first rank; on the others one that is shared out is empty."""
    if not is_shared_out(tensor):
        return tensor.detach()
    found = whole(tensor.detach())
    return found if world().first else found.new_empty(0)


def own(tensor: Any) -> torch.Tensor:
    """This rank's share."""
    found: torch.Tensor = tensor.to_local() if is_shared_out(tensor) else tensor
    return found


def shared_out(tensor: torch.Tensor, like: Any) -> torch.Tensor:
    """A tensor that is whole on all ranks, shared out as `like` is; all ranks call this."""
    if not is_shared_out(like) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
