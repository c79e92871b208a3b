"""Saving a model in full precision, of which parts lie in the narrower one of the files they come from."""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from smoldpo.engine.memory import let_go_of_file_pages
from smoldpo.files import write_json

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
        let_go_of_file_pages(named[name] for name in names)
    if split.is_sharded:
        size = sum(parameter.numel() for parameter in named.values()) * full.itemsize
        index = {"metadata": {"total_size": size}, "weight_map": split.tensor_to_filename}
        write_json(folder / SAFE_WEIGHTS_INDEX_NAME, index)
    model.config.dtype = str(full).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
