"""What a model's safetensors files hold, read from their headers before any weight is loaded.

A folder has `model.safetensors`, or shards `model-00001-of-00002.safetensors`, ... and
`model.safetensors.index.json`, which names the shard of each weight.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from smoldpo.utils.errors import ModelError, named_few

SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
NARROW = {"BF16": torch.bfloat16, "F16": torch.float16}
PLAIN = {"F64", "F32", *NARROW}
"""Safetensors' names of the types in which weights lie unpacked."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: the file, its shape, and its type as safetensors names it (F32)."""

    file: str
    shape: tuple[int, ...]
    dtype: str


def stored_tensors(location: str) -> dict[str, StoredTensor] | None:
    """Every tensor that loading would read, by name; None where the hub has no safetensors.

    Args:
        location: a model folder, or a hub id.

    Raises:
        ModelError: files of which some are missing, damaged, unnamed by the index or pickled, or
            that hold one weight twice. It does not say of which model.
    """
    folder = Path(location) if Path(location).is_dir() else None
    paths = _read_files(location, folder)
    if paths is None:
        return None
    tensors: dict[str, StoredTensor] = {}
    for path in paths:
        for name, tensor in headers(path).items():
            if name in tensors:
                raise ModelError(
                    f"{name} lies in {tensors[name].file} and in {tensor.file}, and which one "
                    "counts is not said; get the files again"
                )
            tensors[name] = tensor
    if folder is not None:
        _require_all_read(folder, paths, tensors)
    return tensors


def headers(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, in its order.

    Raises:
        ModelError: the file is damaged or not readable.
    """
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: StoredTensor(path.name, tuple(found.get_shape()), found.get_dtype())
                for name, found in slices.items()
            }
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"cannot be loaded: {path.name} is damaged or incomplete ({error}); get it again"
        ) from None


def _read_files(location: str, folder: Path | None) -> list[Path] | None:
    """The files that transformers reads: the single one, else the shards that the index names."""
    alone = _found(location, SAFE_WEIGHTS_NAME)
    if alone is not None:
        return [alone]
    index = _found(location, SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        if folder is not None:
            raise ModelError(_no_weights(folder))
        return None
    paths = []
    for name in _shards(index):
        path = _found(location, name)
        if path is None:
            raise ModelError(
                f"{SAFE_WEIGHTS_INDEX_NAME} names {name}, which is not there; get that file too"
            )
        paths.append(path)
    return paths


def _found(location: str, name: str) -> Path | None:
    path = cached_file(location, name, _raise_exceptions_for_missing_entries=False)
    return None if path is None else Path(str(path))


def _shards(index: Path) -> list[str]:
    try:
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        shards = sorted(named)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(
            f"{index.name} cannot be read as an index (a JSON object with weight_map); get it again"
        ) from None
    if not shards or any(not isinstance(name, str) or "/" in name for name in shards):
        raise ModelError(f"{index.name} names no files of this folder; get it again")
    return shards


def _no_weights(folder: Path) -> str:
    """Why a folder has no weights to read, in words."""
    there = sorted(path.name for path in folder.glob("*.safetensors"))
    shards = [name for name in there if SHARD.fullmatch(name)]
    if shards:
        some = named_few(shards, 2)
        return f"holds the shards {some}, but no {SAFE_WEIGHTS_INDEX_NAME}; get that file too"
    if there:
        return (
            f"holds {named_few(there, 2)}, but weights are read from {SAFE_WEIGHTS_NAME}, or from "
            f"shards and {SAFE_WEIGHTS_INDEX_NAME}; rename or convert them"
        )
    return "it holds no *.safetensors; convert its weights (pickled weights are never read)"


def _require_all_read(folder: Path, paths: list[Path], known: Mapping[str, StoredTensor]) -> None:
    """Refuse shards in the folder that would not be read: a stale index, or two models in one."""
    read = {path.name for path in paths}
    for path in sorted(folder.glob("model-*.safetensors")):
        if path.name in read or not SHARD.fullmatch(path.name):
            continue
        there = headers(path)
        if SAFE_WEIGHTS_NAME in read:
            raise ModelError(
                f"holds {SAFE_WEIGHTS_NAME} and, of another set of weights, {path.name}; remove "
                "one set"
            )
        new = [name for name in there if name not in known]
        what = f"lacks what lies in {path.name}: {named_few(new or list(there))}"
        raise ModelError(
            f"{SAFE_WEIGHTS_INDEX_NAME} names fewer weights than the folder holds; it {what}. Get "
            "the index that belongs to these shards, or remove shards of another model"
        )


def narrow_dtype(location: str, types: Collection[str]) -> torch.dtype | None:
    """bfloat16 or float16, where every weight is stored in it; else None, also where unknown.

    Args:
        location: a model folder, or a hub id.
        types: of models for which it may be told. Others may compute with more than their weights:
            Gemma scales embeddings by a number that it makes in the precision in which it is
            loaded.
    """
    try:
        if _type(location) not in types:
            return None
        found = {tensor.dtype for tensor in (stored_tensors(location) or {}).values()}
    except (OSError, ValueError, KeyError, ModelError):
        return None  # loading will say what is wrong
    return NARROW.get(found.pop()) if len(found) == 1 else None


def _type(location: str) -> str:
    config = Path(str(cached_file(location, CONFIG_NAME)))
    return str(json.loads(config.read_text(encoding="utf-8"))["model_type"])
