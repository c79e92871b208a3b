"""A run that one build began and another goes on with."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

from build_comparison.builds import Build
from build_comparison.report import Report, compare, run

STEPS, INTERRUPTED = 6, 3
"""Optimizer steps of the run that is interrupted, and the step behind which it is."""


def compare_resume(before: Build, after: Build, options: argparse.Namespace) -> int:
    """Interrupt a run of BEFORE, resume it with AFTER; returns the number of differences."""
    train = (
        f"train --max-train-samples {2 * STEPS} --max-eval-samples 2 --dtype {options.dtype} "
        "--compile off --per-device-train-batch-size 2 --gradient-accumulation-steps 1 "
        "--num-train-epochs 1 --freeze-layers 25 --max-length 256 --sample-prompt none "
        "--generate-prompts 0 --output-dir run"
    )
    whole, resumed = before.runs / "whole", before.runs / "run"
    run(before, train)
    resumed.rename(whole)
    _copy_beginning(whole, resumed)
    stopped = before.interrupt(["resume", "run"], "run", INTERRUPTED)
    if stopped.code != 143:
        sys.exit(f"SIGTERM: exit code {stopped.code} instead of 143\n{stopped.stderr}")
    after.take_choices_of(before)
    outcome = after.smoldpo(["resume", str(resumed)])
    print("resume says:", *outcome.stderr.strip().splitlines(), sep="\n  ", file=sys.stderr)
    report = Report()
    if outcome.code == 0:
        compare(report, "resume", whole, resumed)
        print("\nresumed exactly" if not report.differences else "\nresumed, but not exactly")
        return report.differences
    version = json.loads((whole / "environment.json").read_text())["smoldpo"]
    named = re.search(rf"(?<![\d.]){re.escape(version)}(?![\d.]*\d)", outcome.stderr)
    refused = outcome.code in (1, 2) and "Traceback" not in outcome.stderr
    report.row("resume", "refused in words", None if refused else f"exit code {outcome.code}")
    report.row("resume", f"names version {version}", None if named else "the message does not")
    print(f"\nrefused (exit code {outcome.code}):\n{outcome.stderr.strip()}")
    return report.differences


def _copy_beginning(whole: Path, begun: Path) -> None:
    """A run folder as it was at the run's start: with the kernels that it chose by measuring."""
    begun.mkdir()
    for name in ("config.yaml", "environment.json", "data.json"):
        shutil.copy(whole / name, begun)
    kept = json.loads((whole / "resume.json").read_text())
    (begun / "resume.json").write_text(json.dumps(kept | {"finished": None}))
