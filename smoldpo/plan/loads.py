"""What a run does at one depth, counted: which pairs go through what, how often."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from smoldpo.config import TrainConfig
from smoldpo.engine.scorer import MAX_TOKENS
from smoldpo.loss_facts import needs_reference
from smoldpo.plan.counting import FastPacking, Packing, work_of
from smoldpo.plan.forecast import Depth, Load
from smoldpo.plan.kept import NOTHING, Kept
from smoldpo.plan.work import Work
from smoldpo.trainer import Schedule, loss_function
from smoldpo.types import TokenizedPair

READINGS = 9
"""Pairs worth reading of an evaluation, about (evaluation/notable.py)."""


@dataclass(frozen=True)
class Steps:
    """The optimizer steps of a run under one budget, epoch by epoch."""

    epochs: list[Work]
    steps: list[int]
    longest: float
    """Rows of the longest stream with a backward pass."""


class Counts:
    """Each count of a run made once, whatever number of depths asks for it."""

    def __init__(
        self,
        config: TrainConfig,
        train: Sequence[TokenizedPair],
        evaluation: Sequence[TokenizedPair],
    ):
        self.steps = cache(lambda packing: count_steps(config, packing, train))
        """The optimizer steps under a packing: Steps."""
        self.evaluation = cache(lambda packing: work_of(packing, packing.passes(evaluation)))
        """All held-out pairs, once: Work."""
        self.once = cache(lambda packing, kept: _once(packing, kept))
        """What goes through trunk and reference: Work, Work; nothing where the engine keeps nothing."""


def count_steps(config: TrainConfig, packing: Packing, train: Sequence[TokenizedPair]) -> Steps:
    """Each step's own pairs, packed as they will be."""
    schedule = Schedule.of(config, len(train))
    epochs: list[Work] = []
    steps: list[int] = []
    longest = 0.0
    for step in range(schedule.total_steps):
        if step % schedule.steps_per_epoch == 0:
            epochs.append(Work())
            steps.append(0)
        streams = packing.step([train[index] for index in schedule.indices(step)])
        epochs[-1] += work_of(packing, streams)
        steps[-1] += 1
        longest = max(longest, *(packing.held(stream) for stream in streams))
    return Steps(epochs, steps, longest)


def load_at(
    config: TrainConfig,
    depth: Depth,
    packing: Packing,
    counts: Counts,
    kept: Kept,
    answers: Work,
) -> Load:
    """What the run does; `kept` is what is there already, and `answers` what is scored of them."""
    fast = isinstance(packing, FastPacking)
    own = config.reference is not None
    steps, evaluation = counts.steps(packing), counts.evaluation(packing)
    trunk, reference = counts.once(packing, kept)
    last = sum(steps.steps)
    between = 0
    if config.eval_steps and evaluation.pairs:
        between = (last - 1) // config.eval_steps + config.load_best_model_at_end
    before = 0
    if evaluation.pairs:
        # A fast engine has the reference's log-probabilities, and the policy's with them.
        apart = own or config.use_weighting  # the policy's own are asked for besides
        compares = needs_reference(config.loss_type)
        before = int(apart or not compares) if fast else 1 + (apart and compares)
    per_stream = steps.epochs[0].pairs / max(1, steps.epochs[0].streams)
    return Load(
        trunk=trunk,
        reference=reference,
        reference_layers=depth.layers if own else depth.top,
        epochs=steps.epochs,
        steps=steps.steps,
        two_passes=loss_function(config, config.beta).whole_step,
        evaluation=evaluation,
        evaluation_layers=depth.top if fast else depth.layers,
        before=before,
        between=between,
        again=1 - (1 - kept.missing) ** per_stream if fast else 0.0,
        answers=answers,
        states_bytes=kept.states_bytes,
    )


def _once(packing: Packing, kept: Kept) -> tuple[Work, Work]:
    """Through trunk and reference, as FastEngine.prepare groups the pairs."""
    if kept is NOTHING:
        return Work(), Work()
    unscored = set(kept.without_logps)
    stateless = set(kept.without_states)
    first = packing.passes(kept.without_states)
    then = packing.passes([pair for pair in kept.without_logps if pair not in stateless])
    scoring = [stream for stream in first if any(pair in unscored for pair in stream)] + then
    return work_of(packing, first), work_of(packing, scoring)


def answers_work(
    prompts: Sequence[int], new_tokens: int, evaluation: Sequence[TokenizedPair], read: bool
) -> Work:
    """Both models' answers to prompts of so many tokens, and the pairs worth reading, to be scored."""
    pairs = [TokenizedPair("", (0,) * n, (0,) * new_tokens, (0,) * new_tokens) for n in prompts]
    pairs += evaluation[:READINGS] if read else []
    if not pairs:
        return Work()
    packing = FastPacking(MAX_TOKENS)
    return work_of(packing, packing.passes(pairs))
