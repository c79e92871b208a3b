"""Checkpoints on disk: safetensors and JSON, saved whole or not at all, verified when read.

    checkpoints/step-N/*.safetensors    tensors
    checkpoints/step-N/state.json       everything else
    checkpoints/step-N/manifest.json    SHA-256 and size of each of the others, written last

A save writes into a hidden folder, brings every file to the disk, and renames the folder into
place. So a folder called step-N is complete unless something damaged it later, which its manifest
then shows; hidden folders are what a kill left behind, and are swept. What is in a checkpoint is
state.py's matter.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from smoldpo._version import __version__
from smoldpo.utils.errors import SmoldpoError
from smoldpo.utils.files import not_saved, sha256_of, sync, write_json

MANIFEST, STATE = "manifest.json", "state.json"
NAME = re.compile(r"step-(\d+)")
FORMAT = 1
"""Raised when the meaning of what is saved changes."""

Tensors = dict[str, torch.Tensor]


class DamagedError(SmoldpoError):
    """A checkpoint that is not what was saved; its text says which and why."""


@dataclass(frozen=True)
class Checkpoint:
    """The state after `step` optimizer steps: files of tensors by name, and what JSON can hold."""

    step: int
    tensors: dict[str, Tensors]
    state: dict[str, Any]

    @property
    def bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for part in self.tensors.values() for tensor in part.values())


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Save as `folder`/step-N, and return that; one that is there and verifies is left as it is.

    Raises:
        SmoldpoError: the disk is full or not writable; what was saved before is untouched.
    """
    target = folder / f"step-{checkpoint.step}"
    try:
        if target.exists():
            try:
                verify(target)
                return target
            except DamagedError:
                _remove(target)
        folder.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=folder))
        try:
            _write(staging, checkpoint)
            staging.rename(target)
            sync(folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise not_saved(target, "the checkpoint", checkpoint.bytes, error) from None
    return target


def _write(staging: Path, checkpoint: Checkpoint) -> None:
    staging.chmod(0o755)
    for name, tensors in checkpoint.tensors.items():
        path = staging / f"{name}.safetensors"
        save_file(tensors, path)
        sync(path)
    about = {"format": FORMAT, "smoldpo": __version__, "step": checkpoint.step}
    write_json(staging / STATE, about | checkpoint.state)
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(staging.iterdir())
    }
    write_json(staging / MANIFEST, {"format": FORMAT, "files": files})
    sync(staging)


def verify(path: Path) -> list[str]:
    """Check every file of a checkpoint against its manifest; returns their names.

    Raises:
        DamagedError: naming the checkpoint, and the file that is missing, cut short or changed.
        SmoldpoError: another version saved it in a format of its own; the text says which version.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files = {str(n): (int(f["bytes"]), str(f["sha256"])) for n, f in manifest["files"].items()}
        known = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{path}: its {MANIFEST} cannot be read ({error})") from None
    if known != FORMAT:
        maker = _maker(path)
        if maker in (None, __version__):
            raise DamagedError(f"{path}: its {MANIFEST} names format {known!r}, not {FORMAT}")
        raise SmoldpoError(
            f"{path}: was saved by smoldpo {maker} in format {known!r}, and this is smoldpo "
            f"{__version__}, which reads {FORMAT}; resume the run with smoldpo {maker}"
        )
    for name, (size, digest) in files.items():
        file = path / name
        if not file.is_file():
            raise DamagedError(f"{path}: {name} is missing")
        if file.stat().st_size != size:
            raise DamagedError(f"{path}: {name} has {file.stat().st_size:,} bytes, not {size:,}")
        if sha256_of(file) != digest:
            raise DamagedError(f"{path}: {name} is damaged (its SHA-256 is not the one saved)")
    return list(files)


def _maker(path: Path) -> str | None:
    """The version of smoldpo that saved a checkpoint, if it can be read."""
    try:
        return json.loads((path / STATE).read_text(encoding="utf-8")).get("smoldpo")
    except (OSError, ValueError, AttributeError):
        return None


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint after verifying it.

    Raises:
        DamagedError: it does not fit its manifest, or does not hold a checkpoint at all.
        SmoldpoError: as `verify`.
    """
    names = verify(path)
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        tensors = {
            Path(name).stem: load_file(path / name)
            for name in names
            if name.endswith(".safetensors")
        }
        step = int(state["step"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise DamagedError(f"{path}: cannot be read ({error})") from None
    if path.name != f"step-{step}":
        raise DamagedError(f"{path}: holds step {step}")
    return Checkpoint(step, tensors, state)


def saved_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in `folder`, damaged ones too, oldest first."""
    found = (NAME.fullmatch(path.name) for path in folder.glob("step-*") if path.is_dir())
    return sorted(int(match.group(1)) for match in found if match)


def newest(folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that verifies, or None; refused ones are named to `warn`."""
    for step in reversed(saved_steps(folder)):
        try:
            return load_checkpoint(folder / f"step-{step}")
        except DamagedError as error:
            warn(f"checkpoint refused: {error}; the one before it is used")
    return None


def prune(folder: Path, step: int, keep: int, protect: Collection[int] = ()) -> None:
    """After a save at `step`: remove all but the newest `keep` checkpoints up to it, and `protect`.

    Later ones are not counted: a run only saves before them when it refused them.
    """
    older = [number for number in saved_steps(folder) if number <= step]
    for number in older[: max(0, len(older) - keep)]:
        if number not in protect:
            _remove(folder / f"step-{number}")


def remove_partial(folder: Path) -> None:
    """Remove what kills left of saves and removals."""
    for path in folder.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def _remove(path: Path) -> None:
    """Renamed out of sight first, so that a kill leaves no half checkpoint under its name."""
    hidden = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    path.rename(hidden / path.name)
    shutil.rmtree(hidden, ignore_errors=True)
