"""SmolLM3 in GGUF files, which transformers (5.23) does not read.

llama.cpp (models/smollm3.cpp) leaves every fourth layer without rotary embedding: no key says it.
Of the others it turns neighbours of a head, so that rows of queries and keys lie as Llama's do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gguf
import numpy
import torch
from transformers import PreTrainedModel, SmolLM3Config

from smoldpo.utils.errors import ModelError, named_few

ARCHITECTURE = "smollm3"
STEP = 4
"""Of so many layers the last has no rotary embedding."""


def rotated_layers(layers: int) -> list[int]:
    """1 for each layer that has a rotary embedding in llama.cpp, 0 for those without."""
    return [int((layer + 1) % STEP != 0) for layer in range(layers)]


def smollm3_config(fields: Mapping[str, Any], tensors: Mapping[str, Any]) -> SmolLM3Config:
    """The configuration that the file's keys say, without rotary scaling.

    Raises:
        ModelError: a key is missing.
    """
    try:
        said = {key: fields[f"{ARCHITECTURE}.{key}"] for key in (
            "embedding_length", "feed_forward_length", "block_count", "attention.head_count",
            "context_length", "attention.layer_norm_rms_epsilon",
        )}  # fmt: skip
    except KeyError as error:
        raise ModelError(f"it lacks the key {error.args[0]}") from None
    heads, layers = said["attention.head_count"], said["block_count"]
    ids: dict[str, Any] = {
        f"{name}_token_id": fields.get(f"tokenizer.ggml.{key}_token_id")
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    return SmolLM3Config(
        vocab_size=int(tensors["token_embd.weight"].shape[-1]),
        hidden_size=said["embedding_length"],
        intermediate_size=said["feed_forward_length"],
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=fields.get(f"{ARCHITECTURE}.attention.head_count_kv", heads),
        max_position_embeddings=said["context_length"],
        rms_norm_eps=said["attention.layer_norm_rms_epsilon"],
        rope_parameters={
            "rope_type": "default",
            "rope_theta": float(fields.get(f"{ARCHITECTURE}.rope.freq_base", 10000.0)),
        },
        no_rope_layers=rotated_layers(layers),
        use_sliding_window=False,
        tie_word_embeddings="output.weight" not in tensors,
        **ids,
    )


def smollm3_weights(named: PreTrainedModel, tensors: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The model's weights in float32, by transformers' names.

    Args:
        named: the model, its weights on no device.

    Raises:
        ModelError: tensors for which the model has no place.
    """
    config: Any = named.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.SMOLLM3, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    found: dict[str, torch.Tensor] = {}
    used: set[str] = set()
    for name, _ in named.named_parameters():
        called = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if called is None or called not in tensors:
            continue  # which loading refuses, by name
        used.add(called)
        tensor = tensors[called]
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(numpy.float32, copy=True)
        weight = torch.from_numpy(values.reshape(tuple(int(n) for n in reversed(tensor.shape))))
        count = heads.get(name.rsplit(".", 2)[-2])
        found[name] = weight if count is None else halved(weight, count)
    if left := sorted(tensors.keys() - used):
        raise ModelError(f"it holds {named_few(left)}, for which SmolLM3 has no place")
    return found


def halved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key matrix in transformers' order: the reverse of `interleaved`."""
    pairs = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)
