"""One training by both builds in turns."""

from __future__ import annotations

import argparse
import json
import shutil
import statistics

from build_comparison.builds import Build
from build_comparison.report import run


def compare_speed(before: Build, after: Build, options: argparse.Namespace) -> None:
    """W1 in turns: seconds from start to end, and seconds of the optimizer steps alone."""
    train = (
        f"train --data {options.data} --max-train-samples {options.speed_pairs} "
        f"--max-eval-samples {max(2, options.speed_pairs // 5)} --freeze-layers 25 --learning-rate "
        "2e-4 --num-train-epochs 3 --per-device-train-batch-size 8 --gradient-accumulation-steps 1 "
        "--max-length 512 --cache disk --sample-prompt none --generate-prompts 0 --output-dir speed"
    )
    train += f" --eval-data {options.eval_data}" if options.eval_data else ""
    for built in (before, after):
        run(built, "data show builtin --row 1")  # unpacks the model
    print("| round | before s | after s | ratio | steps before s | steps after s | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    ratios: list[tuple[float, float]] = []
    for number in range(1, options.rounds + 1):
        seconds = []
        for built in (before, after):
            built.empty_cache()
            after.take_choices_of(before)
            shutil.rmtree(built.runs / "speed", ignore_errors=True)
            outcome = run(built, train)
            lines = (built.runs / "speed" / "metrics.jsonl").read_text().splitlines()
            steps = sum(json.loads(line).get("seconds", 0.0) for line in lines)
            seconds.append((outcome.seconds, steps))
        (all_before, steps_before), (all_after, steps_after) = seconds
        ratios.append((all_before / all_after, steps_before / steps_after))
        print(
            f"| {number} | {all_before:.1f} | {all_after:.1f} | {ratios[-1][0]:.3f} "
            f"| {steps_before:.1f} | {steps_after:.1f} | {ratios[-1][1]:.3f} |",
            flush=True,
        )
    whole, steps = (statistics.median(column) for column in zip(*ratios, strict=True))
    print(f"\nmedian of before / after: {whole:.3f} from start to end, {steps:.3f} in the steps")
