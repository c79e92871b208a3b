"""Kernels and precision, chosen by measuring this machine and not by a name.

On a CPU everything is measured on one thread, in short turns A B A B, and the fastest turn of each
counts: another process may hold a core for most of the time, and the turns between are as fast as
ever. A choice changes the last bits of results, and the keys of what is stored, so an earlier one
stands until another is clearly better: machine.json and rates.json of the cache hold them.
`smoldpo cache clear` removes both.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from smoldpo.engine.kernels.attention import pair_attention
from smoldpo.engine.kernels.lm_head import completion_logps
from smoldpo.engine.kernels.native.library import NativeError, load, supported
from smoldpo.engine.kernels.native_check import TOLERANCE, LayerWork
from smoldpo.engine.layout import Layout, Segment
from smoldpo.utils import progress
from smoldpo.utils.distributed import world
from smoldpo.utils.errors import UsageError
from smoldpo.utils.files import cache_folder, processor_name, write_json
from smoldpo.utils.threads import torch_threads

CLOSE = 1.25
"""So near, the first is taken: stored results are found only if the choice stays the same."""
SWITCH_KERNELS = 2.0
"""A choice of an earlier run stands until the other way is this many times faster."""
STORED_RATES = 16
"""Rates of so many commands are stored."""


@dataclass(frozen=True)
class KernelChoice:
    """Ways to compute; whichever is taken, results differ by rounding alone.

    On other devices than a CPU both are False, and attention is what kernels/attention.py says.
    """

    fused_attention: bool = True
    """Attention's forward pass by torch's fused kernel, not by matrix products."""
    fused_head: bool = True
    """The LM head by torch's fused attention kernel, not by chunks of logits."""
    native: str = ""
    """The instruction set of the native kernels (kernels/native/); empty: torch's functions.

    They take the place of what the other two name wherever they fit; of the head unless it is to go
    by chunks of logits.
    """

    @classmethod
    def of(cls, recorded: Mapping[str, Any]) -> KernelChoice:
        """From its fields, as environment.json holds them."""
        return cls(**recorded)

    def __str__(self) -> str:
        ways = {"attention": self.fused_attention, "head": self.fused_head}
        words = [f"{name} {'fused' if way else 'by products'}" for name, way in ways.items()]
        return (f"native ({self.native}), else " if self.native else "") + ", ".join(words)


def choose_kernels(dtype: torch.dtype, device: str, asked: str = "auto") -> KernelChoice:
    """The faster kernels for SmolLM2-135M's shape, or an earlier run's if near: about a second.

    Args:
        asked: native or torch; auto measures, after native results were held against torch's.

    Raises:
        UsageError: native kernels are asked for, and cannot be had.
    """
    native = choose_native(dtype, device, asked)
    if device != "cpu":
        return KernelChoice(fused_attention=False, fused_head=False)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    query, key, value = random(1, 9, 256, 64), random(1, 3, 256, 64), random(1, 3, 256, 64)
    layout = Layout.of([Segment(0, 128, 64, 64)], torch.zeros(256, dtype=torch.long))
    states, head = random(256, 576), random(8192, 576)
    targets = torch.zeros(256, dtype=torch.long)
    ways: dict[str, Callable[[bool], object]] = {
        "fused_attention": lambda fused: pair_attention(
            query, key, value, 0.125, layout, None, False, fused
        ),
        "fused_head": lambda fused: completion_logps(states, head, targets, fused),
    }
    before = {name: stored_choice(f"{name}, {dtype}") for name in ways}
    with torch_threads(1):
        choice = {name: _fused_is_faster(way, before[name]) for name, way in ways.items()}
    for name, fused in choice.items():
        store_choice(f"{name}, {dtype}", fused)
    return KernelChoice(**(choice | {"fused_head": True} if native else choice), native=native)


def choose_native(dtype: torch.dtype, device: str, asked: str) -> str:
    """The instruction set whose native kernels are taken, or nothing.

    Raises:
        UsageError: they are asked for, and cannot be had.
    """
    if asked == "torch" or (asked == "auto" and not _may_be_native(dtype, device)):
        return ""
    if not _may_be_native(dtype, device):
        raise UsageError(
            "kernels native: they compute in bfloat16 on a CPU with AVX-512 and bfloat16 (Linux), "
            f"and this is {dtype_name(dtype)} on {device}; say --kernels torch, or auto"
        )
    instructions = supported()[0]
    if asked == "native":
        load(instructions)
        return instructions
    with torch_threads(1):
        reason = _reason_for_torch(instructions)
    if reason:
        progress.say(f"kernels: torch's, because {reason}")
    return "" if reason else instructions


def _may_be_native(dtype: torch.dtype, device: str) -> bool:
    return dtype == torch.bfloat16 and device == "cpu" and bool(supported())


@functools.cache
def _reason_for_torch(instructions: str) -> str:
    """Why native kernels are not taken, in words; empty where they are."""
    try:
        native = load(instructions)
    except NativeError as error:
        return error.reason
    work = LayerWork()
    difference = work.difference(native)
    if difference > TOLERANCE:
        return f"the native kernels' results are wrong here (by {difference:.0%} of torch's)"
    name = f"native, {instructions}"
    before = stored_choice(name)
    ours, torchs = fastest_turns([lambda: work.results(native), lambda: work.results(None)])
    taken = ours <= torchs * (1.0 if before is None else SWITCH_KERNELS if before else 0.5)
    store_choice(name, taken)
    return "" if taken else "the native kernels are no faster here"


@torch.no_grad()
def _fused_is_faster(way: Callable[[bool], object], before: object = None) -> bool:
    """Whether way(True) is to be taken, and not way(False); `before` is an earlier run's choice."""
    fused, products = fastest_turns([lambda: way(True), lambda: way(False)])
    close = SWITCH_KERNELS if before is True else 1 / SWITCH_KERNELS if before is False else CLOSE
    return fused <= close * products


def fastest_turns(tasks: Sequence[Callable[[], object]]) -> list[float]:
    """Seconds of the fastest of many turns of each task; a first turn of each does not count.

    The tasks take turns for SECONDS, each at least LEAST_TURNS times, so that whatever else the
    machine does meets all of them alike.
    """
    best = [math.inf] * len(tasks)
    for task in tasks:
        task()
    end, turns = time.perf_counter() + SECONDS, 0
    while turns < LEAST_TURNS or time.perf_counter() < end:
        for number, task in enumerate(tasks):
            start = time.perf_counter()
            task()
            best[number] = min(best[number], time.perf_counter() - start)
        turns += 1
    return best


NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as settings and files name it, such as float32."""
    return str(dtype).removeprefix("torch.")


SPEEDUP = {"bfloat16": 1.0, "float32": 2.0, "None": 1.3}
"""How many times faster than float32 bfloat16 must be to be chosen, by an earlier run's choice."""

SHAPE = (128, 576, 1536)
"""Rows, inner width and columns of the product that is measured, a small model's MLP: some
milliseconds at most, less than a scheduler's slice."""
SECONDS, LEAST_TURNS = 0.25, 8
"""How long turns are taken, and how many at least."""


def compute_dtype(name: str, device: str) -> tuple[torch.dtype, str]:
    """The dtype for `name` and how it was chosen; auto measures, and prefers an earlier choice."""
    if name != "auto":
        return NAMES[name], f"{name}, as asked"
    slow, fast = matmul_rates([torch.float32, torch.bfloat16], device)
    store_rate(f"float32, {device}", round(slow, 1))
    store_rate(f"bfloat16, {device}", round(fast, 1))
    before = str(stored_choice(f"precision, {device}"))
    choice = "bfloat16" if fast > SPEEDUP.get(before, SPEEDUP["None"]) * slow else "float32"
    store_choice(f"precision, {device}", choice)
    return NAMES[choice], (
        f"{choice}: measured {slow:,.0f} GFLOP/s a thread in float32, {fast:,.0f} in bfloat16"
    )


def agreed_dtype(name: str, device: str) -> tuple[torch.dtype, str]:
    """As compute_dtype; of several ranks the first measures, for all."""

    def chosen() -> tuple[str, str]:
        dtype, why = compute_dtype(name, device)
        return dtype_name(dtype), why

    known, why = world().of_first(chosen)
    return NAMES[known], why


def agreed_kernels(dtype: torch.dtype, device: str) -> KernelChoice:
    """As choose_kernels; of several ranks the first measures, for all."""
    return KernelChoice(**world().of_first(lambda: asdict(choose_kernels(dtype, device))))


def earlier_rates(dtype: torch.dtype, device: str) -> list[float]:
    """GFLOP/s measured by the last commands with dtype auto, at their start; the latest last."""
    return stored_rates(f"{dtype_name(dtype)}, {device}")


def matmul_rate(dtype: torch.dtype, device: str) -> float:
    """GFLOP/s of a product of SHAPE; on a CPU by one thread."""
    return matmul_rates([dtype], device)[0]


def matmul_rates(dtypes: Sequence[torch.dtype], device: str) -> list[float]:
    """`matmul_rate` of several dtypes, measured in turns."""
    rows, inner, columns = SHAPE
    wait = (lambda: None) if device == "cpu" else getattr(torch, device).synchronize

    def product(dtype: torch.dtype) -> Callable[[], None]:
        left = torch.randn(rows, inner, device=device).to(dtype)
        right = torch.randn(columns, inner, device=device).to(dtype)

        def task() -> None:
            torch.nn.functional.linear(left, right)
            wait()

        return task

    with torch_threads(1):
        seconds = fastest_turns([product(dtype) for dtype in dtypes])
    return [2 * rows * inner * columns / best / 1e9 for best in seconds]


def choices_file() -> Path:
    """Where the choices are."""
    return cache_folder() / "machine.json"


def rates_file() -> Path:
    """Where the rates are. Each command adds to them, so that two at once lose no choice."""
    return cache_folder() / "rates.json"


def stored_choice(name: str) -> Any:
    """The stored choice; None without one, or for other hardware or another torch."""
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
    return {"processor": processor_name(), "torch": torch.__version__, "measured": "by one thread"}


def _read(file: Path) -> dict[str, Any]:
    """Everything stored of this machine; what cannot be read counts as nothing."""
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        choices = stored["choices"] if stored["machine"] == _machine() else {}
    except (OSError, ValueError, LookupError, TypeError):
        return {}
    return choices if isinstance(choices, dict) else {}
