"""How much memory is free, and keeping freed memory for the next tensor of its size."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""glibc's names and numbers for mallopt(3)."""
KEEP = 1 << 30


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the device: the GPU's own, or the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo")
    if info.is_file():
        lines = dict(line.split(":", 1) for line in info.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def keep_freed_memory() -> bool:
    """Tell glibc to keep what is freed; elsewhere nothing happens. Returns whether it was told.

    Tensors of a few megabytes come and go by the thousand. By default glibc gives each back to the kernel
    and asks for zeroed pages again, which costs more than many an operation on them.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return False
    return all(mallopt(what, KEEP) for what in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD))
