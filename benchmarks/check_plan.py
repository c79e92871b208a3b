"""`smoldpo plan` against the run that it forecasts: time and peak memory of bench_dpo.py's workloads.

    python benchmarks/check_plan.py [--workloads W1,W2] [--pairs 1000] [--full-pairs 240]

W1  layers 0-24 and the embeddings frozen, evaluation before and after, 3 epochs
W2  everything trains, one epoch, no evaluation

Each forecast and each run is a process of its own, with the cache as cold as the other's. Printed are seconds
of each phase and of the whole, and peak memory, with forecast / run. This process imports no torch: a child's
peak memory is never below that of the process that starts it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SHARED_DATA = HERE.parent.parent / "shared" / "data"
EPOCHS = "training"


def child(arguments: list[str], folder: Path, threads: int) -> tuple[str, float, int]:
    """Run smoldpo to its end: standard output, seconds, peak resident bytes."""
    settings = {
        "XDG_CACHE_HOME": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
    }
    out, errors = folder / "stdout", folder / "stderr"
    with out.open("w") as stdout, errors.open("w") as stderr:
        begun = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "smoldpo", *arguments],
            stdout=stdout,
            stderr=stderr,
            env=os.environ | settings,
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begun
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{errors.read_text()[-3000:]}\nexit code {process.returncode}: {arguments}")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return out.read_text(), seconds, peak


def settings_of(name: str, a: argparse.Namespace) -> list[str]:
    """bench_dpo.py's settings of a workload."""
    options: dict[str, Any] = {
        "model": a.model,
        "data": a.data,
        "per-device-train-batch-size": 8,
        "gradient-accumulation-steps": 1,
        "max-length": 512,
        "sample-prompt": "none",
        "generate-prompts": a.answers,
        "cache": "disk",
    }
    if name == "W1":
        options |= {"freeze-layers": a.frozen, "learning-rate": 2e-4, "num-train-epochs": 3}
        options |= {"max-train-samples": a.pairs, "max-eval-samples": a.eval_pairs}
        options |= {"eval-data": a.eval_data} if a.eval_data else {}
    else:
        options |= {"freeze-layers": 0, "learning-rate": 5e-6, "num-train-epochs": 1}
        options |= {"max-train-samples": a.full_pairs, "eval-fraction": 0}
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


def cold(folder: Path) -> None:
    """Empty the cache but for the unpacked model."""
    for entry in (folder / "cache" / "smoldpo").glob("*"):
        if entry.name != "models":
            shutil.rmtree(entry)


def check(name: str, folder: Path, a: argparse.Namespace) -> list[str]:
    """Forecast and run one workload; lines of a table."""
    settings = settings_of(name, a)
    cold(folder)
    said, planning, _ = child(["plan", *settings, "--json"], folder, a.threads)
    plan = json.loads(said)
    cold(folder)
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    _, seconds, peak = child(["train", *settings, "--output-dir", str(run)], folder, a.threads)
    timings = json.loads((run / "timings.json").read_text())
    row = plan["run"]
    forecast = {EPOCHS: 0.0}
    for phase in row["phases"]:
        title = EPOCHS if phase["name"].startswith("epoch ") else phase["name"]
        forecast[title] = forecast.get(title, 0.0) + phase["seconds"]
    counts = plan["counts"]
    lines = [
        f"\n## {name}: {counts['train_pairs']:,} pairs, {counts['steps']:,} steps, "
        f"{row['freeze_layers']} layers frozen; planned in {planning:.1f} s\n",
        "| | forecast | run | forecast / run |",
        "|---|--:|--:|--:|",
    ]
    for title, there in timings.items():
        expected = forecast.get(title)
        if title.startswith("reference and policy"):
            expected = forecast.get("answers of both models")
        if expected is not None:
            lines.append(_line(f"{title}, s", expected, there["seconds"]))
    lines.append(_line("**whole, s**", row["seconds"], seconds))
    lines.append(_line("**peak memory, MB**", row["peak_bytes"] / 1e6, peak / 1e6))
    phases = ", ".join(f"{k} {v / 1e6:,.0f}" for k, v in row["memory_by_phase"].items())
    peaks = ", ".join(f"{title} {there['peak_mb']:,.0f}" for title, there in timings.items())
    return [
        *lines,
        "",
        f"Forecast peaks, MB: {phases}. Peaks up to the end of each phase: {peaks}.",
    ]


def _line(title: str, forecast: float, run: float) -> str:
    ratio = f"{forecast / run:.2f}" if run else "–"
    return f"| {title} | {forecast:,.1f} | {run:,.1f} | {ratio} |"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    train, dev = (SHARED_DATA / f"hh_helpful_{side}.jsonl" for side in ("train", "dev"))
    add("--data", default=str(train) if train.is_file() else "builtin", metavar="FILE")
    add("--eval-data", default=str(dev) if dev.is_file() else None, metavar="FILE")
    add("--model", default="builtin")
    add("--workloads", type=lambda text: text.upper().split(","), default=["W1", "W2"])
    for name, default, what in (
        ("--pairs", 1000, "pairs of W1"),
        ("--eval-pairs", 200, "evaluated pairs of W1"),
        ("--full-pairs", 240, "pairs of W2"),
        ("--frozen", 25, "frozen layers of W1"),
        ("--answers", 0, "prompts that both models answer in W1 and W2 (the benchmark: none)"),
        ("--threads", os.cpu_count(), "threads of each process"),
    ):
        add(name, type=int, default=default, metavar="N", help=f"{what} ({default})")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="check-plan-") as name:
        folder = Path(name)
        if arguments.model == "builtin":  # unpacked before anything is timed
            child(["chat", "builtin", "--prompt", "Hi", "--max-new-tokens", "1"], folder, 1)
        print(f"# Forecast and run, load before: {os.getloadavg()[0]:.2f}")
        for workload in arguments.workloads:
            print("\n".join(check(workload, folder, arguments)), flush=True)


if __name__ == "__main__":
    main()
