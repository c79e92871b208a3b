"""The gradient of one optimizer step's loss, from its streams: both engines use this.

A loss that is a sum over pairs is differentiated stream by stream, in one pass. Any other (sorted
against sorted) takes two, and is exact too, by the chain rule through the log-probabilities ℓ of
the step's pairs, dL/dθ = Σ dL/dℓ · dℓ/dθ: first all ℓ without gradients, from which dL/dℓ follows,
a number a pair and sum; then stream by stream the gradient of Σ dL/dℓ · ℓ with dL/dℓ held fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any, TypeVar

import torch

from smoldpo.engine.base import LossFunction, StepResult, join, naming
from smoldpo.engine.batching import Batch
from smoldpo.engine.dealing import deal
from smoldpo.engine.gradient_sum import GradientSum
from smoldpo.types import Advance, PairLogps
from smoldpo.utils.distributed import ALONE, Ranks
from smoldpo.utils.workers import Workers

LogpsOf = Callable[[int, Batch], PairLogps]
"""Log-probabilities of a stream's pairs, computed by the worker of this number."""
Result = TypeVar("Result")


def _nothing(*_: Any) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(frozen=True)
class StepStreams:
    """The streams of one optimizer step, and how each is computed.

    Attributes:
        batches: the pairs of each stream.
        policy_of: with a graph where gradients are on.
        reference_of: not called where the loss compares with no reference.
        parameters: what trains.
        order: called with a worker and the place of a stream among those that are added up here;
            in the context the worker's gradients are that stream's.
        accumulating: in the context gradients of streams are added up; after it they are the
            parameters'.
        abandon: see Workers.run.
        ranks: those that compute the step together.
        ordered_sum: ranks add the streams' gradients in the streams' order (gradient_sum.py).
        sharded: backward passes add up gradients over the ranks themselves, which need each other
            for each stream (sharding.py).
        device: where the models are.
    """

    batches: Sequence[Batch]
    policy_of: LogpsOf
    reference_of: LogpsOf
    parameters: Iterable[torch.nn.Parameter] = ()
    workers: Workers = field(default_factory=partial(Workers, 1))
    order: Callable[[int, int], AbstractContextManager[None]] = _nothing
    accumulating: Callable[[], AbstractContextManager[None]] = _nothing
    abandon: Callable[[], None] = lambda: None
    ranks: Ranks = ALONE
    ordered_sum: bool = True
    sharded: bool = False
    device: torch.device | str = "cpu"

    @property
    def pairs(self) -> list[Any]:
        """All pairs of the step."""
        return [pair for batch in self.batches for pair in batch]

    def logps(self, work: Callable[[int, Batch], Result]) -> list[Result]:
        """`work`, without gradients, of each stream: called with a worker and its pairs."""

        def named(worker: int, batch: Batch) -> Result:
            with naming(batch):
                return work(worker, batch)

        return deal(
            self.ranks,
            self.workers,
            named,
            self.batches,
            abandon=self.abandon,
            device=self.device,
            idle=(lambda: work(0, self.batches[0])) if self.sharded else None,
        )

    def gradients(
        self, work: Callable[[int, int, float], Result], advance: Advance
    ) -> list[Result]:
        """`work` of each stream, called with a worker, the stream's number, and 1; the gradients
        that it computes, added in the streams' order, become the parameters'.

        In place of 1 stands 0 where what it computes must not count.
        """
        if self.ranks.size == 1 or self.sharded:
            return self._gradients(work, advance, range(len(self.batches)))
        total = GradientSum(self.ranks, self.parameters)
        if not self.ordered_sum:
            found = self._gradients(work, advance, range(len(self.batches)))
            total.add_unordered()
            return found
        found = []
        for start in range(0, len(self.batches), self.ranks.size):
            streams = range(start, min(start + self.ranks.size, len(self.batches)))
            found += self._gradients(work, advance, streams)
            total.add_round(len(streams))
        total.finish()
        return found

    def _gradients(
        self, work: Callable[[int, int, float], Result], advance: Advance, streams: range
    ) -> list[Result]:
        """Of some streams; the parameters' gradients are those of this rank's streams."""

        def named(worker: int, place: int) -> Result:
            number = streams[place]
            # A rank adds up its own streams alone: those at every so many places.
            with naming(self.batches[number]), self.order(worker, place // self.ranks.size):
                return work(worker, number, 1.0)

        with self.accumulating():
            return deal(
                self.ranks,
                self.workers,
                named,
                range(len(streams)),
                lambda place: advance(len(self.batches[streams[place]])),
                self.abandon,
                self.device,
                (lambda: work(0, 0, 0.0)) if self.sharded else None,
            )


def accumulate_step(streams: StepStreams, loss: LossFunction, advance: Advance) -> StepResult:
    """Add the gradient of the mean loss over all pairs of the step to the parameters."""
    if loss.whole_step and len(streams.batches) > 1:
        return _two_passes(streams, loss, advance)
    step = streams.pairs

    def work(
        worker: int, number: int, share: float
    ) -> tuple[torch.Tensor, PairLogps, PairLogps | None]:
        batch = streams.batches[number]
        reference = streams.reference_of(worker, batch) if loss.needs_reference else None
        policy = streams.policy_of(worker, batch)
        each = loss(policy, reference, batch, step)
        # Divided by the pairs of the whole step: however it is cut, the gradient is the same.
        torch.autograd.backward(share * (each.sum() / len(step)))
        return each.detach(), policy.map(torch.Tensor.detach), reference

    losses, policies, references = zip(*streams.gradients(work, advance), strict=True)
    return StepResult(torch.cat(losses), join(policies), _joined(references))


def _two_passes(streams: StepStreams, loss: LossFunction, advance: Advance) -> StepResult:
    step = streams.pairs

    @torch.no_grad()
    def both(worker: int, batch: Batch) -> tuple[PairLogps, PairLogps | None]:
        reference = streams.reference_of(worker, batch) if loss.needs_reference else None
        return streams.policy_of(worker, batch), reference

    policies, references = zip(*streams.logps(both), strict=True)
    policy, reference = join(policies), _joined(references)
    sums = [each.requires_grad_() for each in policy.sums.values()]
    losses = loss(policy, reference, step, step)
    grads = torch.autograd.grad(losses.sum() / len(step), sums, materialize_grads=True)
    starts = [0, *accumulate(map(len, streams.batches))]

    def work(worker: int, number: int, share: float) -> None:
        here = slice(starts[number], starts[number + 1])
        found = list(streams.policy_of(worker, streams.batches[number]).sums.values())
        torch.autograd.backward(found, [share * grad[here] for grad in grads])

    streams.gradients(work, advance)
    return StepResult(losses.detach(), policy.map(torch.Tensor.detach), reference)


def _joined(references: Sequence[PairLogps | None]) -> PairLogps | None:
    known = [reference for reference in references if reference is not None]
    return join(known) if known else None
