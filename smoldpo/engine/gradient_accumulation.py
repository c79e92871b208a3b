"""The gradient of one optimizer step's loss, from micro-batches: both engines go through here.

A loss that is a sum over pairs is differentiated micro-batch by micro-batch, in one pass. One that is not
(sorted against sorted) takes two, and is exact all the same, by the chain rule through the log-probabilities
ℓ of the step's pairs, dL/dθ = Σ dL/dℓ · dℓ/dθ: first all ℓ without gradients, from which dL/dℓ follows, a
number a pair and sum; then micro-batch by micro-batch the gradient of Σ dL/dℓ · ℓ, dL/dℓ held fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from smoldpo.engine.base import LossFunction, StepResult, join
from smoldpo.types import Advance, PairLogps, TokenizedPair

Batch = Sequence[TokenizedPair]
LogpsOf = Callable[[Batch], PairLogps]


def accumulate_step(
    batches: Sequence[Batch],
    policy_of: LogpsOf,
    reference_of: LogpsOf,
    loss: LossFunction,
    advance: Advance,
) -> StepResult:
    """Add the gradient of the mean loss over all pairs of `batches` to the parameters.

    Args:
        policy_of: log-probabilities of a micro-batch, with a graph where gradients are on.
        reference_of: not called where the loss compares with no reference.
    """
    step = [pair for batch in batches for pair in batch]
    references = [reference_of(batch) if loss.needs_reference else None for batch in batches]
    # Divided by the pairs of the whole step: however the step is cut, the gradient is the same.
    if loss.whole_step and len(batches) > 1:
        return _two_passes(batches, step, policy_of, references, loss, advance)
    losses, policies = [], []
    for batch, reference in zip(batches, references, strict=True):
        policy = policy_of(batch)
        each = loss(policy, reference, batch, step)
        (each.sum() / len(step)).backward()
        losses.append(each.detach())
        policies.append(policy.map(torch.Tensor.detach))
        advance(len(batch))
    return StepResult(torch.cat(losses), join(policies), _join_known(references))


def _two_passes(
    batches: Sequence[Batch],
    step: Batch,
    policy_of: LogpsOf,
    references: Sequence[PairLogps | None],
    loss: LossFunction,
    advance: Advance,
) -> StepResult:
    with torch.no_grad():
        policy = join([policy_of(batch) for batch in batches])
    reference = _join_known(references)
    sums = [each.requires_grad_() for each in policy.sums.values()]
    losses = loss(policy, reference, step, step)
    slopes = torch.autograd.grad(losses.sum() / len(step), sums, materialize_grads=True)
    done = 0
    for batch in batches:
        again = policy_of(batch).sums.values()
        parts = [each[done : done + len(batch)] for each in slopes]
        sum(slope @ each for slope, each in zip(parts, again, strict=True)).backward()
        done += len(batch)
        advance(len(batch))
    return StepResult(losses.detach(), policy.map(torch.Tensor.detach), reference)


def _join_known(parts: Sequence[PairLogps | None]) -> PairLogps | None:
    known = [part for part in parts if part is not None]
    return join(known) if known else None
