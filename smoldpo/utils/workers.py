"""Workers: threads that compute one stream each, whole, from its first row to its gradients.

A worker's operations are not spread over further threads, so no stream waits for another, and what
another process takes of the machine costs no more than its share. A stream's numbers do not depend
on which worker computes it, or on how many there are.

Threads, and not processes: torch releases the interpreter's lock in each operation, and threads
share weights, stored states and gradients as they are (docs/decisions.md has both measured).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, Generic, TypeVar

import torch

from smoldpo.utils.threads import torch_threads

Item = TypeVar("Item")
Result = TypeVar("Result")


class AbandonedError(RuntimeError):
    """A stream was given up because another failed, or because the caller stopped."""


def shares(sizes: Sequence[float], workers: int) -> list[list[int]]:
    """Which items each worker computes, as indices, where the next goes to the one that is free.

    List scheduling (Graham 1969, "Bounds on multiprocessing timing anomalies").

    Args:
        sizes: what each item costs, in any unit.
    """
    found: list[list[int]] = [[] for _ in range(workers)]
    busy = [0.0] * workers
    for index, size in enumerate(sizes):
        free = busy.index(min(busy))
        found[free].append(index)
        busy[free] += size
    return found


def _ignore(*_: Any) -> None:
    pass


class Workers:
    """A pool of threads, which lives as long as this object.

    Args:
        count: how many items are computed at once; 1 computes in the calling thread. By default as
            many as torch would spread an operation over now.
        threads: over so many each operation is spread, for an engine that computes batch by batch.
    """

    def __init__(self, count: int | None = None, threads: int = 1):
        self.count = torch.get_num_threads() if count is None else count
        self.threads = threads
        self._pool: ThreadPoolExecutor | None = None

    def lower(self, count: int) -> None:
        """Compute no more than so many at once; threads that are left over end."""
        if count < self.count:
            self.count, pool, self._pool = count, self._pool, None
            if pool is not None:
                pool.shutdown()

    def run(
        self,
        work: Callable[[int, Item], Result],
        items: Sequence[Item],
        finished: Callable[[Item, Result], None] = _ignore,
        abandon: Callable[[], None] = _ignore,
    ) -> list[Result]:
        """What `work` gives for each item, in the items' order.

        Items are begun in their order. Whether gradients are on is as in the calling thread.

        Args:
            work: called with the number of a worker, from 0, and an item. No two calls at once have
                the same number.
            finished: called by the calling thread, in the items' order. Where it raises, nothing
                more is begun, and the error goes on when what was begun has ended.
            abandon: called where work failed or the caller stopped, so that work which waits for
                other work ends (with an AbandonedError).

        Raises:
            Exception: that of the first item that failed.
        """
        count = min(self.count, len(items))
        if count <= 1:
            return self._in_this_thread(work, items, finished)
        return _Batch(work, items, torch.is_grad_enabled()).run(
            self._threads(), count, finished, abandon
        )

    def _in_this_thread(
        self,
        work: Callable[[int, Item], Result],
        items: Sequence[Item],
        finished: Callable[[Item, Result], None],
    ) -> list[Result]:
        found = []
        with torch_threads(self.threads):
            for item in items:
                found.append(work(0, item))
                finished(item, found[-1])
        return found

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.count, "smoldpo-worker")
        return self._pool


class _Batch(Generic[Item, Result]):
    """Some items, as several threads compute them."""

    def __init__(self, work: Callable[[int, Item], Result], items: Sequence[Item], gradients: bool):
        self._work, self._items, self._gradients = work, items, gradients
        self._changed = threading.Condition()
        self._next = 0
        self._stopped = False
        self._results: dict[int, Result] = {}
        self._errors: dict[int, BaseException] = {}

    def run(
        self,
        pool: ThreadPoolExecutor,
        count: int,
        finished: Callable[[Item, Result], None],
        abandon: Callable[[], None],
    ) -> list[Result]:
        """Begin, follow in order, and wait for the end of all that was begun."""
        self._abandon = abandon
        with torch_threads(1):  # what was set last is what new threads begin with
            threads = [pool.submit(self._work_on, worker) for worker in range(count)]
            try:
                for index, item in enumerate(self._items):
                    if not self._await(index):
                        break
                    finished(item, self._results[index])
            finally:
                self._stop()
                wait(threads)
        causes = {i: e for i, e in self._errors.items() if not isinstance(e, AbandonedError)}
        if causes:
            first = min(causes)
            self._errors.clear()  # their tracebacks hold tensors
            raise causes[first]
        return [self._results[index] for index in range(len(self._items))]

    def _await(self, index: int) -> bool:
        """Wait for a result; False where it failed or will not come."""
        with self._changed:
            self._changed.wait_for(lambda: index in self._results or self._stopped)
            return index in self._results

    def _stop(self) -> None:
        with self._changed:
            done = self._stopped or len(self._results) == len(self._items)
            self._stopped = True
            self._changed.notify_all()
        if not done:
            self._abandon()

    def _begin(self) -> int | None:
        with self._changed:
            if self._stopped or self._next == len(self._items):
                return None
            self._next += 1
            return self._next - 1

    def _work_on(self, worker: int) -> None:
        torch.set_num_threads(1)  # a thread's own setting, which stays as it was when it began
        with torch.set_grad_enabled(self._gradients):
            while (index := self._begin()) is not None:
                try:
                    result = self._work(worker, self._items[index])
                except BaseException as error:
                    self._errors[index] = error
                    self._stop()
                    return
                with self._changed:
                    self._results[index] = result
                    self._changed.notify_all()
