"""A model as a GGUF file, tensor by tensor, in llama.cpp's names and order of rows.

The keys and their meaning are those of the GGUF specification and of llama.cpp's converter. What
llama.cpp would compute otherwise than the model does is refused, never written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy
import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from smoldpo.export.llama_quantize import SMALLER, require_program
from smoldpo.export.source import About
from smoldpo.export.vocabulary import add_vocabulary
from smoldpo.models.gguf_rope import FREQUENCIES, rope_metadata
from smoldpo.models.gguf_smollm3 import rotated_layers
from smoldpo.models.mapped_weights import release_file_pages
from smoldpo.utils import progress
from smoldpo.utils.errors import ModelError, UsageError, nearest

TYPES = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
"""Of matrices; vectors (norms, biases) are in float32 always."""
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "smollm3": gguf.MODEL_ARCH.SMOLLM3,
}
"""Model types that can go, and what llama.cpp computes them as."""
INTERLEAVED = {gguf.MODEL_ARCH.LLAMA, gguf.MODEL_ARCH.SMOLLM3}
"""Architectures whose rotary embedding turns neighbours; transformers turns halves of a head."""


def require_type(name: str) -> str:
    """The type of matrices by its name, as `--quantize` gives it.

    Raises:
        UsageError: none that can be written here; of the smaller ones, how to get the program.
    """
    known = name.lower()
    if known in SMALLER:
        require_program(known)
    elif known not in TYPES:
        every = (*TYPES, *SMALLER)
        raise UsageError(
            f"--quantize {name}: give one of {', '.join(every)}{nearest(known, every)}"
        )
    return known


def require_exportable(model: PreTrainedModel) -> None:
    """Refuse what llama.cpp would compute otherwise, or what is not read back.

    Raises:
        ModelError: why.
    """
    config: Any = model.config
    if config.model_type not in ARCHITECTURES:
        raise ModelError(
            f"a model of type {config.model_type!r} cannot be exported as GGUF; those of type "
            f"{', '.join(ARCHITECTURES)} can (others: llama.cpp's convert_hf_to_gguf.py)"
        )
    if config.hidden_act != "silu":
        raise ModelError(f"its activation is {config.hidden_act!r}, and llama.cpp computes silu")
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if window and window < config.max_position_embeddings and kinds != {"full_attention"}:
        raise ModelError(f"its sliding window ({window} tokens) is not what llama.cpp computes")
    expected = {"qwen2": ("q_proj", "k_proj", "v_proj")}.get(config.model_type, ())
    for name, _ in model.named_parameters():
        if name.endswith(".bias") and not name.removesuffix(".bias").endswith(expected or ("-",)):
            raise ModelError(f"{name}: GGUF files of this architecture are read without this bias")
    layers = config.num_hidden_layers
    if getattr(config, "no_rope_layers", None) not in (None, rotated_layers(layers)):
        raise ModelError("its layers without rotary embedding are not every fourth: no_rope_layers")
    rope_metadata(config)


def file_bytes(model: PreTrainedModel, kind: str) -> int:
    """About how many bytes the file will have: its tensors, and a share for the vocabulary."""
    return sum(tensor.nbytes for tensor in _tensors(model, kind)) + (16 << 20)


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    kind: str,
    about: About,
) -> None:
    """Write the whole file; one tensor at a time is converted.

    Args:
        kind: of TYPES.

    Raises:
        ModelError: what `require_exportable` refuses, a tokenizer that a GGUF file cannot say, or
            weights beyond float16's range.
        OSError: the disk is full or not writable.
    """
    require_exportable(model)
    arch = ARCHITECTURES[model.config.model_type]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    try:
        _add_general(writer, model, about)
        _add_hyperparameters(writer, model.config)
        writer.add_file_type(TYPES[kind][1])
        add_vocabulary(writer, tokenizer, model)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        tensors = list(_tensors(model, kind))
        for tensor in tensors:
            writer.add_tensor_info(
                tensor.name, tensor.stored_shape, tensor.dtype, tensor.nbytes, tensor.type
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with progress.bar(f"writing {kind}", len(tensors)) as advance:
            for tensor in tensors:
                writer.write_tensor_data(tensor.values())
                advance(1)
    finally:
        writer.close()


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the file; its values are made when they are asked for."""

    name: str
    weight: torch.Tensor
    type: gguf.GGMLQuantizationType
    heads: int | None = None
    """Whose rows are put into llama.cpp's order."""

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """In bytes for what numpy has no type of."""
        if self.dtype == numpy.uint8:
            return gguf.quant_shape_to_byte_shape(tuple(self.weight.shape), self.type)
        return tuple(self.weight.shape)

    @property
    def dtype(self) -> numpy.dtype:
        plain = {
            gguf.GGMLQuantizationType.F32: numpy.float32,
            gguf.GGMLQuantizationType.F16: numpy.float16,
        }
        return numpy.dtype(plain.get(self.type, numpy.uint8))

    @property
    def nbytes(self) -> int:
        return int(numpy.prod(self.stored_shape)) * self.dtype.itemsize

    def values(self) -> numpy.ndarray:
        """As the file holds them.

        Raises:
            ModelError: a weight is not finite, or beyond float16's range.
        """
        weight = self.weight.detach()
        if self.heads is not None:
            weight = interleaved(weight, self.heads)
        found = weight.to("cpu", torch.float32).contiguous().numpy()
        with numpy.errstate(over="ignore"):
            stored = gguf.quantize(found, self.type)
        largest = float(numpy.abs([found.min(), found.max()]).max())  # without a copy of it all
        if self.type == gguf.GGMLQuantizationType.F16 and not numpy.isfinite(stored).all():
            raise ModelError(
                f"{self.name} holds {largest:g}, beyond float16's range; export bf16 or f32"
            )
        if not numpy.isfinite(largest):
            raise ModelError(f"{self.name} holds a number that is not finite")
        release_file_pages([self.weight])
        return stored


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key matrix (or bias) in llama.cpp's order.

    Of a head of width D transformers turns rows i and i + D/2 together; llama.cpp, 2i and 2i + 1.
    """
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def heads_of(config: Any, module: str) -> int | None:
    """The heads of a module whose rows have another order in GGUF files, else None."""
    if ARCHITECTURES[config.model_type] not in INTERLEAVED:
        return None
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return heads.get(module.rsplit(".", 1)[-1])


def _tensors(model: PreTrainedModel, kind: str) -> Iterator[_Tensor]:
    """What the file holds, in its order; a tied LM head is not written."""
    config: Any = model.config
    arch = ARCHITECTURES[config.model_type]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    _, frequencies = rope_metadata(config)
    if frequencies is not None:
        yield _Tensor(FREQUENCIES, torch.from_numpy(frequencies), gguf.GGMLQuantizationType.F32)
    for name, weight in model.named_parameters():
        called = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if called is None:
            raise ModelError(f"{name}: GGUF has no name for it in this architecture")
        heads = heads_of(config, name.rsplit(".", 1)[0])
        yield _Tensor(called, weight, _type(weight, kind), heads)


def _type(weight: torch.Tensor, kind: str) -> gguf.GGMLQuantizationType:
    wanted = TYPES[kind][0]
    if weight.dim() < 2:
        return gguf.GGMLQuantizationType.F32
    block, _ = gguf.GGML_QUANT_SIZES[wanted]
    return wanted if weight.shape[-1] % block == 0 else gguf.GGMLQuantizationType.F16


def _add_general(writer: gguf.GGUFWriter, model: PreTrainedModel, about: About) -> None:
    total = sum(weight.numel() for _, weight in model.named_parameters())
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(about.name)
    writer.add_size_label(gguf.size_label(total, 0, 0, 0))
    if about.license:
        writer.add_license(about.license)
    if about.base_model:
        organization, _, name = about.base_model.rpartition("/")
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, name.replace("-", " "))
        if organization:
            writer.add_base_model_organization(0, organization)
            writer.add_base_model_repo_url(0, f"https://huggingface.co/{about.base_model}")


def _add_hyperparameters(writer: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
    said: Any = config
    width = getattr(said, "head_dim", None) or said.hidden_size // said.num_attention_heads
    writer.add_block_count(said.num_hidden_layers)
    writer.add_context_length(said.max_position_embeddings)
    writer.add_embedding_length(said.hidden_size)
    writer.add_feed_forward_length(said.intermediate_size)
    writer.add_head_count(said.num_attention_heads)
    writer.add_head_count_kv(said.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(said.rms_norm_eps)
    writer.add_vocab_size(said.vocab_size)
    writer.add_rope_dimension_count(width)
    keys, _ = rope_metadata(config)
    add: Mapping[type, Any] = {
        str: writer.add_string,
        int: writer.add_uint32,
        float: writer.add_float32,
    }
    for key, value in keys.items():
        add[type(value)](f"{writer.arch}.{key}", value)
