"""Averaged weights: an exponential moving average of the policy's, which is what is evaluated and saved.

After each optimizer step, by torch's own function (torch.optim.swa_utils):

    average ← d · average + (1 - d) · weights,    beginning at the policy's start; d is `ema_decay`

Training goes on with the weights themselves.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn


class AveragedWeights:
    """The average of parameters, in their own precision.

    Args:
        parameters: by name, at their start.
        decay: d, between 0 and 1.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], decay: float):
        self._parameters = parameters
        self._average = get_ema_multi_avg_fn(decay)
        self.tensors = {name: p.detach().clone() for name, p in parameters.items()}

    def update(self) -> None:
        """Take in the weights after a step."""
        weights = [parameter.detach() for parameter in self._parameters.values()]
        self._average(list(self.tensors.values()), weights, None)

    @torch.no_grad()
    def exchange(self) -> None:
        """Put the average into the parameters and keep their values; twice, and all is as before.

        One parameter at a time, so that it takes no memory of the model's size.
        """
        for name, parameter in self._parameters.items():
            kept = parameter.detach().clone()
            parameter.copy_(self.tensors[name])
            self.tensors[name].copy_(kept)

    def restore(self, saved: Mapping[str, torch.Tensor]) -> None:
        """Become what was saved."""
        for name, tensor in self.tensors.items():
            tensor.copy_(saved[name])
