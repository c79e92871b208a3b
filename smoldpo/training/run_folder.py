"""The run folder: where a run writes, and what stands in it.

config.yaml  environment.json  data.json  metrics.jsonl  evaluation.json  samples.jsonl
timings.json  checkpoints/step-N/  resume.json  not_finite.json  model/  adapter/
README.md  report.html
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smoldpo._version import __version__
from smoldpo.config.load import to_yaml
from smoldpo.config.schema import TrainConfig
from smoldpo.data.account import DataAccount
from smoldpo.engine.autotune import dtype_name
from smoldpo.types import TokenizedPair
from smoldpo.utils.distributed import world
from smoldpo.utils.errors import UsageError
from smoldpo.utils.files import processor_name, write_json, write_text
from smoldpo.utils.text import redact

if TYPE_CHECKING:
    from smoldpo.training.policy_and_reference import PolicyAndReference

CONTENTS = (
    "config.yaml",
    "environment.json",
    "data.json",
    "metrics.jsonl",
    "evaluation.json",
    "separation.json",
    "samples.jsonl",
    "timings.json",
    "report.html",
    "README.md",
    "exports.json",
    "export",
    "checkpoints",
    "resume.json",
    "not_finite.json",
    "report_to.json",
    "tensorboard",
    "wandb",
    "model",
    "adapter",
)
LIBRARIES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "datasets",
    "numpy",
    "scipy",
    "peft",
)
IN_MEMORY_PAIRS = "given"
"""The folder of pairs that were handed over in memory (api/pairs.py); a run reads them there."""


def choose_folder(config: TrainConfig) -> Path:
    """Where this run is to write; nothing is made or removed yet.

    Raises:
        UsageError: the folder holds a run (and `overwrite` is not set), or something else, or
            cannot be written.
    """
    if config.output_dir is None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        model = "SmolLM2-135M" if config.model == "builtin" else _short(config.model)
        base = Path("runs") / f"{model}-{_short(config.data[0])}-{stamp}"
        folder = base
        number = 2
        while folder.exists():
            folder = base.with_name(f"{base.name}-{number}")
            number += 1
        return folder
    folder = Path(config.output_dir).expanduser()
    if folder.is_file():
        raise UsageError(f"output_dir {folder}: is a file; give a folder")
    _require_writable(folder)
    found = [name for name in CONTENTS if (folder / name).exists()]
    if _holds_run(folder) and not config.overwrite:
        raise UsageError(
            f"output_dir {folder}: already holds a run; choose another folder, or replace that run "
            "with --overwrite"
        )
    if found and not _holds_run(folder):
        raise UsageError(
            f"output_dir {folder}: holds {found[0]}, which is not a run's; give a new or an empty "
            "folder"
        )
    for setting in ("model", "reference", "eval_data"):
        _require_outside(folder, setting, getattr(config, setting))
    for source in config.data:
        _require_outside(folder, "data", source)
    return folder


def _require_writable(folder: Path) -> None:
    """Refuse a folder that could not be made, or written into, once a run has been computed.

    Raises:
        UsageError: with what the system says.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"output_dir {folder}: cannot be written: {there}: {reason}") from None


def _require_outside(folder: Path, setting: str, name: str | None) -> None:
    """What a run reads must not lie in the folder that it replaces."""
    if name is None or not Path(name).expanduser().exists():
        return
    path = Path(name).expanduser().resolve()
    if path.is_relative_to(folder.resolve()) and not path.is_relative_to(
        (folder / IN_MEMORY_PAIRS).resolve()
    ):
        raise UsageError(
            f"{setting} {name}: lies in output_dir {folder}, which this run would replace; "
            "choose another output_dir"
        )


def make_folder(folder: Path, sources: Sequence[str] = ()) -> None:
    """Make the run folder; of a run that is to be replaced, remove just what smoldpo wrote.

    Args:
        sources: what the new run reads; pairs handed over to it lie in the folder already, perhaps
            beside those of the run that it replaces.
    """
    pairs_folder = folder / IN_MEMORY_PAIRS
    read = [Path(source).resolve() for source in sources if source]
    reused = [
        path
        for path in (pairs_folder.iterdir() if pairs_folder.is_dir() else ())
        if any(_reads(source, path.resolve(), pairs_folder.resolve()) for source in read)
    ]
    if not reused:
        make_empty(folder, (*CONTENTS, IN_MEMORY_PAIRS))
        return
    others = [path.name for path in pairs_folder.iterdir() if path not in reused]
    make_empty(folder, (*CONTENTS, *(f"{IN_MEMORY_PAIRS}/{name}" for name in others)))


def _reads(source: Path, path: Path, pairs_folder: Path) -> bool:
    """Whether a source is this file or folder of `given`, lies in it, or is all of `given`."""
    return source == pairs_folder or source.is_relative_to(path)


def make_empty(folder: Path, contents: Iterable[str]) -> None:
    """Make a folder, or remove what `contents` names from one that is there; all else stays."""
    for name in contents:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)


def remove_partial_files(folder: Path) -> None:
    """Remove partly written models and files that a kill left (utils/files.py stages both)."""
    for name in ("model", "adapter"):
        for path in folder.glob(f".{name}-*"):
            shutil.rmtree(path, ignore_errors=True)
    for name in CONTENTS:
        for path in folder.glob(f".{name}.*"):
            path.unlink(missing_ok=True)


def _holds_run(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("config.yaml", "environment.json"))


def _short(name: str) -> str:
    """A model's or data set's name as part of a folder's name."""
    path = Path(name)
    stem = (
        path.stem if path.suffix in (".jsonl", ".json", ".csv", ".parquet", ".gguf") else path.name
    )
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.") or "run"


def command_line() -> list[str]:
    """The command that this process was started with, where the run is the program's own."""
    return ["smoldpo", *map(redact, sys.argv[1:])]


def write_start(
    folder: Path,
    config: TrainConfig,
    models: PolicyAndReference,
    account: DataAccount,
    command: list[str] | None,
    picked: dict[str, Any] | None = None,
) -> None:
    """Write what a run folder holds from its beginning: config.yaml, environment.json, data.json.

    Args:
        command: that began the run; None where a Python program did.
        picked: how freeze_layers auto became a number, where it did.
    """
    import torch

    dtype = dtype_name(models.facts.dtype)
    frozen = None if config.train_layers else models.trainable.frozen_layers
    decided = {"overwrite": False, "freeze_layers": frozen, "dtype": dtype}
    write_text(folder / "config.yaml", to_yaml(config.model_copy(update=decided)))
    environment: dict[str, Any] = {
        "smoldpo": __version__,
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in LIBRARIES},
        "platform": platform.platform(),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ranks": world().size,
        "device": models.facts.device,
        "dtype": dtype,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "sha256": models.facts.hashes,
    }
    environment |= {"command": command} if command else {}
    environment |= models.computing.model_dump()
    environment |= {"freeze_layers_auto": picked} if picked else {}
    write_json(folder / "environment.json", environment)
    write_json(folder / "data.json", account.as_json())


def write_not_finite(
    folder: Path, facts: dict[str, Any], pairs: Sequence[TokenizedPair], tokenizer: Any
) -> Path:
    """Write a step that is not finite: `facts`, and its pairs as texts and token ids."""
    path = folder / "not_finite.json"
    rows = [
        {
            "id": pair.id,
            "prompt": tokenizer.decode(pair.prompt_ids),
            "chosen": tokenizer.decode(pair.chosen_ids),
            "rejected": tokenizer.decode(pair.rejected_ids),
            "prompt_ids": pair.prompt_ids,
            "chosen_ids": pair.chosen_ids,
            "rejected_ids": pair.rejected_ids,
            "chosen_scored": pair.completions[0].scored,
            "rejected_scored": pair.completions[1].scored,
        }
        for pair in pairs
    ]
    write_json(path, facts | {"pairs": rows})
    return path
