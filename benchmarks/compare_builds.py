"""The built package of one revision against another's: outputs, resuming, and speed.

    python benchmarks/compare_builds.py BEFORE [AFTER] [--outputs] [--resume] [--speed]

Both revisions are built as wheels, unpacked, and run by this Python with caches of their own.

--outputs  both run the same commands side by side; saved weights, metrics, evaluations and what
           is printed must be equal, all but times, rates and memory (the default)
--resume   a run of BEFORE that SIGTERM interrupts is resumed by AFTER: exactly, or refused with
           a message that names the version
--speed    W1 of bench_dpo.py on fewer pairs, in turns; ratios above 1 say that AFTER is faster

Exit code 1 on any difference.

examples:
  python benchmarks/compare_builds.py HEAD              # the working tree against its commit
  python benchmarks/compare_builds.py main~1 main --outputs --resume
  python benchmarks/compare_builds.py HEAD --only LoRA  # and the training that the others rest on
  python benchmarks/compare_builds.py main --speed --speed-pairs 200 --rounds 3
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path

from build_comparison.builds import WORKING_TREE, Build, build
from build_comparison.outputs import compare_outputs
from build_comparison.resume import compare_resume
from build_comparison.speed import compare_speed


def parse_arguments() -> argparse.Namespace:
    """The command line; without a comparison asked for, outputs are compared."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("before", metavar="BEFORE", help="a git revision")
    add("after", metavar="AFTER", nargs="?", default=WORKING_TREE, help="(the working tree)")
    for name in ("outputs", "resume", "speed"):
        add(f"--{name}", action="store_true")
    add("--only", default="", metavar="TEXT", help="of --outputs, commands whose names hold this")
    add("--pairs", type=int, default=4, metavar="N", help="training pairs of --outputs (4)")
    add("--dtype", default="float32", help="of --outputs and --resume (float32)")
    add("--speed-pairs", type=int, default=200, metavar="N", help="training pairs of --speed (200)")
    add("--rounds", type=int, default=3, metavar="N", help="rounds of --speed (3)")
    add("--data", type=_place, default="builtin", metavar="FILE", help="pairs of --speed (builtin)")
    add(
        "--eval-data",
        type=_place,
        metavar="FILE",
        help="held-out pairs of --speed (the data's own)",
    )
    add("--threads", type=int, default=os.cpu_count(), metavar="N", help="of both together (all)")
    options = parser.parse_args()
    options.outputs |= not (options.resume or options.speed)
    return options


def _place(name: str) -> str:
    """A file by its whole path, since the builds run in folders of their own; other names as they
    are.
    """
    return str(Path(name).resolve()) if Path(name).exists() else name


def main() -> int:
    """Build both, and compare what is asked for."""
    options = parse_arguments()
    differences = 0
    # An exception, so that no folder is left behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    with tempfile.TemporaryDirectory(prefix="compare-builds-") as place:
        folder = Path(place)
        names = (("before", options.before), ("after", options.after))
        before, after = (build(name, rev, folder / name, options.threads) for name, rev in names)
        if options.outputs:
            shared = folder / "shared"
            shared.mkdir()
            half = max(1, options.threads // 2)
            halves = (Build(built.name, built.folder, half) for built in (before, after))
            differences += compare_outputs(*halves, shared, options)
        if options.resume:
            differences += compare_resume(before, after, options)
        if options.speed:
            compare_speed(before, after, options)
    if options.outputs or options.resume:
        print(f"\n{differences} differences" if differences else "\nno difference")
    return int(differences > 0)


if __name__ == "__main__":
    sys.exit(main())
