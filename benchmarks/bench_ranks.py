"""Two ranks of one thread each against one process with two workers, in turns.

    python benchmarks/bench_ranks.py --data PAIRS.jsonl [--rounds 3] [--steps 12] [--only W1]

Measured are W1 (layers 0-24 frozen) and W2 (everything trains) with eight and with sixteen pairs a
step: the median seconds of a step, and the most memory that the first rank held. The sum of
gradients is ordered (the same bits as one process) and unordered; with fsdp each rank keeps a share
of the weights, against one process with the plain engine. Nothing else may run meanwhile. A pace
above 1 says that the ranks are faster. `model` says whether the saved models are the same bits.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from smoldpo.utils.files import sha256_of


@dataclass
class Way:
    """One way to train, and what its turns found."""

    name: str
    words: list[str]
    seconds: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)
    model: str = ""


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="FILE", help="pairs to train on")
    add("--model", default="builtin")
    add("--rounds", type=int, default=3, metavar="N")
    add("--steps", type=int, default=12, metavar="N", help="of each turn (12)")
    add("--only", default="", metavar="TEXT", help="workloads whose name holds this")
    add("--dtype", default="bfloat16")
    add("--output", type=Path, metavar="FILE", help="also write the table here")
    return parser.parse_args()


def workloads() -> dict[str, list[Way]]:
    """The ways of each workload; the first is what the others are compared with."""
    one, two = ["--threads", "2"], ["--nproc", "2"]
    found = {}
    for name, frozen in (("W1", "25"), ("W2", "0")):
        for pairs in ("8", "16"):
            told = ["--freeze-layers", frozen, "--per-device-train-batch-size", pairs]
            found[f"{name}, {pairs} pairs a step"] = [
                Way("one process, two workers", [*told, *one]),
                Way("two ranks, ordered sum", [*told, *two]),
                Way("two ranks, any order", [*told, *two, "--ordered-sum", "false"]),
            ]
    plain = ["--freeze-layers", "0", "--per-device-train-batch-size", "2"]
    plain += ["--gradient-accumulation-steps", "4", "--engine"]
    found["W2, plain engine"] = [
        Way("one process", [*plain, "plain", *one]),
        Way("two ranks, fsdp", [*plain, "auto", *two, "--fsdp", "true"]),
    ]
    return found


def turn(way: Way, a: argparse.Namespace, folder: Path) -> None:
    """Train once; the first two steps, which allocate, do not count."""
    run = folder / "run"
    words = [
        *("--data", str(a.data.absolute()), "--model", a.model, "--dtype", a.dtype),
        *("--gradient-accumulation-steps", "1", "--max-steps", str(a.steps)),
        *("--max-train-samples", "64", "--eval-fraction", "0", "--sample-prompt", "none"),
        *("--generate-prompts", "0", "--compile", "off", "--device", "cpu"),
        *("--output-dir", str(run), "--overwrite", "true", *way.words),
    ]
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}
    command = [sys.executable, "-m", "smoldpo", "train", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{way.name}:\n{done.stderr}")
    rows = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
    way.seconds += [row["seconds"] for row in rows if "seconds" in row][2:]
    way.peaks.append(json.loads((run / "timings.json").read_text())["training"]["peak_mb"])
    way.model = sha256_of(run / "model" / "model.safetensors")


def main() -> None:
    """Every workload in turns; prints a table."""
    a = parse_arguments()
    lines = ["| workload | way | s a step | pace | peak MB | memory | model |", "|" + " --- |" * 7]
    with tempfile.TemporaryDirectory() as folder:
        chosen = {name: ways for name, ways in workloads().items() if a.only in name}
        for name, ways in chosen.items():
            for _ in range(a.rounds):
                for way in ways:
                    turn(way, a, Path(folder))
            first = ways[0]
            for way in ways:
                seconds, peak = statistics.median(way.seconds), max(way.peaks)
                pace = statistics.median(first.seconds) / seconds
                same = "same bits" if way.model == first.model else "other bits"
                lines.append(
                    f"| {name} | {way.name} | {seconds:.3f} | {pace:.3f} | {peak:,.0f} "
                    f"| {peak / max(first.peaks):.2f} | {same} |"
                )
                print(lines[-1], flush=True)
    if a.output:
        a.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
