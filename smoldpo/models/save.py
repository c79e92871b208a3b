"""What a run leaves for others: a folder that `from_pretrained` opens, with a model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from smoldpo.models.adapter_folders import AdapterBase, sort_modules, write_base
from smoldpo.models.builtin import BUILTIN, CARD_BASE
from smoldpo.models.hf_logging import quiet
from smoldpo.models.load import ModelSource
from smoldpo.models.mapped_weights import release_file_pages
from smoldpo.models.older_readers import add_older_names
from smoldpo.utils.files import not_saved, staged_folder, write_json, write_text


def model_bytes(model: PreTrainedModel, dtype: torch.dtype) -> int:
    """Bytes of the model's parameters in `dtype`, each counted once."""
    return sum(p.numel() for p in model.parameters()) * dtype.itemsize


def save_model(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    card: str,
    full: torch.dtype,
) -> None:
    """Save weights (safetensors, in `full`), tokenizer and card as one folder, whole or not at all.

    Raises:
        SmoldpoError: the disk is full or not writable; what was there before is untouched.
    """
    try:
        with staged_folder(folder) as staging, quiet():
            save_in_full(staging, model, full)
            tokenizer.save_pretrained(staging)
            add_older_names(staging)
            write_text(staging / "README.md", card)
    except (OSError, SafetensorError) as error:
        raise not_saved(folder, "the model", model_bytes(model, full), error) from None


def save_adapter(
    folder: Path,
    adapted: Any,
    tokenizer: PreTrainedTokenizerBase,
    card: str,
    source: ModelSource,
    base: AdapterBase,
) -> None:
    """Save peft's model `adapted` as an adapter: its weights and configuration, tokenizer and card.

    Its base is named twice: for peft as others find it, for smoldpo as it was
    (models/adapter_folders.py).

    Raises:
        SmoldpoError: as save_model.
    """
    config = adapted.peft_config["default"]
    config.base_model_name_or_path = _found_by_others(source)
    size = sum(p.numel() * p.element_size() for n, p in adapted.named_parameters() if "lora_" in n)
    try:
        with staged_folder(folder) as staging, quiet():
            adapted.save_pretrained(staging, safe_serialization=True, save_embedding_layers=False)
            sort_modules(staging)
            tokenizer.save_pretrained(staging)
            add_older_names(staging)
            write_base(staging, base)
            write_text(staging / "README.md", card)
    except (OSError, SafetensorError) as error:
        raise not_saved(folder, "the adapter", size, error) from None


def base_of(source: ModelSource, sha256: str, dtype: str) -> AdapterBase:
    """How smoldpo finds the base again: by its name, a folder or file by its absolute path."""
    path = Path(source.name).expanduser()
    is_path = source.name != BUILTIN and path.exists()
    return AdapterBase(str(path.absolute()) if is_path else source.name, sha256, dtype)


def _found_by_others(source: ModelSource) -> str:
    """The hub id where there is one; else the folder on this machine."""
    if source.name in CARD_BASE:
        return CARD_BASE[source.name]
    return str(Path(source.location).absolute()) if source.is_local else source.location


# Saving a model in full precision, of which parts lie in the narrower one of the files they come
# from.


SHARD_BYTES = 1 << 30
"""Of one file, in full precision: what is converted, and lies in memory, at a time."""


def save_in_full(folder: Path, model: PreTrainedModel, full: torch.dtype) -> None:
    """What `model.save_pretrained` would write of the same model in `full`, file by file.

    Raises:
        OSError, SafetensorError: the disk is full or not writable.
    """
    if {parameter.dtype for parameter in model.parameters()} == {full}:
        model.save_pretrained(folder)
        return
    named = dict(model.named_parameters())  # tied ones once
    narrowest = min(parameter.dtype.itemsize for parameter in named.values())
    split = split_torch_state_dict_into_shards(
        {name: parameter.detach() for name, parameter in named.items()},
        max_shard_size=SHARD_BYTES * narrowest // full.itemsize,
    )
    for file, names in split.filename_to_tensors.items():
        shard = {name: named[name].detach().to(full).contiguous() for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
        release_file_pages(named[name] for name in names)
    if split.is_sharded:
        size = sum(parameter.numel() for parameter in named.values()) * full.itemsize
        index = {"metadata": {"total_size": size}, "weight_map": split.tensor_to_filename}
        write_json(folder / SAFE_WEIGHTS_INDEX_NAME, index)
    model.config.dtype = str(full).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
