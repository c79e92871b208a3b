"""The gradient of a step that several ranks computed, as one process would have added it.

Addition of floating-point numbers depends on its order, and one process adds the gradients of
streams one by one, in their order. So do ranks, each for a part of the numbers: of each round of
streams, one a rank, rank r is sent the r-th part of every stream's gradient, and adds them to what
it has in the streams' order. At the end all parts go to all ranks. A step with no more streams than
ranks sends what a sum in any order would (a ring all-reduce sends as much); each further round
sends half of that again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from smoldpo.utils.distributed import Ranks

BUCKET_BYTES = 32 << 20
"""So much is sent at once, and held twice; a larger parameter is cut."""


class GradientSum:
    """Adds the gradients that ranks have in their parameters.

    Args:
        parameters: what trains, in the same order on all ranks.
    """

    def __init__(self, ranks: Ranks, parameters: Iterable[torch.nn.Parameter]):
        self._ranks, self._parameters = ranks, list(parameters)
        self._buckets = list(_buckets(self._parameters))
        self._sums: list[torch.Tensor | None] = [None] * len(self._buckets)
        self._present = [False] * len(self._parameters)
        self._storage: list[torch.Tensor | None] = [None] * len(self._parameters)

    def add_round(self, streams: int) -> None:
        """Add the gradients of a round, of one stream on each of the first `streams` ranks.

        The parameters are left without gradients.
        """
        sender = self._ranks.rank < streams
        for number, bucket in enumerate(self._buckets):
            part = -(-bucket.numbers // self._ranks.size)
            flat = bucket.flat(part * self._ranks.size) if sender else bucket.empty(0)
            received = bucket.empty(streams * part)
            self._send(received, flat, part, streams, sender)
            for gradient in received.view(streams, part):
                sums = self._sums[number]
                self._sums[number] = gradient.clone() if sums is None else sums.add_(gradient)
        self._take_gradients()

    def _send(
        self, received: torch.Tensor, flat: torch.Tensor, part: int, streams: int, sender: bool
    ) -> None:
        size = self._ranks.size
        from_each = [part] * streams + [0] * (size - streams)
        self._ranks.send_parts(received, flat, from_each, [part * sender] * size)

    def finish(self) -> None:
        """The parameters' gradients become the sums; None where no stream had any."""
        self._give_storage()
        sums = [each for each in self._sums if each is not None]
        for bucket, part in zip(self._buckets, sums, strict=True):
            bucket.fill(torch.cat(self._ranks.gather(part)))

    def add_unordered(self) -> None:
        """The parameters' gradients become their sums over the ranks, added in any order."""
        sums = [bucket.flat(bucket.numbers) for bucket in self._buckets]
        self._take_gradients()
        self._give_storage()
        for bucket, flat in zip(self._buckets, sums, strict=True):
            self._ranks.add(flat)
            bucket.fill(flat)

    def _take_gradients(self) -> None:
        for number, parameter in enumerate(self._parameters):
            if parameter.grad is not None:
                self._present[number], self._storage[number] = True, parameter.grad
            parameter.grad = None

    def _give_storage(self) -> None:
        """Memory for the sums, where any rank has a gradient: that of this rank's own."""
        counts = self._parameters[0].new_tensor(self._present)
        self._ranks.add(counts)
        for number, parameter in enumerate(self._parameters):
            if counts[number] > 0:
                own = self._storage[number]
                parameter.grad = torch.empty_like(parameter) if own is None else own


class _Bucket:
    """Some slices of parameters, one after another: (parameter's number, first, end) of each."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter]):
        self._parameters = parameters
        self.slices: list[tuple[int, int, int]] = []
        self.numbers = 0

    def add(self, number: int, start: int, stop: int) -> None:
        self.slices.append((number, start, stop))
        self.numbers += stop - start

    def empty(self, numbers: int) -> torch.Tensor:
        return self._parameters[self.slices[0][0]].new_empty(numbers)

    def flat(self, padded: int) -> torch.Tensor:
        """The gradients; 0 where there is none, and behind the last."""
        found = self.empty(padded).zero_()
        at = 0
        for number, start, stop in self.slices:
            gradient = self._parameters[number].grad
            if gradient is not None:
                found[at : at + stop - start] = gradient.reshape(-1)[start:stop]
            at += stop - start
        return found

    def fill(self, sums: torch.Tensor) -> None:
        """The gradients that are there become the sums."""
        at = 0
        for number, start, stop in self.slices:
            gradient = self._parameters[number].grad
            if gradient is not None:
                gradient.view(-1)[start:stop] = sums[at : at + stop - start]
            at += stop - start


def _buckets(parameters: Sequence[torch.nn.Parameter]) -> Iterator[_Bucket]:
    """All numbers of all parameters in their order; no bucket holds two dtypes."""
    bucket, dtype = _Bucket(parameters), None
    for number, parameter in enumerate(parameters):
        most = BUCKET_BYTES // parameter.element_size()
        start = 0
        while start < parameter.numel():
            if bucket.numbers == most or (bucket.numbers and parameter.dtype != dtype):
                yield bucket
                bucket = _Bucket(parameters)
            dtype = parameter.dtype
            stop = min(parameter.numel(), start + most - bucket.numbers)
            bucket.add(number, start, stop)
            start = stop
    if bucket.numbers:
        yield bucket
