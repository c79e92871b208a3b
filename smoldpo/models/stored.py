"""In which precision a model's files hold its weights."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

NARROW = {"BF16": torch.bfloat16, "F16": torch.float16}


def narrow_dtype(location: str, types: Collection[str]) -> torch.dtype | None:
    """bfloat16 or float16, where every weight is stored in it; else None, also where it cannot be told.

    Args:
        location: a model folder, or a hub id.
        types: of models for which it may be told. Others may compute with more than their weights:
            Gemma scales embeddings by a number that it makes in the precision in which it is loaded.
    """
    try:
        if _type(location) not in types:
            return None
        found = {dtype for path in _files(location) for dtype in _dtypes(path)}
    except (OSError, ValueError, KeyError, SafetensorError):
        return None  # loading will say what is wrong
    return NARROW.get(found.pop()) if len(found) == 1 else None


def _type(location: str) -> str:
    config = Path(str(cached_file(location, CONFIG_NAME)))
    return str(json.loads(config.read_text(encoding="utf-8"))["model_type"])


def _files(location: str) -> list[str]:
    """Paths of a folder's or a hub model's weights, found in transformers' order."""
    alone = cached_file(location, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False)
    if alone is not None:
        return [alone]
    index = Path(str(cached_file(location, SAFE_WEIGHTS_INDEX_NAME)))
    names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return [str(cached_file(location, name)) for name in sorted(names)]


def _dtypes(path: str) -> set[str]:
    with safe_open(path, "pt") as file:
        return {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
