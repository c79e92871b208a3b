"""`smoldpo export`: from a model's name to a proven file or folder, whole or not at all."""

from __future__ import annotations

import contextlib
import gc
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from smoldpo.export.adapter_targets import adapter_target
from smoldpo.export.proof import Proof, readable_pairs
from smoldpo.export.source import find_origin
from smoldpo.export.targets import TARGETS
from smoldpo.export.verify import Verification, Witness
from smoldpo.reports.html import write_report
from smoldpo.reports.run_files import read_run
from smoldpo.utils.errors import ModelError, UsageError
from smoldpo.utils.files import not_saved, require_space, sha256_of, sync, write_json
from smoldpo.utils.signals import Interruption
from smoldpo.utils.threads import computing

REPORT = "report.html"
RECORD = "exports.json"
"""In a run folder: what was exported from it, one object an export."""


@dataclass(frozen=True)
class Exported:
    """A file or folder that was written and proven."""

    path: Path
    to: str
    quantize: str
    bytes: int
    sha256: dict[str, str]
    """Of each file, by its name in the folder, or of the one file by its own."""
    verified: Verification
    witness: Witness | None
    """None where the other program is not installed."""
    seconds: float
    notes: tuple[str, ...] = ()
    """What else is to be said of it."""

    def as_json(self) -> dict[str, Any]:
        """What --json prints, and a run's exports.json keeps."""
        return {
            "file": str(self.path),
            "to": self.to,
            "quantize": self.quantize,
            "bytes": self.bytes,
            "sha256": self.sha256,
            "seconds": round(self.seconds, 1),
            "verified": self.verified.as_json(),
            "witness": self.witness.as_json() if self.witness else None,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        size = f"{self.quantize}: {self.bytes / 1e6:,.0f} MB"
        others = [str(self.witness)] if self.witness else []
        return "; ".join([f"{size}, {self.verified}", *others, *self.notes])


def export_model(
    name: str,
    to: str = "gguf",
    quantize: str | None = None,
    output: Path | None = None,
    overwrite: bool = False,
    data: str | None = None,
    pairs: int = 32,
    adapter: bool = False,
) -> Exported:
    """Write a model for another program, read it back, and hold it against the model.

    Args:
        name: a run, a model or adapter folder, builtin, a GGUF file or a hub id. An adapter is
            merged into its model.
        to: of TARGETS.
        output: the file or folder; by default in the run's folder export/, else in the working
            folder.
        data: pairs to prove it on; by default the run's held-out ones, else the built-in ones.
        pairs: how many of them.
        adapter: write an adapter by itself, and not merged into its model.

    Raises:
        UsageError: a type that cannot be written; something that is there already.
        ModelError: a model that cannot be exported in this form.
        VerificationError: what was written is not the model. It is removed then, as on every error.
        SmoldpoError: no room on the disk.
    """
    with Interruption(), computing(None):  # a signal raises, so that what is unfinished goes
        return _export(name, to, quantize, output, overwrite, data, pairs, adapter)


def _export(
    name: str,
    to: str,
    quantize: str | None,
    output: Path | None,
    overwrite: bool,
    data: str | None,
    pairs: int,
    adapter: bool,
) -> Exported:
    began = time.perf_counter()
    target = TARGETS[to]
    if not adapter:
        kind = target.kind(quantize)
    origin = find_origin(name)
    if adapter:
        target, origin = adapter_target(to, origin)
        kind = target.kind(quantize)
    path = target.path(output, origin.folder, origin.about.name, kind)
    if path.exists() and not overwrite:
        raise UsageError(f"--output {path}: exists; give another name, or --overwrite")
    if path.exists() and Path(name).exists() and path.samefile(name):
        raise UsageError(f"--output {path}: is the model itself; give another name")
    model: Any
    model, tokenizer = origin.load()
    try:
        target.require(model)
    except ModelError as error:
        raise ModelError(f"{name}: {error}") from None
    chosen, how = readable_pairs(model, tokenizer, origin, origin.pairs(data)[:pairs])
    needed = target.needed(model, kind)
    require_space(path.parent, needed, f"the export {path.name}")
    with _staged(path) as staging:
        try:
            notes = target.write(staging, model, tokenizer, kind, origin)
            for file in _files(staging):
                sync(file)
        except ModelError as error:
            raise ModelError(f"{name}: {error}") from None
        except (OSError, SafetensorError) as error:
            raise not_saved(path, "the export", needed, error) from None
        proof = Proof.of(model, tokenizer, chosen, how)
        del model
        gc.collect()
        verified, witness = target.prove(staging, proof, kind)
        base = staging if staging.is_dir() else staging.parent
        hashes = {str(file.relative_to(base)): sha256_of(file) for file in _files(staging)}
        size = sum(file.stat().st_size for file in _files(staging))
    seconds = time.perf_counter() - began
    found = Exported(path, to, kind, size, hashes, verified, witness, seconds, tuple(notes))
    if origin.run:
        _record(origin.run, found)
    taken = target.take(path, origin.about.name)
    return replace(found, notes=(*found.notes, *taken))


def _files(path: Path) -> list[Path]:
    """A file itself, or the files of a folder."""
    return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())


@contextlib.contextmanager
def _staged(path: Path) -> Iterator[Path]:
    """A file or folder to write, which becomes `path` when the block ends well, else goes.

    Folders above it that were made for it go too.
    """
    missing = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield staging / path.name
        if path.is_dir():
            path.rename(staging / "replaced")
        (staging / path.name).replace(path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        for folder in missing:
            with contextlib.suppress(OSError):  # it is not empty: all went well
                folder.rmdir()


def _record(run: Path, found: Exported) -> None:
    """Keep in the run's folder, and show in its report, what was exported; of a file the last."""
    row = found.as_json()
    kept: list[dict[str, Any]] = []
    with contextlib.suppress(OSError, ValueError):
        kept = json.loads((run / RECORD).read_text(encoding="utf-8"))
    write_json(run / RECORD, [*(old for old in kept if old.get("file") != row["file"]), row])
    if (run / REPORT).is_file():
        write_report([read_run(run)], run / REPORT)
