"""Whether training moved any weight: a run in which none did is a failure, not a result."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from smoldpo.models.weights import tensors_sha256
from smoldpo.training.metrics_file import read_rows
from smoldpo.utils.errors import SmoldpoError
from smoldpo.utils.shares import own

Named = Iterable[tuple[str, torch.Tensor]]


class StartingWeights:
    """What trains as it was before the first step, as hashes: no copy is held."""

    def __init__(self, named: Named):
        self._hashes = {name: tensors_sha256([(name, own(weight))]) for name, weight in named}

    def require_moved(self, named: Named, metrics: Path) -> None:
        """Stop a run that ends with every weight that trains as it began, to the last bit.

        Args:
            metrics: the run's metrics.jsonl, for the reason.

        Raises:
            SmoldpoError: no weight moved; the message says what to change.
        """
        if any(tensors_sha256([(name, own(w))]) != self._hashes[name] for name, w in named):
            return
        steps = [row for row in read_rows(metrics) if "learning_rate" in row]
        rate, norm = (
            max((row.get(key) or 0.0 for row in steps), default=0.0)
            for key in ("learning_rate", "grad_norm")
        )
        raise SmoldpoError(
            f"no weight moved: after {steps[-1]['step'] if steps else 0} steps all that trains is "
            "what it was before the first, to the last bit, so no model is saved; "
            f"{_reason(rate, norm)}"
        )


def _reason(rate: float, norm: float) -> str:
    if not rate:
        return (
            "the rate of every step was 0, as in the first step of a warm-up: set warmup_steps 0, "
            "or train for more steps"
        )
    if not norm:
        return (
            "every gradient was 0: the two answers of the pairs are the same tokens (look at some "
            "with smoldpo data show; a larger max_length keeps more of them apart), or the loss is "
            "already at its least, as hinge is beyond its margin"
        )
    return (
        f"at the highest rate, {rate:.3g}, with gradients of norm {norm:.3g} at most, each update "
        "was lost in the rounding of the weights: raise learning_rate"
    )
