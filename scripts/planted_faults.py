"""Plant faults in a copy of the package, and see the tests that must go red go red.

    python scripts/planted_faults.py                    all of them
    python scripts/planted_faults.py engine/cache cli   those of a wing, or of a part of one
    python scripts/planted_faults.py holm-off-by-one    one

planted_faults.toml beside this file lists them. Each is a mistake that somebody could make, and
names the tests that find it. A fault that survives is a missing test. First the same tests run on
the package as it is: a test that is red without the fault says nothing about it. Exit code 1 where
a fault survives, where the text that it replaces is not there exactly once, or where its tests
cannot be run.

Every fault has a copy of the checkout to itself. Processes are forked from one that has imported
torch and transformers, so a fault takes a second beside its tests.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import multiprocessing
import os
import py_compile
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIST = Path(__file__).with_suffix(".toml")
LIBRARIES = ["torch", "transformers", "datasets", "peft", "pytest", "hypothesis"]
GREEN, RED = 0, 1
"""Exit codes of pytest; any other means that the tests did not run."""


@dataclass(frozen=True)
class Fault:
    """One entry of the list: in `file` the text `before`, which is there once, becomes `after`."""

    name: str
    file: str
    before: str
    after: str
    breaks: str
    tests: tuple[str, ...]

    @property
    def place(self) -> str:
        """The file, from its wing on."""
        return self.file.removeprefix("smoldpo/")

    def plant(self, folder: Path) -> None:
        """Change the file in a copy of the checkout.

        Raises:
            ValueError: the text is not there exactly once, or what comes out is not Python.
        """
        path = folder / self.file
        text = path.read_text(encoding="utf-8")
        if text.count(self.before) != 1:
            raise ValueError(f"{self.file} holds {self.before!r} {text.count(self.before)} times")
        changed = text.replace(self.before, self.after)
        try:
            compile(changed, self.file, "exec")
        except SyntaxError as error:
            raise ValueError(f"{self.file}: {error}") from None
        path.write_text(changed, encoding="utf-8")


def read_faults() -> list[Fault]:
    """The list, in its order."""
    entries = tomllib.loads(LIST.read_text(encoding="utf-8"))["fault"]
    return [Fault(**entry | {"tests": tuple(entry["tests"])}) for entry in entries]


def chosen(faults: list[Fault], names: Iterable[str]) -> list[Fault]:
    """Those of the given names and folders; all where none is given."""
    found: dict[str, Fault] = {}
    for name in names:
        some = [f for f in faults if f.name == name or f.place.startswith((f"{name}/", f"{name}."))]
        if not some:
            raise SystemExit(f"no fault, wing or file is called {name!r}; see {LIST.name}")
        found |= {fault.name: fault for fault in some}
    return list(found.values()) or faults


def copy_checkout(folder: Path) -> Path:
    """The files of the checkout as they are now, compiled, beside the data that tests read."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    copy = folder / "checkout"
    for name in filter(lambda name: (ROOT / name).is_file(), names.splitlines()):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    if (ROOT.parent / "shared").is_dir():
        (folder / "shared").symlink_to(ROOT.parent / "shared")
    by_content = py_compile.PycInvalidationMode.CHECKED_HASH  # a fault may come in the same second
    compileall.compile_dir(copy / "smoldpo", quiet=2, invalidation_mode=by_content)
    return copy


def run_tests(copy: Path, tests: tuple[str, ...], fault: Fault | None) -> tuple[int, str]:
    """pytest's exit code and what it said, in a copy of the checkout with the fault, if any."""
    with tempfile.TemporaryDirectory(prefix="smoldpo-fault-") as folder:
        own = Path(shutil.copytree(copy.parent, Path(folder) / "all", symlinks=True)) / copy.name
        log = Path(folder) / "said.txt"
        if fault is not None:
            fault.plant(own)
        with log.open("w") as said, contextlib.chdir(own):
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            os.environ["PYTHONPATH"] = str(own)
            sys.path[:0] = [str(own), str(own / "tests")]
            import pytest

            options = [
                "-q",
                "-n",
                "0",
                "-p",
                "no:cacheprovider",
                "--durations=0",
                "--rootdir",
                str(own),
            ]
            code = int(pytest.main([*options, *(["-x"] if fault else []), *tests]))
        return code, log.read_text(errors="replace")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="wings, parts of wings, or names; default: all")
    parser.add_argument("-j", "--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--faults-only", action="store_true", help="skip the run without faults")
    arguments = parser.parse_args()
    faults = chosen(read_faults(), arguments.names)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    began, bad = time.monotonic(), 0
    with tempfile.TemporaryDirectory(prefix="smoldpo-faults-") as folder:
        copy = copy_checkout(Path(folder))
        pool = ProcessPoolExecutor(arguments.jobs, context, max_tasks_per_child=1)
        with pool:
            if not arguments.faults_only:
                tests = tuple(dict.fromkeys(test for fault in faults for test in fault.tests))
                code, said = pool.submit(run_tests, copy, tests, None).result()
                print(f"without a fault: {'green' if code == GREEN else said}", flush=True)
                if code != GREEN:
                    return 1
            runs = {fault: pool.submit(run_tests, copy, fault.tests, fault) for fault in faults}
            for fault, run in runs.items():
                try:
                    code, said = run.result()
                except ValueError as error:
                    code, said = -1, str(error)
                word = {GREEN: "SURVIVED", RED: "red"}.get(code, "NOT RUN")
                print(f"{word:8}  {fault.place}  {fault.name}: {fault.breaks}", flush=True)
                if code != RED:
                    bad += 1
                    print(said if code != GREEN else "", end="", flush=True)
    took = time.monotonic() - began
    print(f"{len(faults) - bad} of {len(faults)} faults are red ({took:.0f} s)")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
