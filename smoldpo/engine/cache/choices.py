"""What was measured of this machine, and chosen by it: machine.json and rates.json of the cache.

A choice of kernels or precision changes the last bits of results, and the keys of what is stored.
Beside other work the same measurement may come out otherwise, so an earlier choice stands until
another is clearly better. `smoldpo cache clear` removes both files.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import torch

from smoldpo.utils.files import cache_folder, processor_name, write_json

STORED_RATES = 16
"""Rates of so many commands are stored."""


def choices_file() -> Path:
    """Where the choices are."""
    return cache_folder() / "machine.json"


def rates_file() -> Path:
    """Where the rates are. Each command adds to them, so that two at once lose no choice."""
    return cache_folder() / "rates.json"


def stored_choice(name: str) -> Any:
    """The stored choice; None without one, or for other hardware, torch or thread count."""
    return _read(choices_file()).get(name)


def store_choice(name: str, choice: Any) -> None:
    """Store a choice (JSON); where nothing can be written, the next run measures again."""
    _write(choices_file(), name, choice)


def stored_rates(name: str) -> list[float]:
    """The rates that the last commands stored under this name, the latest last."""
    found = _read(rates_file()).get(name)
    rates = found if isinstance(found, list) else []
    return [float(rate) for rate in rates if type(rate) in (int, float) and rate > 0]


def store_rate(name: str, rate: float) -> None:
    """Add a rate to those of this name."""
    _write(rates_file(), name, [*stored_rates(name), rate][-STORED_RATES:])


def forget_choices() -> None:
    """Remove what was measured of this machine, and chosen by it."""
    choices_file().unlink(missing_ok=True)
    rates_file().unlink(missing_ok=True)


def _write(file: Path, name: str, value: Any) -> None:
    before = _read(file)
    if before.get(name) != value:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, {"machine": _machine(), "choices": before | {name: value}})


def _machine() -> dict[str, Any]:
    threads = torch.get_num_threads()
    return {"processor": processor_name(), "torch": torch.__version__, "threads": threads}


def _read(file: Path) -> dict[str, Any]:
    """Everything stored of this machine; what cannot be read counts as nothing."""
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        choices = stored["choices"] if stored["machine"] == _machine() else {}
    except (OSError, ValueError, LookupError, TypeError):
        return {}
    return choices if isinstance(choices, dict) else {}
