"""How much of the machine's cores other processes, and a hypervisor's other machines, take."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import psutil

BUSY = 0.25
"""Cores taken by others from which on a machine is called busy."""


@dataclass(frozen=True)
class CoreUse:
    """Averages over some seconds, in cores."""

    cores: int
    """All that the machine has."""
    others: float
    """Taken by other processes."""
    stolen: float
    """Given to other virtual machines while this one wanted them."""

    @property
    def busy(self) -> bool:
        """Whether a run here and now has a neighbour that it will feel."""
        return self.others + self.stolen >= BUSY

    @property
    def in_words(self) -> str:
        """For people."""
        stolen = f", and other virtual machines {self.stolen:.1f}" if self.stolen >= 0.05 else ""
        return f"other processes take {self.others:.1f} of {self.cores} cores{stolen}"

    def slower(self, threads: int) -> float:
        """How many times slower so many busy threads are than they would be alone."""
        left = self.cores - self.others - self.stolen
        return max(1.0, threads / max(left, threads / (threads + self.others + self.stolen)))


class CoreWatch:
    """Counts from when it is made."""

    def __init__(self) -> None:
        self._begun = time.perf_counter()
        self._machine, self._own = psutil.cpu_times(), self._own_seconds()

    @staticmethod
    def _own_seconds() -> float:
        own = os.times()
        return own.user + own.system + own.children_user + own.children_system

    def use(self) -> CoreUse:
        """Since then."""
        seconds = max(1e-3, time.perf_counter() - self._begun)
        now = psutil.cpu_times()
        names = [n for n in ("user", "system", "nice", "irq", "softirq") if hasattr(now, n)]
        taken = sum(getattr(now, n) - getattr(self._machine, n) for n in names)
        stolen = getattr(now, "steal", 0.0) - getattr(self._machine, "steal", 0.0)
        own = self._own_seconds() - self._own
        cores = os.cpu_count() or 1
        return CoreUse(cores, max(0.0, (taken - own) / seconds), max(0.0, stolen / seconds))


def core_use(seconds: float = 0.5) -> CoreUse:
    """During the next seconds, in which this process does nothing."""
    watch = CoreWatch()
    time.sleep(seconds)
    return watch.use()
