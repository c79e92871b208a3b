"""Every random generator a run may draw from: seeded at start, saved, restored on resume."""

from __future__ import annotations

import random
from typing import Any

import numpy
import torch

Tensors = dict[str, torch.Tensor]


def seed_everything(seed: int) -> None:
    """Python's, numpy's and torch's generators from one number."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def capture() -> tuple[Tensors, dict[str, Any]]:
    """The generators' states: words as tensors, and the few other numbers for JSON."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = numpy.random.get_state()
    tensors = {
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(numpy.asarray(keys, dtype="int64")),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        tensors |= {f"cuda.{n}": state for n, state in enumerate(torch.cuda.get_rng_state_all())}
    if torch.backends.mps.is_available():
        tensors["mps"] = torch.mps.get_rng_state()
    numbers = {
        "python": [version, gauss],
        "numpy": [str(name), int(position), int(has_gauss), float(cached)],
    }
    return tensors, numbers


def restore(tensors: Tensors, numbers: dict[str, Any]) -> None:
    """Put back what `capture` returned; generators of devices that are not here are left out."""
    version, gauss = numbers["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
    name, position, has_gauss, cached = numbers["numpy"]
    keys = tensors["numpy"].numpy().astype("uint32")
    numpy.random.set_state((name, keys, position, has_gauss, cached))
    torch.set_rng_state(tensors["torch"])
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for number in range(devices):
        if f"cuda.{number}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda.{number}"], number)
    if "mps" in tensors and torch.backends.mps.is_available():
        torch.mps.set_rng_state(tensors["mps"])
