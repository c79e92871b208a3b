"""The gradient of one optimizer step's loss, from its streams: both engines use this.

A loss that is a sum over pairs is differentiated stream by stream, in one pass. Any other (sorted
against sorted) takes two, and is exact too, by the chain rule through the log-probabilities ℓ of
the step's pairs, dL/dθ = Σ dL/dℓ · dℓ/dθ: first all ℓ without gradients, from which dL/dℓ follows,
a number a pair and sum; then stream by stream the gradient of Σ dL/dℓ · ℓ with dL/dℓ held fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any, TypeVar

import torch

from smoldpo.engine.base import LossFunction, StepResult, join, naming
from smoldpo.engine.batching import Batch
from smoldpo.types import Advance, PairLogps
from smoldpo.utils.workers import Workers

LogpsOf = Callable[[int, Batch], PairLogps]
"""Log-probabilities of a stream's pairs, computed by the worker of this number."""
Result = TypeVar("Result")


def _no_order(*_: Any) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(frozen=True)
class StepStreams:
    """The streams of one optimizer step, and how each is computed.

    Attributes:
        batches: the pairs of each stream.
        policy_of: with a graph where gradients are on.
        reference_of: not called where the loss compares with no reference.
        order: called with a worker and a stream's number; in the context the worker's gradients are
            that stream's.
        abandon: see Workers.run.
    """

    batches: Sequence[Batch]
    policy_of: LogpsOf
    reference_of: LogpsOf
    workers: Workers = field(default_factory=partial(Workers, 1))
    order: Callable[[int, int], AbstractContextManager[None]] = _no_order
    abandon: Callable[[], None] = lambda: None

    @property
    def pairs(self) -> list[Any]:
        """All pairs of the step."""
        return [pair for batch in self.batches for pair in batch]

    def compute(self, work: Callable[[int, int, Batch], Result], advance: Advance) -> list[Result]:
        """`work` of each stream: called with a worker, the stream's number and its pairs."""

        def named(worker: int, item: tuple[int, Batch]) -> Result:
            with naming(item[1]):
                return work(worker, *item)

        return self.workers.run(
            named,
            list(enumerate(self.batches)),
            lambda item, _: advance(len(item[1])),
            self.abandon,
        )


def accumulate_step(streams: StepStreams, loss: LossFunction, advance: Advance) -> StepResult:
    """Add the gradient of the mean loss over all pairs of the step to the parameters."""
    if loss.whole_step and len(streams.batches) > 1:
        return _two_passes(streams, loss, advance)
    step = streams.pairs

    def work(
        worker: int, number: int, batch: Batch
    ) -> tuple[torch.Tensor, PairLogps, PairLogps | None]:
        reference = streams.reference_of(worker, batch) if loss.needs_reference else None
        with streams.order(worker, number):
            policy = streams.policy_of(worker, batch)
            each = loss(policy, reference, batch, step)
            # Divided by the pairs of the whole step: however it is cut, the gradient is the same.
            torch.autograd.backward(each.sum() / len(step))
        return each.detach(), policy.map(torch.Tensor.detach), reference

    losses, policies, references = zip(*streams.compute(work, advance), strict=True)
    return StepResult(torch.cat(losses), join(policies), _joined(references))


def _two_passes(streams: StepStreams, loss: LossFunction, advance: Advance) -> StepResult:
    step = streams.pairs

    @torch.no_grad()
    def both(worker: int, _: int, batch: Batch) -> tuple[PairLogps, PairLogps | None]:
        reference = streams.reference_of(worker, batch) if loss.needs_reference else None
        return streams.policy_of(worker, batch), reference

    policies, references = zip(*streams.compute(both, lambda _: None), strict=True)
    policy, reference = join(policies), _joined(references)
    sums = [each.requires_grad_() for each in policy.sums.values()]
    losses = loss(policy, reference, step, step)
    grads = torch.autograd.grad(losses.sum() / len(step), sums, materialize_grads=True)
    starts = [0, *accumulate(map(len, streams.batches))]

    def work(worker: int, number: int, batch: Batch) -> None:
        here = slice(starts[number], starts[number + 1])
        with streams.order(worker, number):
            found = list(streams.policy_of(worker, batch).sums.values())
            torch.autograd.backward(found, [grad[here] for grad in grads])

    streams.compute(work, advance)
    return StepResult(losses.detach(), policy.map(torch.Tensor.detach), reference)


def _joined(references: Sequence[PairLogps | None]) -> PairLogps | None:
    known = [reference for reference in references if reference is not None]
    return join(known) if known else None
