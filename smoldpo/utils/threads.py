"""Processor cores that this process may use, and how many threads torch spreads an operation over.

An operation that is spread over threads ends when its slowest thread does. Where another process
holds one of the cores, all threads wait for it, thousands of times a step. So whatever can be cut
into independent parts is computed part by part, each by one thread (utils/workers.py).
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

TOPOLOGY = Path("/sys/devices/system/cpu")
CONTROL_GROUP = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Physical cores that this process may use: by its affinity and its container's limit.

    Two threads of one core share its arithmetic units, so they count as one.
    """
    return max(1, int(min(_physical_cores(TOPOLOGY), _container_limit(CONTROL_GROUP))))


def default_threads() -> int:
    """OMP_NUM_THREADS where it is set, else the usable cores."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(asked) if asked.isdecimal() and int(asked) > 0 else usable_cores()


@contextlib.contextmanager
def computing(threads: int | None, nice: int = 0) -> Iterator[None]:
    """A command or a run: so many threads compute, and other programs go before by `nice`.

    Args:
        threads: None for `default_threads`.
        nice: 0 to 19, as nice(2) has it; it stays when the block ends, for only root may lower it.
    """
    if nice:
        _be_nice(nice)
    with torch_threads(threads or default_threads()):
        yield


def _be_nice(nice: int) -> None:
    process: Any = psutil.Process()
    if sys.platform == "win32":  # which has classes of priority
        names = "IDLE_PRIORITY_CLASS", "BELOW_NORMAL_PRIORITY_CLASS"
        process.nice(getattr(psutil, names[nice < 10]))
    else:
        process.nice(max(nice, process.nice()))


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """In the block torch spreads the operations of the calling thread over `count` threads."""
    before = torch.get_num_threads()
    if before != count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if before != count:
            torch.set_num_threads(before)


def _physical_cores(topology: Path) -> int:
    """Cores that the affinity leaves; where it cannot be asked, all of the machine."""
    if not hasattr(os, "sched_getaffinity"):
        return psutil.cpu_count(logical=False) or os.cpu_count() or 1
    usable = os.sched_getaffinity(0)
    cores = set()
    for number in usable:
        with contextlib.suppress(OSError):
            siblings = topology / f"cpu{number}" / "topology" / "thread_siblings_list"
            cores.add(siblings.read_text())
    return len(cores) or len(usable)


def _container_limit(group: Path) -> float:
    """Cores' worth of time that a container (cgroup, version 2) may take."""
    try:
        quota, period = (group / "cpu.max").read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError):  # no container, none of version 2, or "max": no limit
        return math.inf
