"""How fast this machine multiplies matrices while a forecast is made, beside what it did before. No torch.

A laptop that is warm or on battery, or a virtual machine with busy neighbours, has another speed in an hour.
No forecast knows that hour's; but it can say what it saw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from smoldpo.durations import words
from smoldpo.plan.forecast import Times

SWUNG = 1.5
"""The fastest reading over the slowest, from which on that is said."""
DIFFERS = 1.15
"""The usual speed over the present one, or the other way, from which on that is said."""
ENOUGH = 3
"""Earlier readings that tell what is usual."""


@dataclass(frozen=True)
class Pace:
    """GFLOP/s of products in the compute dtype (engine/precision.py)."""

    readings: Sequence[float]
    """Taken between the parts of the dry run."""
    earlier: Sequence[float] = ()
    """Of earlier commands on this machine."""

    @property
    def now(self) -> float:
        return median(self.readings)

    @property
    def usual(self) -> float | None:
        return median(self.earlier) if len(self.earlier) >= ENOUGH else None

    def remarks(self, times: Times) -> list[str]:
        """What a forecast of these times must say of the minute in which it was made."""
        said, slowest, fastest = [], min(self.readings), max(self.readings)
        if fastest >= SWUNG * slowest:
            said.append(
                f"this machine's speed swung between {slowest:,.0f} and {fastest:,.0f} GFLOP/s while "
                "planning: a run may meet another mean, and take as much more or less time"
            )
        if self.usual and max(self.usual / self.now, self.now / self.usual) >= DIFFERS:
            total = words(times.at_speed(self.usual / self.now).total)
            said.append(
                f"products ran at {self.now:,.0f} GFLOP/s while planning, and at {self.usual:,.0f} in "
                f"this machine's last {len(self.earlier)} commands: at that speed the run takes {total}"
            )
        return said

    def as_dict(self) -> dict[str, Any]:
        return {
            "gflops": round(self.now, 1),
            "slowest": round(min(self.readings), 1),
            "fastest": round(max(self.readings), 1),
            "usual": self.usual and round(self.usual, 1),
            "earlier_commands": len(self.earlier),
        }
