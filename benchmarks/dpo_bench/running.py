"""Child processes of the benchmark: the kernel's account of their memory, and what they say.

This process imports no torch: a child's peak memory is never below that of the process that starts
it.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHILDREN = Path(__file__).resolve().parent / "children.py"


@dataclass(frozen=True)
class Workload:
    """What both trainers are asked to do."""

    name: str
    what: str
    freeze_layers: int
    learning_rate: float
    beta: float
    epochs: int
    pairs: int
    eval_pairs: int

    @property
    def is_warm(self) -> bool:
        """Whether both sides find what an earlier run kept."""
        return self.name == "W3"


@dataclass
class Finished:
    """A child process that ended well."""

    seconds: float
    peak: int
    output: str

    @property
    def report(self) -> Any:
        """What one of children.py says: JSON on its last line."""
        return json.loads(self.output.strip().splitlines()[-1])


@dataclass
class Bench:
    """The arguments, the folder that everything goes into, and what `prepare` found there."""

    arguments: argparse.Namespace
    folder: Path
    facts: dict[str, Any]

    def run(self, command: list[str]) -> Finished:
        """Run a command to its end; its peak resident memory is the kernel's own account."""
        settings = {
            "XDG_CACHE_HOME": str(self.folder / "cache"),
            "HF_HOME": str(self.folder / "hf"),
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
            "TQDM_DISABLE": "1",
            "OMP_NUM_THREADS": str(self.arguments.threads),
            "MKL_NUM_THREADS": str(self.arguments.threads),
        }
        out, errors = self.folder / "stdout", self.folder / "stderr"
        with out.open("w") as stdout, errors.open("w") as stderr:
            begin = time.perf_counter()
            process = subprocess.Popen(
                command, stdout=stdout, stderr=stderr, env=os.environ | settings
            )
            try:
                _, status, usage = os.wait4(process.pid, 0)
            except BaseException:
                process.kill()
                raise
            seconds = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            tail = "\n".join(errors.read_text(errors="replace").splitlines()[-30:])
            sys.exit(f"{tail}\n\nexit code {process.returncode}: {shlex.join(command)}")
        peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return Finished(seconds, peak, out.read_text())

    def child(self, name: str, spec: dict[str, Any]) -> Finished:
        """Run one of children.py's functions in a process of its own."""
        spec = spec | {"spawned": time.time()}
        return self.run([sys.executable, str(CHILDREN), name, json.dumps(spec)])

    def empty_cache(self) -> None:
        """Make smoldpo's caches cold; the unpacked model, which both sides read, stays."""
        for entry in (self.folder / "cache" / "smoldpo").glob("*"):
            if entry.is_dir() and entry.name != "models":
                shutil.rmtree(entry)


def settings(bench: Bench, options: dict[str, Any]) -> list[str]:
    """Options of the command line, with those that every workload has."""
    options = options | {"device": bench.arguments.device, "sample-prompt": "none"}
    options |= {"cache": "disk", "generate-prompts": 0}  # TRL answers no prompts
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


def train(
    bench: Bench, folder: Path, options: dict[str, Any]
) -> tuple[Finished, list[dict[str, Any]], dict[str, Any]]:
    """`smoldpo train` with these options: the process, its optimizer steps, its environment."""
    shutil.rmtree(folder, ignore_errors=True)
    words = settings(bench, options | {"output-dir": folder})
    finished = bench.run([sys.executable, "-m", "smoldpo", "train", *words])
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    steps = [row for row in map(json.loads, lines) if "seconds" in row]
    return finished, steps, json.loads((folder / "environment.json").read_text())


def plan(bench: Bench, options: dict[str, Any]) -> tuple[Finished, dict[str, Any]]:
    """`smoldpo plan` with these options: the process, and what it forecasts."""
    finished = bench.run(
        [sys.executable, "-m", "smoldpo", "plan", *settings(bench, options), "--json"]
    )
    return finished, json.loads(finished.output)


def say(message: str) -> None:
    """Progress, on standard error."""
    print(message, file=sys.stderr, flush=True)
