"""`smoldpo export`: from a model's name to a proven file, whole or not at all."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard

from smoldpo.config.load import build_config, load_yaml
from smoldpo.data.load import load_pairs
from smoldpo.data.template_settings import tokenization
from smoldpo.data.tokenize import PairTokenizer
from smoldpo.engine.autotune import choose_kernels
from smoldpo.evaluation.metrics import PairFacts
from smoldpo.export import llama_cpp
from smoldpo.export.gguf import About, file_bytes, require_exportable, require_type, write_gguf
from smoldpo.export.llama_cpp import Witness
from smoldpo.export.verify import Verification, compare, measure
from smoldpo.models.builtin import BUILTIN, CARD_BASE
from smoldpo.models.families import FAMILIES
from smoldpo.models.gguf import read_gguf
from smoldpo.models.hf_logging import quiet
from smoldpo.models.load import ModelSource, find_model, load_model, load_tokenizer, positions
from smoldpo.training.setup import load_data
from smoldpo.types import PreferencePair
from smoldpo.utils import progress
from smoldpo.utils.errors import DataError, ModelError, SmoldpoError, UsageError
from smoldpo.utils.files import not_saved, require_space, sha256_of, sync, write_json
from smoldpo.utils.signals import Interruption
from smoldpo.utils.threads import computing

RECORD = "exports.json"
"""In a run folder: what was exported from it, one object a file."""
LONGEST = 1024
"""Tokens of prompt and completion of the pairs that prove a file, where the model has room."""


@dataclass(frozen=True)
class Exported:
    """A file that was written and proven."""

    file: Path
    quantize: str
    bytes: int
    sha256: str
    verified: Verification
    llama_cpp: Witness | None
    """None where no llama.cpp is installed."""
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """What --json prints, and a run's exports.json keeps."""
        return {
            "file": str(self.file),
            "to": "gguf",
            "quantize": self.quantize,
            "bytes": self.bytes,
            "sha256": self.sha256,
            "seconds": round(self.seconds, 1),
            "verified": self.verified.as_json(),
            "llama_cpp": self.llama_cpp.as_json() if self.llama_cpp else None,
        }

    def __str__(self) -> str:
        line = f"{self.quantize}: {self.bytes / 1e6:,.0f} MB, {self.verified}"
        return f"{line}; {self.llama_cpp}" if self.llama_cpp else line


def export_gguf(
    name: str,
    quantize: str = "f16",
    output: Path | None = None,
    overwrite: bool = False,
    data: str | None = None,
    pairs: int = 32,
) -> Exported:
    """Write a model as a GGUF file, read the file back, and hold it against the model.

    Args:
        name: a run, a model or adapter folder, builtin, a GGUF file or a hub id. An adapter is
            merged into its model.
        output: the file; by default in the run's folder export/, else in the working folder.
        data: pairs to prove it on; by default the run's held-out ones, else the built-in ones.
        pairs: how many of them.

    Raises:
        UsageError: a type that cannot be written; a file that is there already.
        ModelError: a model that cannot be exported as GGUF.
        VerificationError: the file is not the model. It is removed then, as on every error.
        SmoldpoError: no room on the disk.
    """
    with Interruption(), computing(None):  # a signal raises, so that the unfinished file goes
        return _export_gguf(name, quantize, output, overwrite, data, pairs)


def _export_gguf(
    name: str, quantize: str, output: Path | None, overwrite: bool, data: str | None, pairs: int
) -> Exported:
    began = time.perf_counter()
    kind = require_type(quantize)
    run = Path(name).expanduser()
    is_run = (run / "config.yaml").is_file() and (run / "environment.json").is_file()
    if is_run and not (run / "model").is_dir():
        again = f"smoldpo resume {shlex.quote(name)}"
        raise ModelError(f"{name}: the run has no model yet; finish it: {again}")
    source = find_model(name)
    called = _called(name, source)
    file = output or (run / "export" if is_run else Path()) / f"{called}-{kind}.gguf"
    if file.exists() and not overwrite:
        raise UsageError(f"--output {file}: exists; give another name, or --overwrite")
    if Path(name).suffix == ".gguf" and file.exists() and file.samefile(name):
        raise UsageError(f"--output {file}: is the model itself; give another name")
    with progress.spinner(f"loading {name}"):
        tokenizer = load_tokenizer(source)
        model: Any = load_model(source, torch.float32, as_stored=FAMILIES)
    try:
        require_exportable(model)
    except ModelError as error:
        raise ModelError(f"{name}: {error}") from None
    chosen = _pairs(run if is_run else None, data)
    file.parent.mkdir(parents=True, exist_ok=True)
    needed = file_bytes(model, kind)
    require_space(file.parent, needed, f"the GGUF file {file.name}")
    how = tokenization(min(LONGEST, positions(model) or LONGEST), {}, source.location)
    chosen, _ = PairTokenizer(tokenizer, how).select(chosen[:pairs])
    if not chosen:
        raise ModelError("no pair is left to prove the export on; give others with --data")
    kernels = choose_kernels(torch.float32, "cpu")
    specials = [str(token) for token in tokenizer.get_added_vocab()][:64]
    with _staged(file) as staging:
        try:
            write_gguf(staging, model, tokenizer, kind, _about(called, name, source))
            sync(staging)
        except ModelError as error:
            raise ModelError(f"{name}: {error}") from None
        except OSError as error:
            raise not_saved(file, "the GGUF file", needed, error) from None
        before = measure(model, tokenizer, chosen, how, kernels, specials, "the model")
        del model
        gc.collect()
        with progress.spinner("reading the file back"), quiet():
            read, its_tokenizer = read_gguf(staging)
        after = measure(read, its_tokenizer, chosen, how, kernels, specials, "the file")
        verified = compare(before, after, [PairFacts.of(pair) for pair in chosen], kind)
        del read
        witness = None
        if llama_cpp.is_installed():
            threads = torch.get_num_threads()
            witness = llama_cpp.ask(staging, tokenizer, before, kind, threads)
        digest, size = sha256_of(staging), staging.stat().st_size
    found = Exported(file, kind, size, digest, verified, witness, time.perf_counter() - began)
    if is_run:
        _record(run, found)
    return found


@contextlib.contextmanager
def _staged(file: Path) -> Iterator[Path]:
    """A file to write, which becomes `file` when the block ends well, else goes."""
    staging = file.with_name(f".{file.stem}-{os.getpid()}.gguf")
    try:
        yield staging
        staging.replace(file)
    finally:
        staging.unlink(missing_ok=True)


def _called(name: str, source: ModelSource) -> str:
    """The model's name in its file's name and metadata."""
    if name == BUILTIN:
        return CARD_BASE[BUILTIN].rsplit("/", 1)[-1]
    path = Path(name).expanduser().absolute()
    if path.suffix == ".gguf":
        return path.stem
    return path.parent.name if path.name == "model" and source.is_local else path.name


def _about(called: str, name: str, source: ModelSource) -> About:
    """What the model's card says; a card that cannot be read says nothing."""
    if name == BUILTIN:
        return About(called, "apache-2.0", CARD_BASE[BUILTIN])
    card: Any = None
    path = Path(source.location) / "README.md"
    if path.is_file():
        with contextlib.suppress(Exception):  # YAML of any kind, by anybody
            card = ModelCard.load(path).data
    base = getattr(card, "base_model", None)
    base = base[0] if isinstance(base, list) and len(base) == 1 else base
    license = getattr(card, "license", None)
    return About(
        called,
        license if isinstance(license, str) else None,
        base if isinstance(base, str) else None,
    )


def _pairs(run: Path | None, data: str | None) -> list[PreferencePair]:
    """What proves the file: given pairs, else those that the run held out, else the built-in."""
    if data is not None or run is None:
        return list(load_pairs(data or BUILTIN).pairs)
    try:
        return list(load_data(build_config(load_yaml(run / "config.yaml"))).eval)
    except (UsageError, DataError) as error:
        raise SmoldpoError(
            f"{run}: the pairs that it held out cannot be read any more ({error}); give others "
            "with --data"
        ) from None


def _record(run: Path, found: Exported) -> None:
    """Keep in the run's folder what was exported; of one file the last time counts."""
    row = found.as_json()
    kept: list[dict[str, Any]] = []
    with contextlib.suppress(OSError, ValueError):
        kept = json.loads((run / RECORD).read_text(encoding="utf-8"))
    write_json(run / RECORD, [*(old for old in kept if old.get("file") != row["file"]), row])
