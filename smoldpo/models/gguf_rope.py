"""Rotary scaling in GGUF files, which transformers (5.23) drops when it reads one.

It stands in metadata keys (linear, YaRN), in an older key, or, of Llama 3's kind, only in a
tensor: `rope_freqs.weight` holds by how much each frequency is divided. What is said in another
way, or does not fit the model that transformers makes, is refused; llama.cpp's reading
(llama-model.cpp) counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy
import torch
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from smoldpo.utils.errors import ModelError, named_few

FREQUENCIES = "rope_freqs.weight"
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Of every Llama 3 model; their factors (8 and 32) are the tensor's largest number."""
KNOWN = {"type", "factor", "original_context_length", "finetuned", "attn_factor"}
NEUTRAL = {
    "yarn_beta_fast": 32, "yarn_beta_slow": 1, "yarn_ext_factor": 1, "yarn_attn_factor": 1,
    "yarn_log_multiplier": 0, "alpha": 0,
}  # fmt: skip
"""Keys that are not read, with the value that changes nothing."""


def set_rope(
    config: PreTrainedConfig, metadata: Mapping[str, Any], frequencies: numpy.ndarray | None
) -> None:
    """Give the configuration the rotary scaling that the file says.

    Args:
        metadata: the file's keys without the architecture's name in front ("rope.scaling.type").
        frequencies: the tensor `rope_freqs.weight`, where there is one.

    Raises:
        ModelError: scaling of a kind that is not read.
    """
    said = {
        key.removeprefix("rope.scaling."): value
        for key, value in metadata.items()
        if key.startswith("rope.scaling.")
    }
    if unknown := sorted(said.keys() - KNOWN - NEUTRAL.keys()):
        raise ModelError(f"it scales rotary frequencies by {named_few(unknown)}, which is not read")
    for key, value in NEUTRAL.items():
        if said.get(key, value) != value:
            raise ModelError(f"its rope.scaling.{key} is {said[key]}, which is not read")
    factor = _decimal(said.get("factor") or metadata.get("rope.scale_linear") or 1)
    kind = said.get("type", "linear")
    if factor == 1 and kind in ("linear", "yarn"):
        kind = "none"
    if kind == "none":
        scaling: dict[str, Any] = {}
    elif kind == "linear":
        scaling = {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        scaling = _yarn(config, said, factor)
    else:
        raise ModelError(f"its rotary scaling is of type {kind!r}, which is not read")
    if frequencies is not None and not (frequencies == 1).all():
        if scaling:
            raise ModelError(f"it scales rotary frequencies twice, by {kind} and {FREQUENCIES}")
        scaling = _by_tensor(config, numpy.asarray(frequencies, dtype=numpy.float32))
    if scaling:
        config.rope_parameters = {"rope_theta": _theta(config)} | scaling


def _theta(config: PreTrainedConfig) -> float:
    rope = getattr(config, "rope_parameters", None)
    if not rope or "rope_theta" not in rope:
        raise ModelError("its rotary frequencies are scaled, and those of its type are not known")
    return float(rope["rope_theta"])


def _yarn(config: PreTrainedConfig, said: Mapping[str, Any], factor: float) -> dict[str, Any]:
    scaling: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": int(
            said.get("original_context_length", config.max_position_embeddings)
        ),
    }
    if (more := _decimal(said.get("attn_factor", 1))) != 1:
        scaling["attention_factor"] = more * (0.1 * math.log(factor) + 1)
    return scaling


def _by_tensor(config: PreTrainedConfig, factors: numpy.ndarray) -> dict[str, Any]:
    """Llama 3's scaling if the tensor is its; else a factor for each frequency, as in LongRoPE."""
    longrope = {
        "rope_type": "longrope",
        "factor": 1.0,
        "attention_factor": 1.0,
        "short_factor": [_decimal(f) for f in factors],
        "long_factor": [_decimal(f) for f in factors],
        "original_max_position_embeddings": config.max_position_embeddings,
    }
    for scaling in (
        {"rope_type": "llama3", "factor": _decimal(factors.max())} | LLAMA3,
        longrope,
    ):
        found = _divided_by(config, scaling)
        if found.shape == factors.shape and numpy.allclose(found, factors, rtol=1e-5, atol=0):
            return scaling
    raise ModelError(
        f"its {FREQUENCIES} has {len(factors)} factors, which do not fit its rotary frequencies"
    )


def _divided_by(config: PreTrainedConfig, scaling: dict[str, Any]) -> numpy.ndarray:
    """By how much a scaling divides each rotary frequency."""
    theta, kept = _theta(config), config.rope_parameters
    try:
        config.rope_parameters = {"rope_theta": theta} | scaling
        scaled, _ = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, torch.device("cpu"))
    except (ValueError, RuntimeError, KeyError):
        return numpy.empty(0)
    finally:
        config.rope_parameters = kept
    width = 2 * len(scaled)
    plain = theta ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    return (plain / scaled.double()).numpy()


def _decimal(value: Any) -> float:
    """A number as it was written: GGUF holds it in float32."""
    return float(str(numpy.float32(value)))


def rope_metadata(
    config: PreTrainedConfig,
) -> tuple[dict[str, str | int | float], numpy.ndarray | None]:
    """The other way: the keys `rope...` that say a model's scaling, and its FREQUENCIES if any.

    Raises:
        ModelError: scaling that a GGUF file cannot say, or that is not read back from it.
    """
    rope: dict[str, Any] = dict(config.rope_parameters or {})
    theta, kind = _theta(config), rope.get("rope_type", "default")
    keys: dict[str, str | int | float] = {"rope.freq_base": theta}
    if rope.get("partial_rotary_factor", 1) != 1:
        raise ModelError("only a part of each head is rotated (partial_rotary_factor)")
    if kind == "default":
        return keys, None
    scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
    if kind == "llama3":
        return keys, _divided_by(config, scaling).astype(numpy.float32)
    if kind not in ("linear", "yarn"):
        raise ModelError(f"its rotary scaling is of type {kind!r}")
    factor = float(rope["factor"])
    keys |= {"rope.scaling.type": kind, "rope.scaling.factor": factor}
    if kind == "yarn":
        own = {"beta_fast": 32, "beta_slow": 1, "mscale": None, "mscale_all_dim": None}
        for key, neutral in own.items():
            if rope.get(key) not in (neutral, None):
                raise ModelError(f"its rotary scaling (YaRN) has {key} {rope[key]}")
        if rope.get("truncate") is False:
            raise ModelError("its rotary scaling (YaRN) has truncate false")
        keys["rope.scaling.original_context_length"] = int(
            rope.get("original_max_position_embeddings") or config.max_position_embeddings
        )
        if (attention := rope.get("attention_factor")) is not None:
            keys["rope.scaling.attn_factor"] = float(attention) / (0.1 * math.log(factor) + 1)
    return keys, None
