"""Faults 1 and 2 on the real weights: killed and resumed, compared bit for bit with the whole run.

    python benchmarks/prove_resume.py [--kills N] [--pairs N] [--frozen N ...] [--dtype NAME]

Prints Markdown for docs/reliability.md. Exit code 1 where a resume is not exact.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from smoldpo.training.prove_resume import compare_killed_run
from smoldpo.utils.files import processor_name


def main() -> int:
    """Prove each depth of freezing in its turn."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--frozen", type=int, nargs="+", default=[25])
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    print(f"{processor_name()}, SmolLM2-135M-Instruct, {options.pairs} of the built-in pairs\n")
    print("| frozen layers | steps | checkpoints found after each kill | differences | seconds |")
    print("| --- | --- | --- | --- | --- |")
    failed = False
    for frozen in options.frozen:
        start = time.monotonic()
        settings = [
            "--max-train-samples", str(options.pairs), "--max-eval-samples", "16", "--dtype",
            options.dtype, "--num-train-epochs", str(options.epochs), "--freeze-layers",
            str(frozen),
            "--save-steps", "2", "--sample-prompt", "none", "--eval-steps", "5", "--compile", "off",
        ]  # fmt: skip
        with tempfile.TemporaryDirectory(prefix="smoldpo-resume-") as place:
            result = compare_killed_run(
                Path(place), settings, options.kills, lambda said: print(said, file=sys.stderr)
            )
        failed |= not result.proven
        found = "; ".join(result.differences) or "none"
        kills = ", ".join(map(str, result.kills))
        seconds = time.monotonic() - start
        print(f"| {frozen} | {result.steps} | {kills} | {found} | {seconds:.0f} |", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
