"""`smoldpo doctor`: the machine as smoldpo sees it, and what would keep a run from going well."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from smoldpo._version import __version__
from smoldpo.engine.autotune import NAMES, choose_kernels, compute_dtype, dtype_name, matmul_rate
from smoldpo.engine.cache import folder as cache
from smoldpo.engine.cache.reference_logps import damage as reference_damage
from smoldpo.engine.cache.trunk_states import damage as trunk_damage
from smoldpo.engine.compile import missing_compiler
from smoldpo.engine.kernels.native.library import in_words as native_kernels
from smoldpo.models.builtin import builtin_gguf
from smoldpo.training.run_folder import LIBRARIES
from smoldpo.utils.core_use import core_use
from smoldpo.utils.devices import pick_device
from smoldpo.utils.errors import SmoldpoError
from smoldpo.utils.files import cache_folder, free_bytes, processor_name
from smoldpo.utils.memory import free_memory
from smoldpo.utils.threads import default_threads

LITTLE_DISK = 3_000_000_000
LITTLE_MEMORY = 3_000_000_000
"""A run of the demo takes about half of either."""


def examine() -> dict[str, Any]:
    """Everything, as one JSON object; `problems` says what to do about what is wrong."""
    now = core_use()
    device = pick_device("auto")
    dtype, why = compute_dtype("auto", device)
    found: dict[str, Any] = {
        "machine": {
            "platform": platform.platform(),
            "processor": processor_name(),
            "cores": os.cpu_count(),
            "threads": default_threads(),
            "core_use": now.in_words + (", so a run is slower than alone" if now.busy else ""),
            "device": device,
            "memory_free_bytes": free_memory(torch.device("cpu")),
        },
        "versions": {"smoldpo": __version__, "python": platform.python_version()}
        | {name: _version(name) for name in LIBRARIES},
        "precision": {
            "chosen": dtype_name(dtype),
            "why": why,
            "gflops": {n: round(matmul_rate(NAMES[n], device)) for n in ("float32", "bfloat16")},
            "kernels": str(choose_kernels(dtype, device)),
            "native": native_kernels(),
        },
        "compiler": missing_compiler(device) or "found",
        "disk": {
            "folder": str(Path.cwd()),
            "free_bytes": free_bytes(Path.cwd()),
        },
        "cache": _cache(),
        "builtin_model": _builtin(),
    }
    return found | {"problems": _problems(found)}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _builtin() -> str:
    try:
        return str(builtin_gguf())
    except SmoldpoError as error:
        return f"missing: {error}"


def _cache() -> dict[str, Any]:
    entries = cache.entries()
    look = {"trunk": trunk_damage, "reference": reference_damage}
    return {
        "folder": str(cache_folder()),
        "unusable": cache.unusable(),
        "entries": len(entries),
        "bytes": sum(entry.bytes for entry in entries),
        "free_bytes": free_bytes(cache_folder()),
        "damaged": [problem for entry in entries for problem in look[entry.kind](entry.folder)],
    }


def _problems(found: dict[str, Any]) -> list[str]:
    problems = []
    cached = found["cache"]
    if found["disk"]["free_bytes"] < LITTLE_DISK:
        problems.append(f"little disk space is left for runs in {found['disk']['folder']}")
    if found["machine"]["memory_free_bytes"] < LITTLE_MEMORY:
        problems.append("little memory is free: close something, or say --stream-tokens 600")
    if cached["unusable"]:
        problems.append(f"the cache cannot be used: {cached['unusable']}; set XDG_CACHE_HOME")
    problems += [f"{problem}; smoldpo cache clear removes it" for problem in cached["damaged"]]
    if found["builtin_model"].startswith("missing"):
        problems.append(f"the built-in model is {found['builtin_model']}")
    return problems


def as_text(found: dict[str, Any]) -> str:
    """For people, with what is wrong at the end."""
    lines = []
    for part, content in found.items():
        if part == "problems":
            continue
        if not isinstance(content, dict):
            lines.append(f"{part.replace('_', ' ')}: {content}")
            continue
        lines.append(part)
        for key, value in content.items():
            text = json.dumps(value) if isinstance(value, (dict, list)) else value
            if key.endswith("bytes"):
                text = f"{value / 1e9:,.1f} GB"
                key = key.removesuffix("bytes").rstrip("_") or "size"
            lines.append(f"  {key.replace('_', ' '):<14}{text}")
    lines.append("")
    lines += [f"problem: {problem}" for problem in found["problems"]] or ["nothing is wrong"]
    return "\n".join(lines)
