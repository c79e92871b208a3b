"""How much memory is free, and giving back what is not needed now.

While batches come and go, freed memory is kept for the next tensor of its size; between phases it
is returned to the system; and pages of a weights file that were read once are released. Only on
Linux: elsewhere the functions that release do nothing, and return False, or 0 bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil
import torch

if sys.platform != "win32":
    import resource

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""glibc's names and numbers for mallopt(3)."""
KEEP = 1 << 30
MADV_PAGEOUT = 21
"""Linux's MADV_PAGEOUT: reclaim these pages now; a file's are read again when needed."""


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take on the device: the GPU's own, or the machine's.

    Of the machine's, no more than a container or a limit of the process (ulimit -v) leaves.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(
        max(0, min(psutil.virtual_memory().available, _left_in_container(), _left_of_limit()))
    )


def _left_in_container(folder: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes that a container (cgroup, version 2) has left, its file cache counted as free."""
    try:
        most, used = (folder / "memory.max").read_text(), (folder / "memory.current").read_text()
        facts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int(most) - int(used) + int(facts["inactive_file"])
    except (OSError, ValueError, KeyError):  # no container, none of version 2, or "max": no limit
        return math.inf


def _left_of_limit() -> float:
    """Bytes that RLIMIT_AS leaves."""
    if sys.platform == "win32":
        return math.inf
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return math.inf
    return limit - psutil.Process().memory_info().vms


def keep_freed_memory() -> bool:
    """Tell glibc to keep what is freed; elsewhere nothing happens. Returns whether it was told.

    Tensors of a few megabytes come and go by the thousand. By default glibc gives each back to the
    kernel and asks for zeroed pages again, which costs more than many an operation on them.
    """
    mallopt = _from_libc("mallopt")
    if mallopt is None:
        return False
    # Before glibc 2.35 the first is refused above 32 MB.
    mapped = mallopt(M_MMAP_THRESHOLD, KEEP) or mallopt(M_MMAP_THRESHOLD, 32 << 20)
    return bool(mallopt(M_TRIM_THRESHOLD, KEEP) and mapped)


def trim_memory() -> bool:
    """Return to the system what was freed and kept, between phases of a run."""
    malloc_trim = _from_libc("malloc_trim")
    return malloc_trim is not None and bool(malloc_trim(ctypes.c_size_t(0)))


def release_file_pages(tensors: Iterable[torch.Tensor]) -> int:
    """Release the pages of those tensors that are mapped from a file; their values stay.

    A weights file is mapped into memory, so hashing or converting it makes all of it resident.
    Returns the bytes that Linux was told of; it keeps those that another process has mapped, or
    whose file is not ours.
    """
    return sum(map(file_page_releaser(), tensors))


def file_page_releaser() -> Callable[[torch.Tensor], int]:
    """`release_file_pages` for one tensor after another; mapped files are looked up once, now."""
    madvise, mapped = _from_libc("madvise"), _mapped_files()

    def release(tensor: torch.Tensor) -> int:
        first, length = _whole_pages(tensor, mapped)
        if madvise is None or length <= 0:
            return 0
        refused = madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), MADV_PAGEOUT)
        return 0 if refused else length

    return release


def file_page_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes that `release_file_pages` would release."""
    mapped = _mapped_files() if _from_libc("madvise") else []
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


def _from_libc(name: str) -> Any:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), name, None)  # another C library may not have it
