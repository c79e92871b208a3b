"""What a run is at a moment of training, and its way into a checkpoint and back, to the last bit.

Saved are the weights that train (in the optimizer's precision), AdamW's state, the random generators, and
a few numbers. The rest is made anew from the configuration: frozen weights and the reference from where
they were loaded, the order of the pairs and the learning rate from seed and step.
"""

from __future__ import annotations

from typing import Any

import torch

from smoldpo import rng
from smoldpo.checkpoint import Checkpoint, Tensors
from smoldpo.config import TrainConfig
from smoldpo.early_stopping import BestSoFar
from smoldpo.engine.base import Engine
from smoldpo.errors import SmoldpoError
from smoldpo.optim import make_optimizer


class TrainingState:
    """Policy, optimizer and position of a run.

    Attributes:
        step: optimizer steps finished.
        evaluated: the last step after which the held-out pairs were evaluated; -1 before any.
        best: the best of those evaluations.
        figures: what the last step found (trainer.step_metrics), its `pairs` and `seconds`; for those who
            watch, and no part of a checkpoint.
    """

    def __init__(self, engine: Engine, config: TrainConfig):
        self.engine = engine
        self.parameters = dict(engine.trainable_parameters())
        self.optimizer = make_optimizer(self.parameters.items(), config)
        self.step = 0
        self.evaluated = -1
        self.best = BestSoFar(config.metric_for_best_model)
        self.figures: dict[str, float] = {}

    @property
    def bytes(self) -> int:
        """Bytes of a checkpoint: weights, and two moments of each."""
        return 3 * sum(p.numel() * p.element_size() for p in self.parameters.values())

    def capture(self, **more: Any) -> Checkpoint:
        """A checkpoint of now; `more` goes into its state. Gradients are no part of it."""
        moments: Tensors = {}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                moments[f"{key}/{name}"] = _plain(value)
        generators, numbers = rng.capture()
        weights = {name: _plain(parameter) for name, parameter in self.parameters.items()}
        state = {
            "evaluated": self.evaluated,
            "best": self.best.as_dict(),
            "budget": self.engine.budget,
            "rng": numbers,
        }
        return Checkpoint(
            self.step,
            {"weights": weights, "optimizer": moments, "rng": generators},
            state | more,
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Become what was captured.

        Raises:
            SmoldpoError: it is of a model in which other parameters train.
        """
        self.restore_weights(checkpoint)
        self._restore_optimizer(checkpoint.tensors["optimizer"])
        rng.restore(checkpoint.tensors["rng"], checkpoint.state["rng"])
        self.step = checkpoint.step
        self.evaluated = checkpoint.state["evaluated"]
        self.best = BestSoFar(**checkpoint.state["best"])
        self.engine.budget = checkpoint.state["budget"]

    @torch.no_grad()
    def restore_weights(self, checkpoint: Checkpoint) -> None:
        """The policy alone becomes what it was. Raises as `restore`."""
        weights = checkpoint.tensors.get("weights", {})
        theirs = {name: (tuple(t.shape), t.dtype) for name, t in weights.items()}
        ours = {name: (tuple(p.shape), p.dtype) for name, p in self.parameters.items()}
        if theirs != ours:
            other = sorted(name for name in theirs | ours if theirs.get(name) != ours.get(name))
            raise SmoldpoError(
                f"checkpoint step-{checkpoint.step}: does not fit the model; other parameters train, "
                f"or in other shapes or precision: {', '.join(other[:3])}"
            )
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])
        if checkpoint.step:
            self.engine.updated()

    def _restore_optimizer(self, saved: Tensors) -> None:
        for name, parameter in self.parameters.items():
            keys = {key.partition("/")[0] for key in saved if key.endswith(f"/{name}")}
            state = {key: saved[f"{key}/{name}"].to(parameter.device) for key in sorted(keys)}
            if state:
                self.optimizer.state[parameter] = state


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous()
