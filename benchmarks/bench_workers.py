"""Streams on workers against operations spread over threads: two builds in turns, in one run.

    python benchmarks/bench_workers.py BEFORE [AFTER] --data PAIRS.jsonl [--output FILE]

BEFORE and AFTER are git revisions (AFTER: the working tree). Both are built as wheels and run in
processes of their own, in turns. Measured are W1 (layers 0-24 frozen) and W2 (everything trains)
with eight pairs a step: steps on the machine as it is and beside busy processes, the first pass
over trunk and reference, 16 answers side by side, and which precision and kernels are chosen beside
busy processes. Nothing else may run meanwhile. Ratios above 1 say that AFTER is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from build_comparison.builds import WORKING_TREE, Build, build

CHILD = Path(__file__).with_name("worker_bench") / "child.py"
STEPS = {"kind": "steps", "pairs": 32, "steps": 40}
Spec = dict[str, Any]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("before", metavar="BEFORE")
    add("after", metavar="AFTER", nargs="?", default=WORKING_TREE)
    add("--data", type=Path, required=True, metavar="FILE", help="pairs to train on")
    add("--rounds", type=int, default=3, metavar="N")
    add("--seconds", type=float, default=25, metavar="S", help="of steps in each turn (25)")
    add("--dtype", default="bfloat16")
    add("--starts", type=int, default=20, metavar="N", help="in which kernels are chosen (20)")
    add("--threads", type=int, default=os.cpu_count(), metavar="N", help="of both (all)")
    add("--output", type=Path, metavar="FILE", help="also write the table here")
    return parser.parse_args()


def measure(built: Build, spec: Spec) -> dict[str, Any]:
    """One turn of a build."""
    built.empty_cache()
    process = built.start([str(CHILD), json.dumps(spec)])
    stdout, stderr = process.communicate()
    if process.returncode:
        sys.exit(f"{built.name}: {spec}\n{stderr}")
    found: dict[str, Any] = json.loads(stdout.splitlines()[-1])
    return found


def workloads(a: argparse.Namespace) -> dict[str, Spec]:
    """What is measured, by its name in the table."""
    told = STEPS | {"data": str(a.data.absolute()), "dtype": a.dtype, "limit": a.seconds}
    w1, w2 = told | {"freeze_layers": 25}, told | {"freeze_layers": 0, "pairs": 24}
    return {
        "W1 steps, quiet": w1 | {"busy": 0},
        "W1 steps beside one busy process": w1 | {"busy": 1},
        "W1 steps beside four busy processes": w1 | {"busy": 4},
        "W2 steps, quiet": w2 | {"busy": 0},
        "16 answers of 128 tokens": {
            "kind": "answers", "pairs": 16, "data": told["data"], "dtype": a.dtype,
        },
    }  # fmt: skip


def compare(builds: Sequence[Build], a: argparse.Namespace) -> list[str]:
    """Every workload in turns; the rows of the table."""
    rows, passes = [], [[], []]
    for name, spec in workloads(a).items():
        found: list[list[float]] = [[], []]
        for _ in range(a.rounds):
            for number, built in enumerate(builds):
                result = measure(built, spec)
                if spec["kind"] == "answers":
                    found[number].append(result["seconds"] / result["tokens"])
                    continue
                found[number].append(statistics.median(result["steps"]))
                if spec["busy"] == 0 and spec["freeze_layers"]:
                    passes[number].append(result["first_pass"])
                said = f"{name}: {built.name} {found[number][-1]:.3f} s ({len(result['steps'])})"
                print(said, file=sys.stderr)
        rows.append(row(name, found))
    rows.append(row("first pass over trunk and reference, a pair", passes))
    return rows


def row(name: str, found: Sequence[Sequence[float]]) -> str:
    """Medians over the rounds, and the median of the rounds' ratios."""
    before, after = map(statistics.median, found)
    ratios = [b / a for b, a in zip(*found, strict=True)]
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    return f"| {name} | {before:.4g} | {after:.4g} | {statistics.median(ratios):.2f} | {spread} |"


def same_choices(built: Build, a: argparse.Namespace) -> str:
    """How often what is chosen beside four busy processes is what is chosen alone."""
    alone, *others = (
        measure(built, {"kind": "choices", "busy": busy}) for busy in [0, *[4] * a.starts]
    )
    same = sum(all(each[k] == alone[k] for k in ("dtype", "kernels")) for each in others)
    return f"- {built.name}: {same} of {a.starts}, alone {alone['dtype']}, {alone['kernels']}"


def main() -> None:
    """Build, measure, print."""
    a = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="bench-workers-") as folder:
        builds = [
            build(name, revision, Path(folder, name), a.threads)
            for name, revision in (("before", a.before), ("after", a.after))
        ]
        lines = [
            f"{time.strftime('%Y-%m-%d')}, {a.threads} threads, {a.dtype}, {a.rounds} rounds; "
            f"before: {a.before}, after: {a.after}",
            "",
            "| | before, s | after, s | ratio | over the rounds |",
            "| --- | --- | --- | --- | --- |",
            *compare(builds, a),
            "",
            "Precision and kernels chosen beside four busy processes as alone:",
            "",
            *(same_choices(built, a) for built in builds),
        ]
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if a.output:
        a.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
