"""smoldpo over more and more pairs."""

from __future__ import annotations

import json
import random
from pathlib import Path

from bench_data_check import words
from dpo_bench.running import Bench, say, train
from dpo_bench.table import number


def growth(bench: Bench) -> list[str]:
    """smoldpo over more and more synthetic pairs: cost must grow as they do, memory must not."""
    model, sizes = bench.arguments.growth_model, bench.arguments.growth
    name = model
    if model is None:
        model, name = str(bench.folder / "tiny"), "a random Llama, 4 layers 64 wide, 3 frozen"
        bench.child("tiny", {"folder": model})
    lines = [
        f"\n## Growth\n\nSynthetic pairs, one epoch, no evaluation, cold cache, on {name}.\n",
        "| pairs | s | ms per further pair | peak MB | cache MB |\n|--:|--:|--:|--:|--:|",
    ]
    before: tuple[int, float] | None = None
    for count in sizes:
        data = bench.folder / "growth.jsonl"
        write_synthetic(data, count)
        bench.empty_cache()
        options = {"model": model, "data": data, "eval-fraction": 0, "num-train-epochs": 1}
        finished, steps, _ = train(bench, bench.folder / "run", options)
        pairs = sum(row["pairs"] for row in steps)
        kept = (bench.folder / "cache" / "smoldpo").glob("[!m]*/**/*")
        size = sum(path.stat().st_size for path in kept if path.is_file())
        each = 1e3 * (finished.seconds - before[1]) / (pairs - before[0]) if before else None
        before = (pairs, finished.seconds)
        lines.append(
            f"| {pairs:,} | {finished.seconds:.1f} | {number(each)} | {finished.peak / 1e6:,.0f} "
            f"| {size / 1e6:,.1f} |"
        )
        say(lines[-1])
    return lines


def write_synthetic(path: Path, pairs: int) -> None:
    """Random words: pairs of about 100 tokens, those of the chat template included."""
    rng = random.Random(1)
    vocabulary = ["".join(rng.choices("aeioubcdfghklmnprst", k=5)) for _ in range(5_000)]
    with path.open("w", encoding="utf-8") as file:
        for _ in range(pairs):
            row = {"prompt": words(rng, vocabulary, 12)}
            row |= {side: words(rng, vocabulary, 6) for side in ("chosen", "rejected")}
            file.write(json.dumps(row) + "\n")
