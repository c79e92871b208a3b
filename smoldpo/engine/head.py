"""The LM head on scored positions only: token log-probabilities without a logits tensor.

For a state h with target y and head W (V words x D), with p = softmax(W h):

    log p(y)       = (W h)_y - logsumexp(W h)
    d log p(y)/dh  = W_y - pᵀ W
    d log p(y)/dW  = (e_y - p) hᵀ

so a chunk of rows needs its probabilities for an instant, and never again if the head is frozen: the
direction W_y - pᵀW is found in the forward pass and scaled by the incoming gradient in the backward one.
A head that trains needs the incoming gradient to form dW, so its chunks are computed anew in backward.
"""

from __future__ import annotations

from typing import Any

import torch

CHUNK = 128
"""Rows at a time: [128, 49152] in float32 is 25 MB."""
FLOOR = 1e-30
"""Below this a probability is near float32's end, and its logarithm is taken from the logits."""


def completion_logps(
    states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """log p(target) of each row: [N], float32 or wider.

    Args:
        states: [N, D], after the final norm, at the positions that predict.
        weight: [V, D], the LM head.
        targets: [N] token ids.
    """
    if weight.requires_grad and torch.is_grad_enabled():
        return _TrainableHead.apply(states, weight, targets)
    return _FrozenHead.apply(states, weight, targets)


def _chunk(
    states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the targets [n] and all probabilities [n, V], float32 or wider."""
    logits = states @ weight.T
    wide = torch.promote_types(logits.dtype, torch.float32)
    probs = torch.softmax(logits, dim=-1, dtype=wide)
    picked = probs.gather(1, targets[:, None]).squeeze(1)
    logps = picked.log()
    rare = picked < FLOOR
    if rare.any():
        unlikely = logits[rare].to(wide)
        exact = torch.log_softmax(unlikely, dim=-1).gather(1, targets[rare][:, None])
        logps[rare] = exact.squeeze(1)
    return logps, probs


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        wanted = ctx.needs_input_grad[0]
        logps, directions = [], []
        for rows in torch.arange(len(targets), device=targets.device).split(CHUNK):
            span = slice(int(rows[0]), int(rows[-1]) + 1)
            found, probs = _chunk(states[span], weight, targets[span])
            logps.append(found)
            if wanted:
                directions.append(weight[targets[span]] - probs.to(weight.dtype) @ weight)
        if wanted:
            ctx.save_for_backward(torch.cat(directions))
        return torch.cat(logps)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (directions,) = ctx.saved_tensors
        return directions * grad[:, None].to(directions.dtype), None, None


class _TrainableHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(states, weight, targets)
        parts = zip(states.split(CHUNK), targets.split(CHUNK), strict=True)
        return torch.cat([_chunk(some, weight, wanted)[0] for some, wanted in parts])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, None]:
        states, weight, targets = ctx.saved_tensors
        wide = torch.promote_types(weight.dtype, torch.float32)
        d_weight = torch.zeros_like(weight, dtype=wide)
        d_states = []
        parts = zip(states.split(CHUNK), targets.split(CHUNK), grad.split(CHUNK), strict=True)
        for some, wanted, slope in parts:
            _, probs = _chunk(some, weight, wanted)
            d_logits = probs.mul_(-slope[:, None])  # slope (e_y - p)
            d_logits.scatter_add_(1, wanted[:, None], slope[:, None])
            d_logits = d_logits.to(weight.dtype)
            d_states.append(d_logits @ weight)
            d_weight += d_logits.T @ some
        return torch.cat(d_states), d_weight.to(weight.dtype), None
