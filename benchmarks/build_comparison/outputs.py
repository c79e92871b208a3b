"""The same commands in both builds at once, and what they print and leave."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from safetensors.numpy import load_file, save_file

from build_comparison.builds import Build, Outcome
from build_comparison.differences import first_difference, text_difference
from build_comparison.report import Report, compare, run

SMALL_LAYERS = 4
"""Decoder layers of the small model: the first ones of the built-in model."""
RETRIES = 3
"""A command of AFTER is run again so often where it chose other kernels than BEFORE."""


@dataclass(frozen=True)
class Command:
    """A command line, its expected exit code, and the files or folders that it leaves."""

    name: str
    words: str
    leaves: tuple[str, ...] = ()
    code: int = 0


def commands(pairs: int, dtype: str, shared: Path) -> list[Command]:
    """What both builds run, the training of the built-in model first: the small one is cut from
    it.
    """
    small = shared / "small"

    def train(model: str | Path, count: int, answered: int = 0) -> str:
        return (
            f"--model {model} --max-train-samples {count} --max-eval-samples {max(2, count // 2)} "
            f"--dtype {dtype} --compile off --per-device-train-batch-size 2 "
            "--gradient-accumulation-steps 2 --num-train-epochs 1 --warmup-ratio 0 --max-length "
            f"256 --sample-prompt none --generate-prompts {answered} "
            "--max-new-tokens 8"
        )

    quiet = train(small, pairs)
    return [
        Command(
            "train, 25 layers frozen",
            f"train {train('builtin', max(2, pairs // 2))} --freeze-layers 25 --output-dir frozen",
            ("frozen",),
        ),
        Command("show", "show frozen --json"),
        Command("config show", "config show --beta 0.2 --freeze-layers 20"),
        Command("config schema", "config schema"),
        Command("unknown setting", "train --bta 0.2", code=2),
        Command(
            "data check",
            "data check builtin --split test --json --write clean.jsonl",
            leaves=("clean.jsonl",),
        ),
        Command(
            "train, everything",
            f"train {train(small, pairs, answered=2)} --freeze-layers 0 --output-dir full",
            ("full",),
        ),
        Command(
            "train, LoRA",
            f"train {quiet} --use-peft --merge --output-dir lora",
            ("lora",),
        ),
        Command(
            "evaluate, two models",
            f"evaluate {small} frozen builtin --max-samples 4 --generate 1 --max-new-tokens 8 "
            "--judge length --rows rows.jsonl --json",
            ("rows.jsonl",),
        ),
        Command("plan", f"plan {quiet} --json"),
        Command(
            "sweep",
            f"sweep {shared / 'sweep.yaml'} {quiet} --freeze-layers 2 --output-dir sweep --json",
            ("sweep",),
        ),
    ]


def compare_outputs(before: Build, after: Build, shared: Path, options: argparse.Namespace) -> int:
    """Run every command in both builds at once, and compare; returns the number of differences."""
    report = Report()
    (shared / "sweep.yaml").write_text("sweep:\n  beta: [0.1, 0.5]\n")
    first, *others = commands(options.pairs, options.dtype, shared)
    for command in (first, *(other for other in others if options.only in other.name)):
        one, other = run_both(before, after, command)
        if one.code == other.code and before.choices != after.choices:
            found = first_difference(before.choices, after.choices)
            report.row(command.name, "kernels chosen by measuring: not comparable", found)
        if one.code == other.code:
            report.row(command.name, f"exit code {one.code}", None)
        else:
            tail = " ".join(other.stderr.split()[-40:])
            report.row(command.name, "exit code", f"{one.code} and {other.code}: {tail}")
        report.row(command.name, "standard output", text_difference(one.stdout, other.stdout))
        if command.code:
            report.row(command.name, "standard error", text_difference(one.stderr, other.stderr))
        for name in command.leaves:
            compare(report, command.name, before.runs / name, after.runs / name)
        if command is first:
            cut_model(before.runs / "frozen" / "model", shared / "small")
    return report.differences


def run_both(before: Build, after: Build, command: Command) -> tuple[Outcome, Outcome]:
    """Run a command in both at once; AFTER's again where the two chose other kernels by
    measuring.
    """
    after.take_choices_of(before)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(run, before, command.words, command.code)
        second = pool.submit(after.smoldpo, command.words.split())
        one, other = first.result(), second.result()
    print(f"{command.name}: {one.seconds:.0f} and {other.seconds:.0f} s", file=sys.stderr)
    for _ in range(RETRIES):
        if one.code != other.code or before.choices == after.choices:
            break
        after.take_choices_of(before)
        for name in command.leaves:
            shutil.rmtree(after.runs / name, ignore_errors=True)
        other = after.smoldpo(command.words.split())
    return one, other


def cut_model(source: Path, target: Path) -> None:
    """A model folder with the first SMALL_LAYERS decoder layers of another."""
    target.mkdir()
    for file in source.glob("*token*"):
        shutil.copy(file, target)
    for file in source.glob("*.jinja"):
        shutil.copy(file, target)
    config = json.loads((source / "config.json").read_text()) | {"num_hidden_layers": SMALL_LAYERS}
    (target / "config.json").write_text(json.dumps(config))
    weights = load_file(source / "model.safetensors")
    layer = re.compile(r"\.layers\.(\d+)\.")
    kept = {
        name: values
        for name, values in weights.items()
        if not (found := layer.search(name)) or int(found[1]) < SMALL_LAYERS
    }
    save_file(kept, target / "model.safetensors", {"format": "pt"})
