"""Who sees whom in a stream of pairs."""

from __future__ import annotations

import torch


def shared_prefix_mask(
    prompt: int, chosen: int, rejected: int, window: int | None = None
) -> torch.Tensor:
    """[n, n] booleans: True where the query (row) sees the key (column), n = prompt + chosen + rejected.

    `window`: a query sees the keys less than this many positions before it (sliding attention).
    """
    length = prompt + chosen + rejected
    order = torch.arange(length)
    is_rejected = order >= prompt + chosen
    is_chosen = (order >= prompt) & ~is_rejected
    visible = order[:, None] >= order[None, :]
    visible &= ~(is_rejected[:, None] & is_chosen[None, :])
    if window is not None:
        position = torch.where(is_rejected, order - chosen, order)
        visible &= position[:, None] - position[None, :] < window
    return visible
