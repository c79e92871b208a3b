"""The gradient of one optimizer step's loss, from micro-batches: both engines use this.

A loss that is a sum over pairs is differentiated micro-batch by micro-batch, in one pass. Any other
(sorted against sorted) takes two, and is exact too, by the chain rule through the log-probabilities
ℓ of the step's pairs, dL/dθ = Σ dL/dℓ · dℓ/dθ: first all ℓ without gradients, from which dL/dℓ
follows, a number a pair and sum; then micro-batch by micro-batch the gradient of Σ dL/dℓ · ℓ with
dL/dℓ held fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from smoldpo.engine.base import LossFunction, StepResult, join
from smoldpo.engine.batching import Batch
from smoldpo.types import Advance, PairLogps

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
    references = [reference_of(batch) for batch in batches if loss.needs_reference]
    reference = join(references) if references else None
    if loss.whole_step and len(batches) > 1:
        return _two_passes(batches, step, policy_of, reference, loss, advance)
    losses, policies = [], []
    for number, batch in enumerate(batches):
        policy = policy_of(batch)
        each = loss(policy, references[number] if references else None, batch, step)
        # Divided by the pairs of the whole step: however the step is cut, the gradient is the same.
        torch.autograd.backward(each.sum() / len(step))
        losses.append(each.detach())
        policies.append(policy.map(torch.Tensor.detach))
        advance(len(batch))
    return StepResult(torch.cat(losses), join(policies), reference)


def _two_passes(
    batches: Sequence[Batch],
    step: Batch,
    policy_of: LogpsOf,
    reference: PairLogps | None,
    loss: LossFunction,
    advance: Advance,
) -> StepResult:
    with torch.no_grad():
        policy = join([policy_of(batch) for batch in batches])
    sums = [each.requires_grad_() for each in policy.sums.values()]
    losses = loss(policy, reference, step, step)
    grads = torch.autograd.grad(losses.sum() / len(step), sums, materialize_grads=True)
    done = 0
    for batch in batches:
        parts = [grad[done : done + len(batch)] for grad in grads]
        torch.autograd.backward(list(policy_of(batch).sums.values()), parts)
        done += len(batch)
        advance(len(batch))
    return StepResult(losses.detach(), policy.map(torch.Tensor.detach), reference)
