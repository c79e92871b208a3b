"""The best evaluation so far, and when to stop for want of a better one. No torch here."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class BestSoFar:
    """Follows one metric of the evaluations during training.

    Attributes:
        metric: its name in metrics.jsonl, such as eval_loss.
        step, value: where it was best, and how good; None before the first evaluation.
        since: evaluations since then, none of them better.
    """

    metric: str
    step: int | None = None
    value: float | None = None
    since: int = 0

    def update(self, step: int, row: dict[str, Any]) -> bool:
        """Take in an evaluation; whether it is the best so far. One that is not a number never is."""
        value = float(row[self.metric])
        sign = 1.0 if self.metric.endswith("loss") else -1.0  # lower is better for losses alone
        better = not math.isnan(value) and (self.value is None or sign * value < sign * self.value)
        if better:
            self.step, self.value, self.since = step, value, 0
        else:
            self.since += 1
        return better

    def exhausted(self, patience: int | None) -> bool:
        """Whether `patience` evaluations in a row brought nothing better."""
        return patience is not None and self.since >= patience

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `BestSoFar(**it)` is the same again."""
        return asdict(self)
