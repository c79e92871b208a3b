"""Types of fewer bits by llama.cpp's own program llama-quantize, where it is on the PATH."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from smoldpo.utils import progress
from smoldpo.utils.errors import ModelError, UsageError

PROGRAM = "llama-quantize"
SMALLER = (
    "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m", "q4_k_s", "iq4_nl", "iq4_xs", "q4_1",
    "q4_0", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k",
)  # fmt: skip
"""What it makes without an importance matrix."""


def require_program(kind: str) -> None:
    """Refuse a smaller type early, where there is nothing to make it with.

    Raises:
        UsageError: and how to get the program.
    """
    if shutil.which(PROGRAM) is None:
        raise UsageError(
            f"--quantize {kind}: is made by llama.cpp's program {PROGRAM}, which is not on the "
            "PATH; it comes with llama.cpp (brew install llama.cpp, or an archive from "
            "github.com/ggml-org/llama.cpp/releases); or export q8_0"
        )


def quantize(source: Path, target: Path, kind: str, threads: int) -> None:
    """Write `source`, a GGUF file in f16, as `target` in a smaller type.

    Raises:
        ModelError: the program refuses, with the end of what it said.
    """
    with progress.spinner(f"{PROGRAM} {kind}"):
        done = subprocess.run(
            [PROGRAM, str(source), str(target), kind.upper(), str(threads)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    if done.returncode or not target.is_file():
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        said = " ".join(lines[-3:]) or f"exit code {done.returncode}"
        raise ModelError(f"{PROGRAM} did not write {kind}: {said}")
