"""The LM head on scored positions only: token log-probabilities without a logits tensor.

For a state h with target y and head W (V words x D), with p = softmax(W h):

    log p(y)       = (W h)_y - logsumexp(W h)
    d log p(y)/dh  = W_y - pᵀ W
    d log p(y)/dW  = (e_y - p) hᵀ

pᵀW is what attention computes for the query h when the head's rows are keys and values both. So
torch's fused attention kernel gives pᵀW and logsumexp together, with logits in float32 that never
leave the processor's cache. It is called for some thousand words at a time, whose packed copies
stay in the cache too, and the parts are put together by their logsumexp: p of all words is p of a
part times the part's share. Where there is no such kernel, or it is slow (`fused=False`), chunks of
rows go through plain products, and the same two results come out.

Where log Σ p² is asked for as well (`squares`, for losses that weigh pairs by it), it is taken from
the chunks of plain products, which hold p: the fused kernel never shows it, and asking it twice
would be a second product.

A frozen head needs nothing more: its backward scales the direction W_y - pᵀW by the incoming
gradient. A head that trains also gives dW, for a few thousand words at a time, each word's row
written once.

Dimensions: N scored positions, D model width, V words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from smoldpo.engine.kernels.native.library import Library

CHUNK = 128
"""Rows at a time without the fused kernel: [128, 49152] in float32 is 25 MB."""
FILL = 64
"""Rows are padded to a multiple of this, for few shapes (kernels/attention.py)."""
VOCAB_SLICE = 4096
"""Words of the vocabulary at a time in the fused kernel and for dW."""
FAR = -80.0
"""Nats: the native kernel knows log-probabilities above this."""

_fused_kernel: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def completion_logps(
    states: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    fused: bool = False,
    native: Library | None = None,
) -> torch.Tensor:
    """log p(target) of each row: [N], float32 or wider.

    Args:
        states: [N, D], after the final norm, at the positions that predict.
        weight: [V, D], the LM head.
        targets: [N] token ids.
        fused: take torch's fused attention kernel (CPU alone; see engine/autotune.py for when).
        native: take this library's kernel; see head_fits.
    """
    return completion_scores(states, weight, targets, fused, native=native)[0]


def completion_scores(
    states: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    fused: bool = False,
    squares: bool = False,
    native: Library | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`completion_logps` and log Σ_v p(v)² of each row, [N]; None unless `squares`.

    With `squares` all comes from plain products, whatever `fused` and `native` say.
    """
    filling = -len(states) % FILL
    states, targets = F.pad(states, (0, 0, 0, filling)), F.pad(targets, (0, filling))
    fused, native = fused and not squares, None if squares else native
    logps, sums = _Head.apply(states, weight, targets, fused, squares, native)
    rows = len(logps) - filling
    return logps[:rows], None if sums is None else sums[:rows]


@dataclass(frozen=True)
class _Scored:
    """What a pass over all words gives for each row, in float32 or wider."""

    logps: torch.Tensor  # [N] log p(target)
    total: torch.Tensor  # [N] logsumexp of the logits
    mean: torch.Tensor | None  # [N, D] pᵀW, where it is wanted
    squares: torch.Tensor | None = None  # [N] log Σ p², where it is wanted
    direction: torch.Tensor | None = None  # [N, D] W_y - pᵀW, where it comes without the mean


def _by_native(
    native: Library, states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, wants: bool
) -> _Scored:
    """By kernels/native/source/head.cpp, all relative to the target's logit.

    Where log p is below FAR that overflows; such rows go through plain products.
    """
    logps, logits = (states.new_empty(len(states), dtype=torch.float32) for _ in range(2))
    direction = torch.empty_like(states) if wants else None
    arguments = (states.contiguous(), weight, targets, logps, logits, direction)
    native.call("head_forward", *arguments, *states.shape, len(weight))
    far = (logps < FAR).nonzero()[:, 0]
    if len(far):
        again = _by_products(states[far], weight, targets[far], wants, False)
        logps[far] = again.logps
        logits[far] = again.logps + again.total
        if direction is not None and again.mean is not None:
            target_rows = weight[targets[far]].to(again.mean.dtype)
            direction[far] = (target_rows - again.mean).to(direction.dtype)
    return _Scored(logps, logits - logps, None, None, direction)


def head_fits(weight: torch.Tensor) -> bool:
    """Whether the native kernel takes this head: any number of words, of a width by 32."""
    return (
        weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and weight.is_contiguous()
        and weight.shape[1] % 32 == 0
    )


def _by_fused_kernel(
    states: torch.Tensor, weight: torch.Tensor, target_rows: torch.Tensor
) -> _Scored:
    """In slices of the vocabulary, logits in float32 throughout; `target_rows` [N, D] is W_y."""
    query = states[None, None]
    mean: Any = None
    total: Any = None
    for vocab_slice in weight.split(VOCAB_SLICE):
        key = vocab_slice[None, None]
        outputs = _fused_kernel(query, key, key, 0.0, False, scale=1.0)
        slice_mean, slice_total = (output[0, 0] for output in outputs)
        slice_mean = slice_mean.to(slice_total.dtype)
        if total is None:
            mean, total = slice_mean, slice_total
            continue
        both = torch.logaddexp(total, slice_total)
        mean.mul_((total - both).exp_()[:, None])
        mean.addcmul_(slice_mean, (slice_total - both).exp_()[:, None])
        total = both
    logits = torch.linalg.vecdot(states.to(total.dtype), target_rows.to(total.dtype))
    return _Scored(logits - total, total, mean)


def _by_products(
    states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, mean: bool, squares: bool
) -> _Scored:
    """In chunks of rows; logits are rounded to the dtype of the product, for all words alike."""
    rows = zip(states.split(CHUNK), targets.split(CHUNK), strict=True)
    parts = [_chunk(chunk, weight, theirs, mean, squares) for chunk, theirs in rows]
    return _Scored(
        torch.cat([part.logps for part in parts]),
        torch.cat([part.total for part in parts]),
        torch.cat([p.mean for p in parts if p.mean is not None]) if mean else None,
        torch.cat([p.squares for p in parts if p.squares is not None]) if squares else None,
    )


def _chunk(
    states: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    wants_mean: bool,
    squares: bool,
) -> _Scored:
    rows = len(states)
    if rows < CHUNK and states.device.type == "cpu":
        # The same shape for every chunk, so that a row's result depends on that row alone
        # (layers.py).
        states = F.pad(states, (0, 0, 0, CHUNK - rows))
    logits = (states @ weight.T)[:rows]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    probs = torch.softmax(logits, dim=-1, dtype=dtype)
    # logit - log p is the same for every word; log p of the likeliest is near 0, so this loses
    # nothing.
    best, where = probs.max(-1)
    total = logits.gather(1, where[:, None]).squeeze(1).to(dtype) - best.log()
    logps = logits.gather(1, targets[:, None]).squeeze(1).to(dtype) - total
    mean = None
    if wants_mean:
        factors = probs.to(weight.dtype)
        if states.device.type == "cpu":
            factors = F.pad(factors, (0, 0, 0, len(states) - rows))
        mean = (factors @ weight)[:rows].to(dtype)
    return _Scored(logps, total, mean, torch.linalg.vecdot(probs, probs).log() if squares else None)


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        fused: bool,
        squares: bool,
        native: Library | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        target_rows = weight[targets]  # [N, D]
        if native is not None and states.dtype == weight.dtype and head_fits(weight):
            scored = _by_native(native, states, weight, targets, ctx.needs_input_grad[0])
        elif fused and states.device.type == "cpu" and _fused_kernel is not None:
            scored = _by_fused_kernel(states, weight, target_rows)  # gives the mean, too
        else:
            scored = _by_products(states, weight, targets, ctx.needs_input_grad[0], squares)
        saved = []
        if scored.direction is not None:
            saved = [scored.direction]
        if scored.mean is not None:
            saved = [(target_rows.to(scored.mean.dtype) - scored.mean).to(states.dtype)]
        ctx.has_direction = bool(saved)
        if ctx.needs_input_grad[1]:
            saved += [states, weight, targets, scored.total, scored.logps]
        ctx.save_for_backward(*saved)
        if scored.squares is not None:
            ctx.mark_non_differentiable(scored.squares)
        return scored.logps, scored.squares

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        d_states = d_weight = None
        if ctx.has_direction:
            direction = saved.pop(0)
            d_states = direction * grad[:, None].to(direction.dtype)
        if ctx.needs_input_grad[1]:
            d_weight = _weight_gradient(grad, *saved)
        return d_states, d_weight, None, None, None, None


def _weight_gradient(
    grad: torch.Tensor,
    states: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    total: torch.Tensor,
    logps: torch.Tensor,
) -> torch.Tensor:
    """Sum over rows of grad (e_y - p) hᵀ: [V, D].

    The target's own share, 1 - p(y), comes from its log-probability: logits recomputed in a
    narrow dtype are too coarse for it where p(y) is near 1.
    """
    d_weight = torch.empty_like(weight)
    for start in range(0, len(weight), VOCAB_SLICE):
        vocab_slice = slice(start, min(start + VOCAB_SLICE, len(weight)))
        logits = (states @ weight[vocab_slice].T).to(total.dtype)
        probs = logits.sub_(total[:, None]).exp_().mul_(grad[:, None])
        rows = ((targets >= start) & (targets < vocab_slice.stop)).nonzero().squeeze(1)
        probs[rows, targets[rows] - start] = 0
        torch.mm(probs.to(weight.dtype).T, states, out=d_weight[vocab_slice])
    share = grad * -torch.expm1(logps)
    target_grads = (states.to(total.dtype) * share[:, None]).to(weight.dtype)
    return d_weight.neg_().index_add_(0, targets, target_grads)
