"""A model as a folder for mlx-lm.

mlx-lm reads what transformers reads, but from config.json it takes what stands at its top, and of
what is not there its own defaults, without a word: 10,000 for the rotary base, tied embeddings.
So everything is said there. Quantised weights are mlx's own, made and unpacked by it alone.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import CONFIG_NAME

from smoldpo.export import mlx_lm, verify
from smoldpo.export.proof import Proof
from smoldpo.export.verify import Witness
from smoldpo.models.completeness import require_complete
from smoldpo.models.families import FAMILIES
from smoldpo.models.gguf import from_weights
from smoldpo.models.hf_logging import quiet
from smoldpo.models.load import ModelSource, load_model, load_tokenizer
from smoldpo.models.older_readers import add_older_names
from smoldpo.models.save import model_bytes, save_in_full
from smoldpo.utils import progress
from smoldpo.utils.errors import ModelError, UsageError, nearest

PLAIN = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
QUANTIZED = {"q8": 8, "q6": 6, "q4": 4}
"""Bits of a weight; 64 weights share a scale and an offset in float16."""
GROUP = 64
BOUNDS = verify.BOUNDS | {"f32": 1e-3}
"""Of mlx-lm's mean |Δ log p| a token, in nats; measured: docs/export.md."""


def require_kind(name: str) -> str:
    """The type of the weights by its name.

    Raises:
        UsageError: none that there is; one that takes mlx, where that is not installed.
    """
    kind, every = name.lower(), (*PLAIN, *QUANTIZED)
    if kind not in every:
        raise UsageError(
            f"--quantize {name}: give one of {', '.join(every)}{nearest(kind, every)} for --to mlx"
        )
    if kind in QUANTIZED and not mlx_lm.is_installed():
        raise UsageError(
            f"--quantize {name}: is made by mlx, which is not installed; "
            "pip install mlx mlx-lm (on Linux 'mlx[cpu]'), or export f16 and call "
            f"mlx_lm.convert --quantize --q-bits {QUANTIZED[kind]} on a Mac"
        )
    return kind


def require_exportable(model: PreTrainedModel) -> None:
    """Refuse what mlx-lm would compute otherwise.

    Raises:
        ModelError: why.
    """
    config: Any = model.config
    if config.model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ModelError(
            f"a model of type {config.model_type!r} cannot be exported for mlx-lm here; those of "
            f"type {known} can (others: mlx_lm.convert)"
        )
    if config.hidden_act != "silu":
        raise ModelError(f"its activation is {config.hidden_act!r}, and mlx-lm computes silu")
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if window and window < config.max_position_embeddings and kinds != {"full_attention"}:
        raise ModelError(f"its sliding window ({window} tokens) is not what mlx-lm computes")
    width = config.hidden_size // config.num_attention_heads
    if config.model_type == "qwen2" and (getattr(config, "head_dim", None) or width) != width:
        raise ModelError(
            "its heads have a width of their own (head_dim), which mlx-lm does not read"
        )
    _require_rope(dict(config.rope_parameters or {}))


def _require_rope(rope: dict[str, Any]) -> None:
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise ModelError(f"its rotary scaling is of type {kind!r}")
    if rope.get("partial_rotary_factor", 1) != 1:
        raise ModelError("only a part of each head is rotated (partial_rotary_factor)")
    unread = {"attention_factor": None, "mscale": None, "mscale_all_dim": None}
    for key, neutral in unread.items():
        if kind == "yarn" and rope.get(key) != neutral:
            raise ModelError(f"its rotary scaling (YaRN) has {key} {rope[key]}")
    if kind == "yarn" and rope.get("truncate") is False:
        raise ModelError("its rotary scaling (YaRN) has truncate false")


def folder_bytes(model: PreTrainedModel, kind: str) -> int:
    """About how many bytes the folder takes while it is made: weights, and a share for the rest."""
    plain = model_bytes(model, PLAIN.get(kind, torch.float16))
    return plain * (2 if kind in QUANTIZED else 1) + (16 << 20)


def write_mlx(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, kind: str
) -> None:
    """Write the whole folder.

    Args:
        kind: of PLAIN or QUANTIZED.

    Raises:
        ModelError: what `require_exportable` refuses.
        OSError, SafetensorError: the disk is full or not writable.
    """
    require_exportable(model)
    plain = folder if kind in PLAIN else folder.with_name(f"f16-{folder.name}")
    plain.mkdir(exist_ok=True)
    with progress.spinner(f"writing {kind}"), quiet():
        save_in_full(plain, model, PLAIN.get(kind, torch.float16))
        model.config.to_json_file(plain / CONFIG_NAME, use_diff=False)
        add_older_names(plain)
        if kind in QUANTIZED:
            mlx_lm.quantize(plain, folder, QUANTIZED[kind], GROUP)
            shutil.rmtree(plain)
    tokenizer.save_pretrained(folder)
    add_older_names(folder)


def read_back(folder: Path, kind: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a folder, as transformers reads them; mlx unpacks what is quantised.

    Raises:
        ModelError: the folder does not hold exactly a model.
    """
    source = ModelSource(str(folder), str(folder))
    tokenizer = load_tokenizer(source)
    if kind in PLAIN:
        return load_model(source, torch.float32, as_stored=FAMILIES), tokenizer
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config, config.quantization
    with torch.device("meta"):
        named = AutoModelForCausalLM.from_config(config)
    model, loading = from_weights(named, mlx_lm.unpacked(folder))
    require_complete(model, loading, {})
    return model.eval(), tokenizer


def ask(folder: Path, proof: Proof, kind: str, adapter: Path | None = None) -> Witness:
    """What mlx-lm makes of a folder, held against the model on a few pairs.

    Raises:
        VerificationError: it does not load the folder, or computes something else.
    """
    places = mlx_lm.asked(proof.model.tokens)
    some = [proof.model.tokens[place] for place in places]
    after = mlx_lm.measure(folder, some, proof.how, proof.specials, adapter)
    return mlx_lm.witness(proof.compare(after, kind, places, BOUNDS))
