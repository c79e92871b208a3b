"""What each phase of a run took: a progress bar, and seconds and peak memory kept under its title."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from smoldpo import progress
from smoldpo.types import Advance

Bar = Callable[[str, int], contextlib.AbstractContextManager[Advance]]
WORTH_SAYING = 2.0
"""Seconds from which a phase's time is said when it ends."""


class Phases:
    """The phases of one run, in their order; `rows` is what timings.json holds.

    Each row has `seconds`, `units` of work of what `unit` names, and `peak_mb`: the most memory that the
    process had resident (10^6 bytes) from its start to the end of the phase, so the phase that needed it is
    the one where it grew. It is None where the system does not tell.

    Args:
        checking: wraps each bar's advance; a signal may stop the run wherever work advances.
    """

    def __init__(self, checking: Callable[[Advance], Advance]):
        self._checking = checking
        self.rows: dict[str, dict[str, Any]] = {}

    @contextlib.contextmanager
    def phase(
        self, title: str, units: int, unit: str = "pairs", bar: Bar = progress.bar
    ) -> Iterator[Advance]:
        """A bar over `units`; what it took is kept when the block ends, also by an error."""
        start = time.perf_counter()
        try:
            with bar(title, units) as advance:
                yield self._checking(advance)
        finally:
            took = time.perf_counter() - start
            self.rows[title] = {
                "seconds": round(took, 2),
                "units": units,
                "unit": unit,
                "peak_mb": peak_megabytes(),
            }
        if took >= WORTH_SAYING:
            progress.say(f"{title}: {took:.0f} s")


def peak_megabytes() -> float | None:
    """The most memory that this process ever had resident, in 10^6 bytes."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e6, 1)
