"""What was measured of this machine, and chosen by it, kept in the cache folder: machine.json and rates.json.

A choice of kernels or precision changes the last bits of results and the keys of what is kept between runs.
Beside other work the same measurement may come out otherwise, so what was chosen before stands until
something else is clearly better. `smoldpo cache clear` forgets it.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import torch

from smoldpo.cache import machine_file, rates_file
from smoldpo.files import processor_name, write_json

KEPT_RATES = 16
"""Rates of so many commands are kept."""


def chosen_before(name: str) -> Any:
    """What was kept under this name; None without, or with another processor, torch or number of threads."""
    return _read(machine_file()).get(name)


def keep(name: str, choice: Any) -> None:
    """Keep a choice (JSON); where nothing can be written, the next run measures afresh."""
    _write(machine_file(), name, choice)


def earlier_rates(name: str) -> list[float]:
    """What the last commands kept under this name, the latest last."""
    found = _read(rates_file()).get(name)
    return [float(rate) for rate in found if _is_number(rate)] if isinstance(found, list) else []


def keep_rate(name: str, rate: float) -> None:
    """Add to them. Each command does, so they have a file of their own: two at once lose no choice."""
    _write(rates_file(), name, [*earlier_rates(name), rate][-KEPT_RATES:])


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and value > 0


def _write(file: Path, name: str, value: Any) -> None:
    there = _read(file)
    if there.get(name) != value:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, {"machine": _machine(), "choices": there | {name: value}})


def _machine() -> dict[str, Any]:
    threads = torch.get_num_threads()
    return {"processor": processor_name(), "torch": torch.__version__, "threads": threads}


def _read(file: Path) -> dict[str, Any]:
    """Everything that was kept of this machine; what cannot be read counts as nothing."""
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        choices = kept["choices"] if kept["machine"] == _machine() else {}
    except (OSError, ValueError, LookupError, TypeError):
        return {}
    return choices if isinstance(choices, dict) else {}
