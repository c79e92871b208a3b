"""Whether the machine is busy, beside real processes."""

import os
import subprocess
import sys
import time

import pytest

from smoldpo.utils.core_use import CoreUse, CoreWatch, core_use

LOOP = """
import time
end = time.monotonic() + 20
print(flush=True)
while time.monotonic() < end:
    pass
"""


@pytest.fixture
def neighbour():
    """Another process that keeps one core busy."""
    process = subprocess.Popen([sys.executable, "-c", LOOP], stdout=subprocess.PIPE)
    process.stdout.readline()
    yield
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_busy_neighbour_is_seen(neighbour):
    found = core_use(0.5)
    assert found.others > 0.4 and found.busy and "other processes take" in found.in_words


def test_what_this_process_does_is_not_counted():
    watch, end = CoreWatch(), time.thread_time() + 0.3
    while time.thread_time() < end:
        pass
    machine = os.times()
    found = watch.use()
    assert machine.user > 0.3
    assert found.others < found.cores - 0.2


@pytest.mark.parametrize(
    "cores, others, stolen, threads, slower",
    [
        (8, 0.0, 0.0, 4, 1.0),
        (8, 3.0, 0.0, 4, 1.0),  # there is room for both
        (2, 1.0, 0.0, 2, 2.0),
        (2, 0.0, 1.0, 2, 2.0),
        (2, 2.0, 0.0, 1, 3.0),  # none is left over: a fair share
    ],
)
def test_how_much_slower(cores, others, stolen, threads, slower):
    assert CoreUse(cores, others, stolen).slower(threads) == pytest.approx(slower)


def test_in_words():
    assert CoreUse(2, 0.04, 0.0).in_words == "other processes take 0.0 of 2 cores"
    found = CoreUse(2, 1.26, 0.3)
    assert found.in_words.endswith("1.3 of 2 cores, and other virtual machines 0.3")
    assert found.busy and not CoreUse(2, 0.1, 0.1).busy
