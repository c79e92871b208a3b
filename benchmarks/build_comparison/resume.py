"""A run that one build began and another goes on with."""

from __future__ import annotations

import argparse
import json
import re
import sys

from build_comparison.builds import Build
from build_comparison.report import Report, compare, run

STEPS, INTERRUPTED = 6, 3
"""Optimizer steps of the run that is interrupted, and the step behind which it is."""


def compare_resume(before: Build, after: Build, options: argparse.Namespace) -> int:
    """Interrupt a run of BEFORE, resume it with AFTER; returns the number of differences."""
    train = (
        f"train --max-train-samples {2 * STEPS} --max-eval-samples 2 --dtype {options.dtype} --compile off "
        "--per-device-train-batch-size 2 --gradient-accumulation-steps 1 --num-train-epochs 1 "
        "--freeze-layers 25 --max-length 256 --sample-prompt none --generate-prompts 0 --output-dir run"
    )
    whole, resumed = before.runs / "whole", before.runs / "run"
    run(before, train)
    resumed.rename(whole)  # and the other in its place, so that the settings are the same
    stopped = before.interrupt(train.split(), "run", INTERRUPTED)
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
