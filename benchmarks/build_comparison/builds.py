"""A revision as its users get it: built as a wheel, unpacked, and run from there."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WORKING_TREE = "working tree"
ORIGIN = """
from importlib.metadata import distribution
import smoldpo
distribution("smoldpo").entry_points["smoldpo"].load()
print(smoldpo.__file__)
"""


@dataclass(frozen=True)
class Outcome:
    """A command that ended: its exit code, what it wrote, and the seconds from start to end."""

    code: int
    stdout: str
    stderr: str
    seconds: float


@dataclass(frozen=True)
class Build:
    """A built package in `folder`: package/ (the unpacked wheel), cache/ and runs/ are its own."""

    name: str
    folder: Path
    threads: int

    @property
    def runs(self) -> Path:
        """The working folder of its commands."""
        return self.folder / "runs"

    def start(self, words: Sequence[str]) -> subprocess.Popen[str]:
        """Start Python with these arguments; `smoldpo` is this build's, and no hub is asked."""
        threads = str(self.threads)
        settings = {
            "PYTHONPATH": str(self.folder / "package"),
            "XDG_CACHE_HOME": str(self.folder / "cache"),
            "HF_HOME": str(self.folder / "hf"),
            "HF_HUB_OFFLINE": "1",
            "TQDM_DISABLE": "1",
            "PYTHONUTF8": "1",
            "PYTHONHASHSEED": "0",  # PEFT writes target_modules in the order of a set
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
        }
        return subprocess.Popen(
            [sys.executable, *words],
            cwd=self.runs,
            env=os.environ | settings,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def smoldpo(self, words: Sequence[str]) -> Outcome:
        """Run `smoldpo` with these arguments to its end."""
        begun = time.perf_counter()
        process = self.start(["-m", "smoldpo", *words])
        try:
            stdout, stderr = process.communicate()
        except BaseException:
            process.kill()
            raise
        return Outcome(process.returncode, stdout, stderr, time.perf_counter() - begun)

    def interrupt(self, words: Sequence[str], run: str, step: int) -> Outcome:
        """Run `smoldpo`, and send SIGTERM once the metrics of `run` reach this step."""
        begun = time.perf_counter()
        process = self.start(["-m", "smoldpo", *words])
        metrics = self.runs / run / "metrics.jsonl"
        while process.poll() is None:
            text = metrics.read_text(encoding="utf-8") if metrics.exists() else ""
            if f'"step": {step},' in text:
                process.send_signal(signal.SIGTERM)
                break
            time.sleep(0.01)
        stdout, stderr = process.communicate()
        return Outcome(process.returncode, stdout, stderr, time.perf_counter() - begun)

    @property
    def choices(self) -> dict[str, Any]:
        """Kernels and precision that the last command chose by measuring this machine."""
        file = self._choices_file
        return json.loads(file.read_text())["choices"] if file.is_file() else {}

    def take_choices_of(self, other: Build) -> None:
        """Begin with what another build chose: it stands unless the other way is much faster."""
        if other._choices_file.is_file():
            self._choices_file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(other._choices_file, self._choices_file)

    @property
    def _choices_file(self) -> Path:
        return self.folder / "cache" / "smoldpo" / "machine.json"

    def empty_cache(self) -> None:
        """Remove what earlier runs computed; the unpacked model and the choices stay."""
        for entry in (self.folder / "cache" / "smoldpo").glob("*"):
            if entry.is_dir() and entry.name != "models":
                shutil.rmtree(entry)


def build(name: str, revision: str, folder: Path, threads: int) -> Build:
    """Build a revision's wheel with the setuptools that is installed, and unpack it in `folder`.

    Raises:
        SystemExit: no such revision, no wheel, or Python imports another smoldpo than the one
            built.
    """
    source, wheels, package = (folder / part for part in ("source", "wheels", "package"))
    source.mkdir(parents=True)
    if revision == WORKING_TREE:
        _copy_working_tree(source)
    else:
        archive = folder / "source.tar"
        _call(["git", "-C", str(ROOT), "archive", "--output", str(archive), revision])
        shutil.unpack_archive(archive, source, filter="data")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps"]
    _call([*pip, "--no-build-isolation", "--wheel-dir", str(wheels), str(source)])
    with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
        wheel.extractall(package)
    built = Build(name, folder, threads)
    built.runs.mkdir()
    process = built.start(["-c", ORIGIN])
    stdout, stderr = process.communicate()
    if not Path(stdout.strip()).is_relative_to(package):
        sys.exit(f"{name}: the built package is not what is imported: {stdout}{stderr}")
    print(f"{name}: {revision}, imported from {stdout.strip()}", file=sys.stderr)
    return built


def _copy_working_tree(target: Path) -> None:
    """The files that git tracks or would track, as they are now."""
    listed = [
        "git",
        "-C",
        str(ROOT),
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
    ]
    for name in filter(None, _call(listed).split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)


def _call(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr.strip()}")
    return done.stdout
