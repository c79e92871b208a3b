"""Ranks for tests: processes forked from the server of faults/child.py, with torchrun's variables.

torchrun itself starts what is launched in tests/cli/test_launch.py; it takes seconds for imports.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from faults import child


def variables(count: int) -> list[dict[str, str]]:
    """What torchrun would set for each of so many ranks on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [shared | {"RANK": str(n), "LOCAL_RANK": str(n)} for n in range(count)]


def computed(
    work: Callable[..., dict[str, torch.Tensor]], count: int, folder: Path, *arguments: Any
) -> dict[str, torch.Tensor]:
    """What `work` gives on the first of so many ranks, all of which call it; with a limit."""
    child.prepare_server()
    path = folder / f"{count}.safetensors"
    processes = [
        child._context.Process(target=_work, args=(work, path, told, arguments))
        for told in variables(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        ended = process.exitcode
        process.kill()
        assert ended == 0, f"exit code {ended}"
    return load_file(path)


def _work(work: Callable, path: Path, environment: dict[str, str], arguments: Sequence) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    from smoldpo.utils.rank_group import joined

    with joined() as ranks:
        found = work(*arguments)
        if ranks.first:
            save_file({name: each.contiguous() for name, each in found.items()}, path)
