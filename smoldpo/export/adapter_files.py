"""Adapters as llama.cpp and mlx-lm take them: written, and read back into a plain model.

llama.cpp adds alpha / r · B A, with one alpha for all layers; mlx-lm adds scale · B A, with one
scale and one rank. What peft scales otherwise (rsLoRA, patterns of ranks) goes into B, and smaller
ranks are filled up with zeros: what is added stays the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import pad
from transformers import PreTrainedModel

from smoldpo.export.gguf import ARCHITECTURES, heads_of, interleaved
from smoldpo.models.adapter_folders import LowRank
from smoldpo.models.freeze import decoder_layers
from smoldpo.utils.errors import ModelError
from smoldpo.utils.files import write_json

WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"
"""mlx-lm's names."""
LORA_A, LORA_B = ".lora_a", ".lora_b"


def write_gguf_adapter(
    path: Path, parts: Sequence[LowRank], model: PreTrainedModel, name: str
) -> None:
    """One GGUF file in float32 for llama.cpp's --lora; rows of B in llama.cpp's order.

    Args:
        model: the one that the adapter belongs to.

    Raises:
        ModelError: DoRA, which llama.cpp does not know.
    """
    config: Any = model.config
    if any(part.magnitude is not None for part in parts):
        raise ModelError("its adapter is DoRA, which llama.cpp does not know; export it merged")
    arch = ARCHITECTURES[config.model_type]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    alpha = parts[0].scaling * len(parts[0].a)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_name(name)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        for part in parts:
            b = part.b * (part.scaling * len(part.a) / alpha)
            heads = heads_of(config, part.name)
            called = f"{names.get_name(part.name)}.weight"
            writer.add_tensor(called + LORA_A, _array(part.a))
            writer.add_tensor(called + LORA_B, _array(interleaved(b, heads) if heads else b))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def read_gguf_adapter(path: Path, model: PreTrainedModel) -> None:
    """Add the file's adapter into the weights of its model, as llama.cpp does."""
    config: Any = model.config
    reader = gguf.GGUFReader(path)
    alpha = reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents()
    stored = {t.name: torch.from_numpy(numpy.array(t.data)) for t in reader.tensors}
    arch = ARCHITECTURES[config.model_type]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, weight in _weights(model).items():
        called = f"{names.get_name(name)}.weight"
        if called + LORA_B not in stored:
            continue
        a, b = stored.pop(called + LORA_A), stored.pop(called + LORA_B)
        if heads := heads_of(config, name):
            b = torch.empty_like(b).index_copy_(0, _order(len(b), heads), b)
        weight.data += alpha / len(a) * (b @ a)
    if stored:
        raise ModelError(f"{path.name} holds {min(stored)}, for which its model has no place")


def _order(rows: int, heads: int) -> torch.Tensor:
    """Which row of the model is in each place of llama.cpp's order."""
    return interleaved(torch.arange(rows)[:, None], heads)[:, 0]


def write_mlx_adapter(folder: Path, parts: Sequence[LowRank], model: PreTrainedModel) -> None:
    """A folder for mlx-lm's --adapter-path, in float32."""
    scale, rank = parts[0].scaling, max(len(part.a) for part in parts)
    weights: dict[str, torch.Tensor] = {}
    for part in parts:
        b = part.b * (part.scaling / scale)
        missing = rank - len(part.a)
        weights[part.name + LORA_A] = pad(part.a, (0, 0, 0, missing)).T
        weights[part.name + LORA_B] = pad(b, (0, missing)).T
        if part.magnitude is not None:
            weights[f"{part.name}.m"] = part.magnitude
    kinds = {part.magnitude is not None for part in parts}
    if len(kinds) > 1:
        raise ModelError("some of its layers are DoRA and others LoRA; export it merged")
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / WEIGHTS)
    keys = sorted({part.name.split(".", 3)[3] for part in parts})
    said = {
        "fine_tune_type": "dora" if kinds == {True} else "lora",
        "num_layers": decoder_layers(model),
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0, "keys": keys},
    }
    write_json(folder / CONFIG, said)


def read_mlx_adapter(folder: Path, model: PreTrainedModel) -> None:
    """Add the folder's adapter into the weights of its model, as mlx-lm does."""
    scale = json.loads((folder / CONFIG).read_text())["lora_parameters"]["scale"]
    stored = load_file(folder / WEIGHTS)
    for name, weight in _weights(model).items():
        if name + LORA_B not in stored:
            continue
        a, b = stored.pop(name + LORA_A), stored.pop(name + LORA_B)
        weight.data += scale * (a @ b).T
        if (magnitude := stored.pop(f"{name}.m", None)) is not None:
            weight.data *= (magnitude / torch.linalg.norm(weight.data, dim=1))[:, None]
    if stored:
        raise ModelError(f"{WEIGHTS} holds {min(stored)}, for which its model has no place")


def _weights(model: PreTrainedModel) -> Mapping[str, torch.Tensor]:
    return {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


def _array(weight: torch.Tensor) -> numpy.ndarray:
    return weight.to("cpu", torch.float32).contiguous().numpy()
