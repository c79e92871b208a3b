"""What was measured of this machine, and chosen by it, kept in the cache folder: <cache>/machine.json.

A choice of kernels or precision changes the last bits of results and the keys of what is kept between runs.
Beside other work the same measurement may come out otherwise, so what was chosen before stands until
something else is clearly better. `smoldpo cache clear` forgets it.
"""

from __future__ import annotations

import contextlib
import json
from typing import Any

import torch

from smoldpo.cache import machine_file
from smoldpo.files import processor_name, write_json


def chosen_before(name: str) -> Any:
    """What was kept under this name; None without, or with another processor, torch or number of threads."""
    return _read().get(name)


def keep(name: str, choice: Any) -> None:
    """Keep a choice (JSON); where nothing can be written, the next run measures afresh."""
    choices = _read()
    if choices.get(name) != choice:
        with contextlib.suppress(OSError):
            machine_file().parent.mkdir(parents=True, exist_ok=True)
            write_json(machine_file(), {"machine": _machine(), "choices": choices | {name: choice}})


def _machine() -> dict[str, Any]:
    threads = torch.get_num_threads()
    return {"processor": processor_name(), "torch": torch.__version__, "threads": threads}


def _read() -> dict[str, Any]:
    """Every choice made on this machine; what cannot be read counts as none."""
    try:
        kept = json.loads(machine_file().read_text(encoding="utf-8"))
        choices = kept["choices"] if kept["machine"] == _machine() else {}
    except (OSError, ValueError, LookupError, TypeError):
        return {}
    return choices if isinstance(choices, dict) else {}
