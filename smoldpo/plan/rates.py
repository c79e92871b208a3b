"""Seconds a unit of work, fitted to what a few passes and steps took. No torch.

    a pass without gradients   below trunk_rows trunk_row + top rows top_row
                               + (below + top) scores score + scored head
    gradients of a step        top rows step_row + top scores step_score + scored step_head (half as much
                               again where the head trains) + streams parameters gradient
    the optimizer's step       parameters optimizer + step

`below` and `top` are the layers that the work goes through on each side of the freeze boundary.
Every rate is at least 0: the fit is the non-negative least squares of Lawson and Hanson (1974), of relative
errors, so that a short pass counts as much as a long one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from smoldpo.plan.work import Work


@dataclass(frozen=True)
class Passed:
    """A pass without gradients: through `below` layers of the trunk, `top` others, and the head."""

    work: Work
    below: int
    top: int
    seconds: float


@dataclass(frozen=True)
class Stepped:
    """An optimizer step: `gradients` and `optimizer` are seconds; None: not known."""

    work: Work
    top: int
    parameters: int
    head_trains: bool
    gradients: float
    optimizer: float | None


@dataclass(frozen=True)
class Rates:
    """Seconds a unit of each kind of work; see above."""

    trunk_row: float = 0.0
    top_row: float = 0.0
    score: float = 0.0
    head: float = 0.0
    step_row: float = 0.0
    step_score: float = 0.0
    step_head: float = 0.0
    gradient: float = 0.0
    optimizer: float = 0.0
    step: float = 0.0

    def trunk(self, work: Work, below: int) -> float:
        """Seconds of a pass through the frozen layers."""
        return below * (work.trunk_rows * self.trunk_row + work.scores * self.score)

    def top(self, work: Work, layers: int) -> float:
        """Seconds of a pass without gradients through so many layers and the head."""
        each = work.rows * self.top_row + work.scores * self.score
        return layers * each + work.scored * self.head

    def gradients(self, work: Work, layers: int, parameters: int, head_trains: bool) -> float:
        """Seconds of a forward and backward pass through so many layers and the head."""
        each = work.rows * self.step_row + work.scores * self.step_score
        head = _head(work, head_trains) * self.step_head
        return layers * each + head + work.streams * parameters * self.gradient

    def update(self, parameters: int) -> float:
        """Seconds from gradients to new weights, once."""
        return parameters * self.optimizer + self.step


def fit_rates(passed: Sequence[Passed], stepped: Sequence[Stepped]) -> Rates:
    """The rates that explain best what was measured; what nothing tells of is 0."""
    forward = _fit(
        [
            [
                p.below * p.work.trunk_rows,
                p.top * p.work.rows,
                (p.below + p.top) * p.work.scores,
                p.work.scored,
            ]
            for p in passed
        ],
        [p.seconds for p in passed],
    )
    backward = _fit(
        [
            [
                s.top * s.work.rows,
                s.top * s.work.scores,
                _head(s.work, s.head_trains),
                s.work.streams * s.parameters,
            ]
            for s in stepped
        ],
        [s.gradients for s in stepped],
    )
    updates = [(s.parameters, s.optimizer) for s in stepped if s.optimizer is not None]
    update = _fit([[parameters, 1] for parameters, _ in updates], [s for _, s in updates])
    return Rates(*forward, *backward, *update)


def _head(work: Work, head_trains: bool) -> float:
    """Tokens through the head: forward and back are two products each, the gradient of its weights a third.

    Fitted by itself, that third took whatever else the depth with everything training had of its own.
    """
    return work.scored * (1.5 if head_trains else 1.0)


def _fit(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """x >= 0 with rows x close to seconds, by relative error."""
    if not rows:
        raise ValueError("nothing was measured")
    target = np.maximum(np.asarray(seconds, float), 1e-9)
    matrix = np.asarray(rows, float) / target[:, None]
    scale = matrix.max(axis=0)  # columns differ by many powers of ten
    scale[scale == 0] = 1.0
    found, _ = nnls(matrix / scale, np.ones(len(target)))
    return [float(x) for x in found / scale]
