"""Rows a second and peak memory of `smoldpo data check` on synthetic JSONL.

    python benchmarks/bench_data_check.py --rows 1000000 [--model builtin]

The rows are random words in the lengths of HH-RLHF (about 1.3 kB each); one in fifty has a fault.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMIT_BYTES = 2 * 1024**3


def words(rng: random.Random, vocabulary: list[str], count: int) -> str:
    """`count` words in sentences of about twelve."""
    chosen = rng.choices(vocabulary, k=max(1, count))
    for at in range(11, len(chosen), 12):
        chosen[at] += "."
    return " ".join(chosen).capitalize() + "."


def write_rows(path: Path, rows: int, seed: int = 1) -> None:
    """Synthetic pairs; each fiftieth repeats, contradicts or spoils a row."""
    rng = random.Random(seed)
    vocabulary = [
        "".join(rng.choices("aeioubcdfghklmnprstvw", k=rng.randint(2, 9))) for _ in range(20_000)
    ]
    before: dict[str, object] = {}
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            row = {
                "prompt": [
                    {"role": "user", "content": words(rng, vocabulary, rng.randint(5, 180))}
                ],
                "chosen": words(rng, vocabulary, int(rng.expovariate(1 / 50))),
                "rejected": words(rng, vocabulary, int(rng.expovariate(1 / 45))),
            }
            if before and number % 50 == 0:
                spoil = number // 50 % 4
                if spoil == 0:
                    row = before
                elif spoil == 1:
                    row = before | {"chosen": before["rejected"], "rejected": before["chosen"]}
                elif spoil == 2:
                    row["chosen"] += "\n\nHuman"
                else:
                    row["rejected"] = row["chosen"]
            before = row
            file.write(json.dumps(row) + "\n")


CHECK = """
import sys
from smoldpo.cli.data import app
app(["check", sys.argv[1], "--model", sys.argv[2], "--json"])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--model", default="builtin", help="whose tokenizer counts; none: words")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder) / "rows.jsonl", Path(folder) / "report.json"
        write_rows(data, arguments.rows)
        start = time.perf_counter()
        with out.open("w") as file:
            command = [sys.executable, "-c", CHECK, str(data), arguments.model]
            subprocess.run(command, stdout=file, check=True)
        seconds = time.perf_counter() - start
        report = json.loads(out.read_text())
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        print(f"rows              {report['rows_read']:,} ({data.stat().st_size / 1e6:,.0f} MB)")
        print(f"kept, findings    {report['rows_kept']:,}, {len(report['touched']):,}")
        print(
            f"tokens counted of {report['statistics']['pairs_counted']:,} pairs in the even sample"
        )
        print(f"time              {seconds:.1f} s, {arguments.rows / seconds:,.0f} rows/s")
        print(f"peak memory       {peak / 1e9:.2f} GB")
        if peak > LIMIT_BYTES:
            sys.exit(f"peak memory is over {LIMIT_BYTES:,} bytes")


if __name__ == "__main__":
    main()
