"""The phases of a run: which ones a configuration has, and what each of them took."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from smoldpo.config.losses import needs_reference
from smoldpo.config.schema import TrainConfig
from smoldpo.training.sampler import Schedule
from smoldpo.types import Advance
from smoldpo.utils import progress


@dataclass(frozen=True)
class RunPhases:
    """What a run does, in its order. The run goes by it, and a forecast counts by it.

    Attributes:
        first_pass: title of the pass over all pairs that computes what the engine keeps.
        reference_before: whether the reference scores the held-out pairs before training.
        policy_before: whether the policy does; otherwise it still is the reference.
        steps: optimizer steps.
        evaluations: the steps after which the policy scores the held-out pairs.
        after: whether the policy scores the held-out pairs after training.
    """

    first_pass: str
    reference_before: bool
    policy_before: bool
    steps: int
    evaluations: frozenset[int]
    after: bool

    @classmethod
    def of(cls, config: TrainConfig, train_pairs: int, eval_pairs: int) -> RunPhases:
        """The phases of a run with so many pairs to train on and so many held out."""
        compares, held_out = needs_reference(config.loss_type), eval_pairs > 0
        differs = config.reference is not None or config.use_weighting
        steps = Schedule.of(config, train_pairs).total_steps
        evaluations: frozenset[int] = frozenset()
        if config.eval_steps and held_out:
            evaluations = frozenset(range(config.eval_steps, steps, config.eval_steps))
            # Every run is evaluated after training; here, so that the last step may be the best.
            evaluations |= {steps} if config.load_best_model_at_end else set()
        return cls(
            first_pass="trunk and reference" if compares else "trunk",
            reference_before=held_out and compares,
            policy_before=held_out and (differs or not compares),
            steps=steps,
            evaluations=evaluations,
            after=held_out,
        )


def checkpoint_due(
    config: TrainConfig, step: int, minutes: float, *, last: bool, others: bool
) -> bool:
    """Whether a checkpoint is saved after a step, that of a best evaluation apart.

    Args:
        minutes: since the checkpoint before, or since the beginning.
        last: whether training ends with this step.
        others: whether there are checkpoints already.
    """
    if last and (others or config.save_steps or config.load_best_model_at_end):
        return True
    if config.save_steps and step % config.save_steps == 0:
        return True
    return bool(config.save_minutes and minutes >= config.save_minutes)


Bar = Callable[[str, int], contextlib.AbstractContextManager[Advance]]
MINIMUM_TO_SAY = 2.0
"""Seconds from which a phase's time is said when it ends."""


class PhaseTimer:
    """Times the phases of one run, in their order; `rows` is what timings.json holds.

    Each row has `seconds`, `units` of work of what `unit` names, and `peak_mb`: the most memory
    that the process had resident (10^6 bytes) from its start to the end of the phase, so the phase
    that needed it is the one where it grew. It is None where the system does not tell.

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
        """A bar over `units`; what the phase took is kept when the block ends, also by an error."""
        start = time.perf_counter()
        try:
            with bar(title, units) as advance:
                yield self._checking(advance)
        finally:
            seconds = time.perf_counter() - start
            self.rows[title] = {
                "seconds": round(seconds, 2),
                "units": units,
                "unit": unit,
                "peak_mb": peak_megabytes(),
            }
        if seconds >= MINIMUM_TO_SAY:
            progress.say(f"{title}: {seconds:.0f} s")


def peak_megabytes() -> float | None:
    """The most memory that this process ever had resident, in 10^6 bytes."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e6, 1)
