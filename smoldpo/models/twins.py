"""Two models that have weights in common."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from transformers import PreTrainedModel


def twin(model: PreTrainedModel, own: Mapping[str, torch.Tensor]) -> PreTrainedModel:
    """A copy of the model that has `own` for its weights of these names, and all others in common with it."""
    known = {
        id(weight): torch.nn.Parameter(own[name], requires_grad=False) if name in own else weight
        for name, weight in model.named_parameters()
    }
    return copy.deepcopy(model, known)  # which takes what is known instead of a copy
