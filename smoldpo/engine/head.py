"""The LM head on scored positions only: token log-probabilities without a logits tensor.

For a state h with target y and head W (V words x D), with p = softmax(W h):

    log p(y)       = (W h)_y - logsumexp(W h)
    d log p(y)/dh  = W_y - pᵀ W
    d log p(y)/dW  = (e_y - p) hᵀ

pᵀW is what attention computes for the query h when the head's rows are keys and values both. So torch's
fused attention kernel gives pᵀW and logsumexp together, with logits in float32 that never leave the
processor's cache. It is called for some thousand words at a time, whose packed copies stay in the cache
too, and the parts are put together by their logsumexp: p of all words is p of a part times the part's share.
Where there is no such kernel, or it is slow (`fused=False`), chunks of rows go through plain products, and
the same two results come out.

A frozen head needs nothing more: its backward scales the direction W_y - pᵀW by the incoming gradient.
A head that trains also gives dW, for a few thousand words at a time, each word's row written once.

Dimensions: N scored positions, D model width, V words.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

CHUNK = 128
"""Rows at a time without the fused kernel: [128, 49152] in float32 is 25 MB."""
FILL = 64
"""Rows are filled up to a multiple of this, for few shapes of products (models/attention.py)."""
WORDS = 4096
"""Words of the head at a time in the fused kernel and for dW."""

_fused_kernel = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def completion_logps(
    states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, fused: bool = False
) -> torch.Tensor:
    """log p(target) of each row: [N], float32 or wider.

    Args:
        states: [N, D], after the final norm, at the positions that predict.
        weight: [V, D], the LM head.
        targets: [N] token ids.
        fused: take torch's fused attention kernel (CPU alone; see engine/kernels.py for when).
    """
    filling = -len(states) % FILL
    states, targets = F.pad(states, (0, 0, 0, filling)), F.pad(targets, (0, filling))
    found = _Head.apply(states, weight, targets, fused)
    return found[: len(found) - filling]


def _expectation(
    states: torch.Tensor, weight: torch.Tensor, fused: bool, wanted: bool
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """pᵀW of each row ([N, D], if wanted) and logsumexp of its logits ([N]), in float32 or wider."""
    if fused and states.device.type == "cpu" and _fused_kernel is not None:
        # Both come at once, wanted or not.
        return _expectation_of_words(states, weight)
    parts = [_expectation_of_chunk(chunk, weight, wanted) for chunk in states.split(CHUNK)]
    means = torch.cat([mean for mean, _ in parts]) if wanted else None
    return means, torch.cat([total for _, total in parts])


def _expectation_of_words(
    states: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    query, mean, total = states[None, None], None, None
    for words in weight.split(WORDS):
        key = words[None, None]
        found, part = (out[0, 0] for out in _fused_kernel(query, key, key, 0.0, False, scale=1.0))
        found = found.to(part.dtype)
        if total is None:
            mean, total = found, part
            continue
        whole = torch.logaddexp(total, part)
        mean.mul_((total - whole).exp_()[:, None])
        mean.addcmul_(found, (part - whole).exp_()[:, None])
        total = whole
    return mean, total


def _expectation_of_chunk(
    states: torch.Tensor, weight: torch.Tensor, wanted: bool
) -> tuple[torch.Tensor | None, torch.Tensor]:
    rows = len(states)
    if rows < CHUNK and states.device.type == "cpu":
        # The same shape for every chunk, so that a row's result depends on that row alone (models/lean.py).
        states = torch.cat([states, states.new_zeros(CHUNK - rows, states.shape[1])])
    logits = states @ weight.T
    wide = torch.promote_types(logits.dtype, torch.float32)
    probs = torch.softmax(logits, dim=-1, dtype=wide)
    # log p of the likeliest word is near 0, so this loses nothing: logit - log p is the same for each.
    best, where = probs.max(-1)
    total = logits.gather(1, where[:, None]).squeeze(1).to(wide) - best.log()
    mean = (probs.to(weight.dtype) @ weight)[:rows] if wanted else None
    return mean, total[:rows]


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, fused: bool
    ) -> torch.Tensor:
        chosen = weight[targets]  # [N, D]
        mean, total = _expectation(states, weight, fused, wanted=ctx.needs_input_grad[0])
        wide = total.dtype
        logps = torch.linalg.vecdot(states.to(wide), chosen.to(wide)) - total
        saved = []
        if mean is not None:
            saved = [(chosen.to(wide) - mean).to(states.dtype)]
        if ctx.needs_input_grad[1]:
            saved += [states, weight, targets, total, logps]
        ctx.save_for_backward(*saved)
        ctx.has_direction = mean is not None
        return logps

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        d_states = d_weight = None
        if ctx.has_direction:
            direction = saved.pop(0)
            d_states = direction * grad[:, None].to(direction.dtype)
        if ctx.needs_input_grad[1]:
            d_weight = _weight_gradient(*saved, grad)
        return d_states, d_weight, None, None


def _weight_gradient(
    states: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    total: torch.Tensor,
    logps: torch.Tensor,
    grad: torch.Tensor,
) -> torch.Tensor:
    """Sum over rows of grad (e_y - p) hᵀ: [V, D].

    The target's own share, 1 - p(y), comes from its log-probability: logits formed anew in a narrow dtype
    are too coarse for it where p(y) is near 1.
    """
    d_weight = torch.empty_like(weight)
    wide = total.dtype
    for start in range(0, len(weight), WORDS):
        words = slice(start, min(start + WORDS, len(weight)))
        logits = (states @ weight[words].T).to(wide)
        probs = logits.sub_(total[:, None]).exp_().mul_(grad[:, None])
        rows = ((targets >= words.start) & (targets < words.stop)).nonzero().squeeze(1)
        probs[rows, targets[rows] - words.start] = 0
        torch.mm(probs.to(weight.dtype).T, states, out=d_weight[words])
    share = grad * -torch.expm1(logps)
    towards = (states.to(wide) * share[:, None]).to(weight.dtype)
    return d_weight.neg_().index_add_(0, targets, towards)
