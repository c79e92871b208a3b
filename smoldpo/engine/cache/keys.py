"""What results depend on, as SHA-256: the name under which they are kept, and found again."""

from __future__ import annotations

import functools
import hashlib
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from smoldpo.types import TokenizedPair
from smoldpo.utils.files import processor_name

ENGINE = Path(__file__).parents[1]
"""The folder of everything that computes a result or lays it out on disk."""


@functools.cache
def code_sha256() -> str:
    """SHA-256 (hex) of the engine's code: any edit may change a bit of a result."""
    digest = hashlib.sha256()
    for path in sorted(ENGINE.rglob("*.py")):
        digest.update(path.relative_to(ENGINE).as_posix().encode() + b"\n" + path.read_bytes())
    return digest.hexdigest()


@functools.lru_cache(maxsize=1 << 17)
def pair_key(pair: TokenizedPair, shared: int) -> str:
    """SHA-256 (hex, half of it) of a pair's token ids, and of its masks where some are not scored.

    `shared` of the prompt's tokens are computed for many pairs.
    """
    ids = json.dumps([pair.prompt_ids, pair.chosen_ids, pair.rejected_ids, shared, *pair.masks])
    return hashlib.sha256(ids.encode()).hexdigest()[:32]


def results_key(weights: str, dtype: torch.dtype, device: torch.device, **more: Any) -> str:
    """SHA-256 (hex, half of it) over all that log-probabilities or states depend on but the tokens.

    Kernels differ between versions of torch and transformers and between processors, so these are
    part of it. The number of threads is not: each result is computed by one (utils/workers.py).
    """
    parts = {
        "code": code_sha256(),
        "weights": weights,
        "dtype": str(dtype),
        "device": _processor(device),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }
    return hashlib.sha256(json.dumps(parts | more, sort_keys=True).encode()).hexdigest()[:32]


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        amx = torch.cpu._is_amx_tile_supported()
        return f"{processor_name()} {torch.backends.cpu.get_cpu_capability()} amx={amx}"
    return f"{device.type} {processor_name()} {platform.mac_ver()[0]}"
