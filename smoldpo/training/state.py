"""What a run is at a moment of training, and its way into a checkpoint and back, to the last bit.

Saved are the weights that train (in the optimizer's precision), the optimizer's state, the random
generators, a few numbers, and where there are such the averaged weights and those of a moving
reference. The rest follows from the configuration: frozen weights and the reference from where
they were loaded, the order of the pairs and the learning rate from seed and step.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from smoldpo.config.schema import TrainConfig
from smoldpo.engine.base import Engine
from smoldpo.training.checkpoint import Checkpoint, Tensors
from smoldpo.training.optim import (
    AveragedWeights,
    capture_optimizer,
    make_optimizer,
    optimizer_bytes,
    restore_optimizer,
    update_bytes,
)
from smoldpo.utils import progress, rng
from smoldpo.utils.errors import SmoldpoError
from smoldpo.utils.shares import is_shared_out, kept_by_first, shared_out


def checkpoint_bytes(engine: Engine, config: TrainConfig) -> int:
    """Bytes of a checkpoint: weights, optimizer state, averaged weights, moving reference."""
    parameters = [parameter for _, parameter in engine.trainable_parameters()]
    moving = 0 if engine.synced_reference is None else engine.synced_reference.bytes
    return saved_bytes(parameters, config) + moving


def saved_bytes(parameters: Sequence[torch.Tensor], config: TrainConfig) -> int:
    """Of a checkpoint, what follows from the shapes of what trains."""
    copies = 1 if config.ema_decay is None else 2
    weights = sum(parameter.nbytes for parameter in parameters)
    return copies * weights + optimizer_bytes(parameters, config)


def step_bytes(parameters: Sequence[torch.Tensor], config: TrainConfig) -> int:
    """Bytes from the first step on: gradients, the optimizer's state, its temporaries."""
    state = optimizer_bytes(parameters, config) + update_bytes(parameters, config)
    return sum(parameter.nbytes for parameter in parameters) + state


class TrainingState:
    """Policy, optimizer and position of a run.

    Args:
        rates: peak rates of parameters that have one of their own, by name.

    Attributes:
        step: optimizer steps finished.
        evaluated: the last step after which the held-out pairs were evaluated; -1 before any.
        best: the best of those evaluations.
        figures: what the last step found (trainer.step_metrics), its `pairs` and `seconds`; for
            those who watch, and no part of a checkpoint.
    """

    def __init__(
        self, engine: Engine, config: TrainConfig, rates: Mapping[str, float] | None = None
    ):
        self.engine, self.config = engine, config
        self.parameters = dict(engine.trainable_parameters())
        self.optimizer = make_optimizer(self.parameters.items(), config, rates)
        self.average: AveragedWeights | None = None
        if config.ema_decay is not None:
            self.average = AveragedWeights(self.parameters, config.ema_decay)
        self.step = 0
        self.evaluated = -1
        self.best = BestSoFar(config.metric_for_best_model)
        self.figures: dict[str, float] = {}

    @property
    def shared_out(self) -> bool:
        """Whether each rank has a share of what trains alone."""
        return any(map(is_shared_out, self.parameters.values()))

    @property
    def step_bytes(self) -> int:
        """As the function of that name, of what trains here."""
        return step_bytes(list(self.parameters.values()), self.config)

    def finish_step(self) -> None:
        """The optimizer has taken a step: the policy, the average and the reference follow."""
        self.engine.updated()
        self.step += 1
        if self.average is not None:
            self.average.update()
        self._move_reference()

    def _move_reference(self) -> None:
        config, moving = self.config, self.engine.synced_reference
        if moving is None or self.step % config.ref_model_sync_steps:
            return
        moving.sync(config.ref_model_mixup_alpha)
        if moving.syncs == 1:
            progress.say(
                f"reference: moved after step {self.step}, {config.ref_model_mixup_alpha:g} of the "
                f"way to the policy, and again every {config.ref_model_sync_steps} steps. The "
                "log-probabilities that are kept are those of its start, so each step now runs it "
                "too; evaluations still compare with its start"
            )

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """In the block the policy has the averaged weights, if any; after it its own again."""
        if self.average is None or not self.step:
            yield
            return
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        assert self.average is not None
        self.average.exchange()
        self.engine.updated()

    def capture(self, **more: Any) -> Checkpoint:
        """A checkpoint of now; `more` goes into its state. Gradients are no part of it.

        Where weights are shared out among ranks, all ranks call this, and the first has it whole.
        """
        generators, numbers = rng.capture()
        weights = {name: _plain(parameter) for name, parameter in self.parameters.items()}
        tensors: dict[str, Tensors] = {
            "weights": weights,
            "optimizer": capture_optimizer(self.optimizer, self.parameters),
            "rng": generators,
        }
        state = {
            "evaluated": self.evaluated,
            "best": self.best.as_dict(),
            "budget": self.engine.budget,
            "rng": numbers,
        }
        if self.average is not None:
            tensors["averaged"] = {name: _plain(t) for name, t in self.average.tensors.items()}
        if self.engine.synced_reference is not None:
            tensors["reference"] = self.engine.synced_reference.capture()
            state["reference_syncs"] = self.engine.synced_reference.syncs
        return Checkpoint(self.step, tensors, state | more)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Become what was captured.

        Raises:
            SmoldpoError: it is of a model in which other parameters train.
        """
        self.restore_weights(checkpoint)
        restore_optimizer(self.optimizer, self.parameters, checkpoint.tensors["optimizer"])
        if self.engine.synced_reference is not None:
            moved = checkpoint.state["reference_syncs"]
            self.engine.synced_reference.restore(checkpoint.tensors["reference"], moved)
        rng.restore(checkpoint.tensors["rng"], checkpoint.state["rng"])
        self.step = checkpoint.step
        self.evaluated = checkpoint.state["evaluated"]
        self.best = BestSoFar(**checkpoint.state["best"])
        self.engine.budget = checkpoint.state["budget"]

    @torch.no_grad()
    def restore_weights(self, checkpoint: Checkpoint) -> None:
        """The policy alone, and its average, becomes what it was. Raises as `restore`."""
        weights = checkpoint.tensors.get("weights", {})
        theirs = {name: (tuple(t.shape), t.dtype) for name, t in weights.items()}
        ours = {name: (tuple(p.shape), p.dtype) for name, p in self.parameters.items()}
        if theirs != ours:
            other = sorted(name for name in theirs | ours if theirs.get(name) != ours.get(name))
            raise SmoldpoError(
                f"checkpoint step-{checkpoint.step}: does not fit the model; other parameters "
                f"train, or in other shapes or precision: {', '.join(other[:3])}"
            )
        for name, parameter in self.parameters.items():
            parameter.copy_(shared_out(weights[name], parameter))
        if self.average is not None:
            self.average.restore(checkpoint.tensors["averaged"])
        if checkpoint.step:
            self.engine.updated()


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return kept_by_first(tensor).cpu().contiguous()


@dataclass
class BestSoFar:
    """The best evaluation so far by one metric, and when to stop for want of a better one.

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
        """Take in an evaluation; whether it is the best so far. NaN never is."""
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
