"""Threads that compute items at once: results and errors in order, and nobody waits forever."""

import threading
import time

import pytest
import torch

from smoldpo.utils.threads import torch_threads
from smoldpo.utils.workers import AbandonedError, Workers, shares


def test_results_are_in_the_items_order():
    order = []
    found = Workers(3).run(
        lambda _, item: time.sleep(0.02 * (5 - item)) or item * item, range(5),
        lambda item, result: order.append((item, result)),
    )  # fmt: skip
    assert found == [0, 1, 4, 9, 16] and order == list(zip(range(5), found, strict=True))


def test_each_computes_with_one_thread_and_the_callers_gradients():
    def work(worker, _):
        time.sleep(0.01)
        return worker, torch.get_num_threads(), torch.is_grad_enabled()

    with torch.no_grad(), torch_threads(4):
        found = Workers(2).run(work, range(6))
        assert torch.get_num_threads() == 4
    assert {worker for worker, *_ in found} == {0, 1}
    assert {tuple(rest) for _, *rest in found} == {(1, False)}
    with torch_threads(4):
        assert Workers(1).run(work, range(2)) == [(0, 1, True)] * 2


def test_a_pool_that_is_there_computes_with_one_thread_again():
    """Whatever a library set in one of its threads."""
    workers = Workers(2)
    workers.run(lambda *_: torch.set_num_threads(5), range(2))
    found = workers.run(lambda *_: time.sleep(0.01) or torch.get_num_threads(), range(4))
    assert found == [1] * 4


def test_a_hosts_later_threads_have_the_hosts_number():
    """torch's number of threads is each thread's own; new threads begin with what was set last."""
    found = []
    with torch_threads(3):
        Workers(2).run(lambda *_: time.sleep(0.01), range(4))
        thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert found == [3] and torch.get_num_threads() == 3


def test_the_next_item_goes_to_who_is_free():
    assert shares([5, 2, 2, 4, 1], 2) == [[0, 4], [1, 2, 3]]
    assert shares([1.0, 1.0], 3) == [[0], [1], []] and shares([], 2) == [[], []]


def test_the_first_error_in_the_items_order_is_raised():
    def work(_, item):
        time.sleep(0.05 * (3 - item))
        raise ValueError(str(item))

    with pytest.raises(ValueError, match="0"):
        Workers(3).run(work, range(3))


def test_those_that_wait_are_let_go():
    begun_both, waiting = threading.Barrier(2), threading.Event()

    def work(_, item):
        begun_both.wait(10)
        if item == 0:
            raise ValueError("the first")
        waiting.wait(10)
        raise AbandonedError("gave up")

    begun = time.monotonic()
    with pytest.raises(ValueError, match="the first"):
        Workers(2).run(work, range(2), abandon=waiting.set)
    assert time.monotonic() - begun < 5


def test_nothing_more_is_begun_after_an_error():
    begun = []

    def work(_, item):
        begun.append(item)
        if item == 1:
            raise ValueError
        time.sleep(0.02)

    with pytest.raises(ValueError):
        Workers(2).run(work, range(50))
    assert len(begun) < 6


def test_threads_that_are_left_over_end():
    workers = Workers(3)
    workers.run(lambda *_: time.sleep(0.01), range(6))
    threads = set(workers._pool._threads)
    assert len(threads) == 3 and all(thread.is_alive() for thread in threads)
    workers.lower(5)
    assert workers.count == 3
    workers.lower(2)
    assert workers.count == 2 and not any(thread.is_alive() for thread in threads)
    assert set(workers.run(lambda worker, _: worker, range(6))) <= {0, 1}
