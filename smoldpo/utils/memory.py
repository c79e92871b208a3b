"""How much memory is free, and giving back what is not needed now.

While batches come and go, freed memory is kept for the next tensor of its size; between phases it
is returned to the system. Only on Linux: elsewhere these two do nothing, and return False.
"""

from __future__ import annotations

import ctypes
import math
import sys
from pathlib import Path
from typing import Any

import psutil
import torch

from smoldpo.utils.errors import OutOfMemoryError

if sys.platform != "win32":
    import resource

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""glibc's names and numbers for mallopt(3)."""
KEEP = 1 << 30
ALLOCATION_FAILED = (
    "not enough memory",
    "can't allocate memory",
    "could not create a memory",
    "out of memory",
)
"""What torch and oneDNN say on a CPU, and torch on MPS, in a plain RuntimeError."""


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error, of whatever library, says that memory could not be had."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError | OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(w in str(error) for w in ALLOCATION_FAILED)


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
    mallopt = from_libc("mallopt")
    if mallopt is None:
        return False
    # Before glibc 2.35 the first is refused above 32 MB.
    mapped = mallopt(M_MMAP_THRESHOLD, KEEP) or mallopt(M_MMAP_THRESHOLD, 32 << 20)
    return bool(mallopt(M_TRIM_THRESHOLD, KEEP) and mapped)


def trim_memory() -> bool:
    """Return to the system what was freed and kept, between phases of a run."""
    malloc_trim = from_libc("malloc_trim")
    return malloc_trim is not None and bool(malloc_trim(ctypes.c_size_t(0)))


def from_libc(name: str) -> Any:
    """A function of the C library, on Linux; None where there is none of that name."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), name, None)  # another C library may not have it
