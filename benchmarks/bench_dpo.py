"""smoldpo against TRL's DPOTrainer: seconds, peak memory, and how near the work comes to its floor.

    python benchmarks/bench_dpo.py [--workloads W1,W2,W3] [--pairs 1000] [--output]

W1  layers 0-24 and the embeddings frozen, evaluation before and after, smoldpo's caches cold
W2  everything trains, one epoch, no evaluation
W3  W1 again with another beta, while smoldpo's cache holds what W1 left there

Each run is a process of its own, in turns, over the same pairs. smoldpo runs whole, from its
command to its end. TRL is measured on a sample of the pairs, evenly spaced by length, and scaled to
all of them. This process imports no torch: a child's peak memory is never below that of the process
that starts it.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from dpo_bench.contest import measure
from dpo_bench.growth import growth
from dpo_bench.running import Bench, Workload, say
from dpo_bench.table import header, processor, table

HERE = Path(__file__).resolve().parent
SHARED_DATA = HERE.parent.parent / "shared" / "data"
FROZEN_LAYERS = 25


def workloads(arguments: argparse.Namespace) -> list[Workload]:
    """Those asked for; W3 behind W1, whose cache it finds."""
    a = arguments
    frozen = (FROZEN_LAYERS, 2e-4)
    every = [
        Workload("W1", "25 layers frozen, cold", *frozen, 0.1, a.epochs, a.pairs, a.eval_pairs),
        Workload("W3", "W1 with beta 0.2, warm", *frozen, 0.2, a.epochs, a.pairs, a.eval_pairs),
        Workload("W2", "everything trains", 0, 5e-6, 0.1, 1, a.full_pairs, 0),
    ]
    return [workload for workload in every if workload.name in a.workloads]


def output_path(arguments: argparse.Namespace, facts: dict[str, Any]) -> Path:
    """Where --output without a path writes: benchmarks/results/<machine>-<date>.md."""
    if arguments.output:
        return Path(arguments.output)
    machine = facts["gpu"] or f"{processor()[0]} {os.cpu_count()} cores"
    slug = re.sub(r"[^a-z0-9]+", "-", machine.lower().replace("(r)", "")).strip("-")
    return HERE / "results" / f"{slug}-{time.strftime('%Y-%m-%d')}.md"


def parse_arguments() -> argparse.Namespace:
    """The command line; sizes are those of the workloads in full unless told otherwise."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    add("--data", metavar="FILE", help="pairs (../shared/data/hh_helpful_train.jsonl or builtin)")
    add("--eval-data", metavar="FILE", help="held-out pairs (hh_helpful_dev.jsonl beside them)")
    add("--model", default="builtin", help="as smoldpo's --model takes it (builtin)")
    add("--workloads", type=lambda text: text.upper().split(","), default=["W1", "W2", "W3"])
    for name, default, what in (
        ("--pairs", 1000, "pairs of W1 and W3"),
        ("--eval-pairs", 200, "evaluated pairs of W1 and W3"),
        ("--epochs", 3, "epochs of W1 and W3"),
        ("--full-pairs", 240, "pairs of W2"),
        ("--trl-pairs", 96, "pairs that TRL is measured on"),
        ("--batch-size", 8, "pairs an optimizer step"),
        ("--max-length", 512, "tokens of prompt and completion"),
        ("--threads", os.cpu_count(), "threads of each run"),
        ("--rounds", 1, "rounds, of which medians are taken"),
    ):
        add(name, type=int, default=default, metavar="N", help=f"{what} ({default})")
    sizes = {"type": numbers, "metavar": "N,N"}
    add(
        "--trl-batch-sizes", **sizes, default=[1, 2, 4], help="of which TRL's best is taken (1,2,4)"
    )
    add("--plan", action="store_true", help="also hold `smoldpo plan` against W1 and W2")
    add("--skip-trl", action="store_true", help="measure smoldpo alone")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--growth", **sizes, help="also run time and peak memory over N synthetic pairs each")
    add("--growth-model", metavar="FOLDER", help="model of --growth (a tiny random one)")
    add("--output", nargs="?", const="", metavar="FILE", help="write it too (benchmarks/results/)")
    arguments = parser.parse_args()
    train_file, dev_file = (SHARED_DATA / f"hh_helpful_{side}.jsonl" for side in ("train", "dev"))
    if arguments.data is None:
        arguments.data = str(train_file) if train_file.is_file() else "builtin"
    beside = Path(arguments.data).with_name(dev_file.name)
    if arguments.eval_data is None and beside.is_file():
        arguments.eval_data = str(beside)
    if "W3" in arguments.workloads and "W1" not in arguments.workloads:
        parser.error("W3 finds what W1 kept: give --workloads W1,W3")
    if unknown := set(arguments.workloads) - {"W1", "W2", "W3"}:
        parser.error(f"--workloads: {', '.join(unknown)} is none of W1, W2, W3")
    if unknown := [size for size in arguments.trl_batch_sizes if arguments.batch_size % size]:
        parser.error(f"--trl-batch-sizes: {unknown} do not divide --batch-size")
    return arguments


def begin(arguments: argparse.Namespace, folder: Path) -> Bench:
    """Everything that is not counted: the model unpacked, the pairs written, the machine
    measured.
    """
    bench = Bench(arguments, folder, {})
    load = os.getloadavg()[0]
    spec = {key: getattr(arguments, key) for key in ("model", "data", "eval_data", "max_length")}
    spec |= {"folder": str(folder), "device": arguments.device, "eval": arguments.eval_pairs}
    spec["train"] = max(arguments.pairs, arguments.full_pairs)
    bench.facts = bench.child("prepare", spec).report | {"load": load}
    there = {side: len(tokens) for side, tokens in bench.facts["tokens"].items()}
    for name, side in (("pairs", "train"), ("full_pairs", "train"), ("eval_pairs", "eval")):
        if getattr(arguments, name) > there[side]:
            say(f"{name}: {there[side]}, because {arguments.data} has no more that fit")
            setattr(arguments, name, there[side])
    return bench


def main() -> None:
    arguments = parse_arguments()
    # An exception, so that no child and no folder is left behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    with tempfile.TemporaryDirectory(prefix="bench-dpo-") as folder:
        bench = begin(arguments, Path(folder))
        works = workloads(arguments)
        lines = [*header(bench), *table(bench, works, measure(bench, works))]
        if arguments.growth:
            lines += growth(bench)
        text = "\n".join(lines) + "\n"
        print(text, end="")
        if arguments.output is not None:
            path = output_path(arguments, bench.facts)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
