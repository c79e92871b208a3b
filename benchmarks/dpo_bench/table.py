"""What was measured, and on what, as Markdown."""

from __future__ import annotations

import os
import platform
import re
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from dpo_bench.children import SHAPES
from dpo_bench.running import Bench, Workload


def number(value: float | None, form: str = ".2f") -> str:
    return "–" if value is None else format(value, form)


def table(bench: Bench, works: list[Workload], found: dict[str, dict[str, Any]]) -> list[str]:
    """The comparison, one line a workload, and below it what each figure is made of."""
    lines = [
        "| workload | TRL pairs/s (batch) | TRL s, scaled | TRL peak MB | smoldpo pairs/s | "
        "smoldpo s | smoldpo peak MB | TRL s / smoldpo s | TRL MB / smoldpo MB | floor, epochs | "
        "floor, once a pair |",
        "|---" + "|--:" * 10 + "|",
    ]
    notes = []
    for work in works:
        trl, ours = found[work.name]["trl"], found[work.name]["smoldpo"]
        what = f"{work.what}: {work.pairs:,} pairs x {work.epochs}, {work.eval_pairs} evaluated"
        theirs, ratios = ["–"] * 3, ["–"] * 2
        if trl:
            batch = f"{trl['pace']:.2f} ({trl['micro_batch']:.0f})"
            theirs = [batch, f"{trl['seconds']:,.0f}", f"{trl['peak'] / 1e6:,.0f}"]
            ratios = [f"{trl[key] / ours[key]:.1f}" for key in ("seconds", "peak")]
            evaluation = f"evaluation {trl['eval_pace']:.2f} pairs/s, " if trl["eval_pace"] else ""
            notes.append(
                f"- {work.name}, TRL: scaled from {trl['sample']:.0f} pairs; start-up "
                f"{trl['startup']:.1f} s, reference {trl['precompute_pace']:.2f} pairs/s"
                f"{' (not counted: kept)' if work.is_warm else ''}, {evaluation}"
                f"saving {trl['saving']:.1f} s"
            )
        phases = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in ours["phases"].items())
        notes.append(f"- {work.name}, smoldpo ({ours['dtype']}): {phases}")
        own = [f"{ours['pace']:.2f}", f"{ours['seconds']:,.1f}", f"{ours['peak'] / 1e6:,.0f}"]
        shares = [number(ours[key], ".0%") for key in ("epochs_share", "once_share")]
        cells = [f"{work.name}: {what}", *theirs, *own, *ratios, *shares]
        lines.append(f"| {' | '.join(cells)} |")
    forecasts = [line for work in works for line in found[work.name]["smoldpo"]["forecast"]]
    if forecasts:
        forecasts = ["\n## Forecast by `smoldpo plan`, and the run", *forecasts]
    return [*lines, "", *notes, "", EXPLANATION, *forecasts]


EXPLANATION = """\
Pairs/s are those of the policy epochs, without the first step (TRL: the first two micro-batches).
Seconds are from the command to its end; the unpacked model was there before. Peak MB is the peak
resident memory of the process (10^6 bytes). Floor: the time that the FLOPs which the loss needs
take at the best measured matmul rate, as a share of the time taken; "once a pair" is the frozen
layers and the reference. W3's TRL is W1's without the reference pass, which it, too, can keep.
Pairs longer than max_length are left out."""


def header(bench: Bench) -> list[str]:
    """The machine, the versions, the measured rates, the command."""
    from importlib.metadata import version

    facts, arguments = bench.facts, bench.arguments
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    names = ("smoldpo", "torch", "transformers", "trl")
    shown = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    command = shlex.join(["python", "benchmarks/bench_dpo.py", *shown])
    lines = [
        f"# DPO: smoldpo and TRL, {time.strftime('%Y-%m-%d')}\n",
        f"- machine: {processor()[0]}, {os.cpu_count()} cores, {memory:.0f} GB; "
        f"{', '.join(processor()[1]) or 'no amx, no avx512_bf16'}",
        f"- on {facts['gpu'] or facts['device']}, {arguments.threads} threads; load before: "
        f"{facts['load']:.2f}; {arguments.rounds} round(s)",
        f"- versions: {', '.join(f'{name} {version(name)}' for name in names)}; "
        f"Python {platform.python_version()}",
        f"- command: `{command}`",
    ]
    shapes = [f"{rows}x{inner}x{columns}" for rows, inner, columns in SHAPES]
    for dtype, rates in facts["rates"].items():
        each = ", ".join(f"{s} {rate:,.0f}" for s, rate in zip(shapes, rates, strict=True))
        lines.append(f"- matmul, {dtype}: best {max(rates):,.0f} GFLOP/s ({each})")
    tokens = facts["tokens"]["train"]
    prompt, both = (statistics.fmean(pair[at] for pair in tokens) for at in (0, 1))
    lines.append(
        f"- pairs: {Path(arguments.data).name}, max_length {arguments.max_length}; a pair has on "
        f"average {prompt:.0f} prompt tokens and {both:.0f} of both completions; "
        f"{arguments.batch_size} pairs a step"
    )
    return [*lines, ""]


def processor() -> tuple[str, list[str]]:
    """The processor's name, and which of the instructions that matter for bfloat16 it has."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(errors="replace") if info.is_file() else ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^flags\s*:\s*(.+)$", text, re.MULTILINE)
    known = flags.group(1).split() if flags else []
    matter = [flag for flag in known if flag.startswith("amx") or flag == "avx512_bf16"]
    return (name.group(1) if name else platform.processor() or platform.machine()), matter
