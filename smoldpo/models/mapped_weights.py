"""Weights that stay mapped from their file: which ones may, and the pages of memory they take.

A matrix that does not train may stay in the narrower dtype of its file: products convert what they
need, and in memory it is a part of the file. Its pages become resident when they are read, by a
hash or a conversion as well. They can be released, and are read again when next needed. Only on
Linux: elsewhere nothing is released, and all is 0 bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from transformers import PreTrainedModel

from smoldpo.models.freeze import layer_of
from smoldpo.utils.memory import from_libc

MADV_PAGEOUT = 21
"""Linux's MADV_PAGEOUT: reclaim these pages now; a file's are read again when needed."""


def frozen_matrices(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """The matrices of layers, and of embeddings to which no head is tied, that do not train."""
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return {
        name: weight
        for name, weight in model.named_parameters()
        if weight.dim() == 2
        and not weight.requires_grad
        and (layer_of(name) >= 0 or (weight is embeddings and weight is not head))
    }


def holds_exactly(compute: torch.dtype, stored: torch.dtype) -> bool:
    """Whether `compute` holds every number of `stored`, so that weights may stay as stored.

    A product converts what it needs (engine/kernels/layers.py).
    """
    return torch.promote_types(stored, compute) == compute


def names_kept_as_stored(model: PreTrainedModel, compute: torch.dtype) -> set[str]:
    """Names of the matrices that do not train and need no conversion."""
    frozen = frozen_matrices(model).items()
    return {name for name, weight in frozen if holds_exactly(compute, weight.dtype)}


def release_file_pages(tensors: Iterable[torch.Tensor]) -> int:
    """Release the pages of those tensors that are mapped from a file; their values stay.

    Returns the bytes that Linux was told of; it keeps those that another process has mapped, or
    whose file is not ours.
    """
    return sum(map(file_page_releaser(), tensors))


def file_page_releaser() -> Callable[[torch.Tensor], int]:
    """`release_file_pages` for one tensor after another; mapped files are looked up once, now."""
    madvise, mapped = from_libc("madvise"), _mapped_files()

    def release(tensor: torch.Tensor) -> int:
        first, length = _whole_pages(tensor, mapped)
        if madvise is None or length <= 0:
            return 0
        refused = madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), MADV_PAGEOUT)
        return 0 if refused else length

    return release


def file_page_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes that `release_file_pages` would release."""
    mapped = _mapped_files() if from_libc("madvise") else []
    return sum(_whole_pages(tensor, mapped)[1] for tensor in tensors)


def _whole_pages(tensor: torch.Tensor, mapped: list[tuple[int, int]]) -> tuple[int, int]:
    """Address and length of the whole pages of a tensor mapped from a file; length 0 of others."""
    if tensor.device.type != "cpu":
        return 0, 0
    start, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
    if not any(low <= start and start + size <= high for low, high in mapped):
        return 0, 0
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    return first, max(0, (start + size) // mmap.PAGESIZE * mmap.PAGESIZE - first)


def _mapped_files() -> list[tuple[int, int]]:
    """Address ranges of this process that are mapped from files."""
    ranges = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/maps").read_text(errors="replace").splitlines():
            addresses, _, _, _, inode = line.split()[:5]
            if inode != "0":
                low, high = addresses.split("-")
                ranges.append((int(low, 16), int(high, 16)))
    return ranges
