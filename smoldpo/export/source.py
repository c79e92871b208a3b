"""What is exported: a model by its name, what its card says of it, and the pairs that prove it."""

from __future__ import annotations

import contextlib
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smoldpo.config.load import build_config, load_yaml
from smoldpo.data.load import load_pairs
from smoldpo.models.builtin import BUILTIN, CARD_BASE
from smoldpo.models.families import FAMILIES
from smoldpo.models.load import ModelSource, find_model, load_model, load_tokenizer
from smoldpo.training.setup import load_data
from smoldpo.types import PreferencePair
from smoldpo.utils import progress
from smoldpo.utils.errors import DataError, ModelError, SmoldpoError, UsageError

LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md")


@dataclass(frozen=True)
class About:
    """What a file says of itself besides the model: its name, licence, and the model it is from."""

    name: str
    license: str | None = None
    base_model: str | None = None


@dataclass(frozen=True)
class Origin:
    """A model that is exported, as it was named.

    Attributes:
        run: its run folder, where it is a run's.
    """

    name: str
    source: ModelSource
    run: Path | None
    about: About

    @property
    def folder(self) -> Path:
        """Where its exports lie unless another place is given."""
        return self.run / "export" if self.run else Path()

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Model (float32, or as its files where these are narrower) and tokenizer.

        Raises:
            ModelError: as load_model and load_tokenizer.
        """
        with progress.spinner(f"loading {self.name}"):
            tokenizer = load_tokenizer(self.source)
            return load_model(self.source, torch.float32, as_stored=FAMILIES), tokenizer

    def pairs(self, data: str | None) -> list[PreferencePair]:
        """What proves the export: `data`, else what the run held out, else the built-in pairs.

        Raises:
            SmoldpoError: the run's pairs are no longer there, or `data` cannot be read.
        """
        if data is not None or self.run is None:
            return list(load_pairs(data or BUILTIN).pairs)
        try:
            return list(load_data(build_config(load_yaml(self.run / "config.yaml"))).eval)
        except (UsageError, DataError) as error:
            raise SmoldpoError(
                f"{self.run}: the pairs that it held out cannot be read any more ({error}); give "
                "others with --data"
            ) from None


def find_origin(name: str) -> Origin:
    """A run, a model or adapter folder, builtin, a GGUF file or a hub id; nothing is loaded yet.

    Raises:
        ModelError: a run that has no model yet, or as find_model.
    """
    folder = Path(name).expanduser()
    is_run = (folder / "config.yaml").is_file() and (folder / "environment.json").is_file()
    if is_run and not (folder / "model").is_dir():
        again = f"smoldpo resume {shlex.quote(name)}"
        raise ModelError(f"{name}: the run has no model yet; finish it: {again}")
    source = find_model(name)
    return Origin(name, source, folder if is_run else None, _about(name, source))


def licence_text(origin: Origin) -> str | None:
    """The text of the licence that lies beside the model, else its name, if any is known."""
    for name in LICENCES:
        path = Path(origin.source.location) / name
        if path.is_file():
            return path.read_text(encoding="utf-8", errors="replace")
    return origin.about.license


def _called(name: str, source: ModelSource) -> str:
    """The model's name in its file's name and metadata."""
    path = Path(name).expanduser().absolute()
    if path.suffix == ".gguf":
        return path.stem
    return path.parent.name if path.name == "model" and source.is_local else path.name


def _about(name: str, source: ModelSource) -> About:
    """What the model's card says; a card that cannot be read says nothing."""
    if name == BUILTIN:
        return About(CARD_BASE[BUILTIN].rsplit("/", 1)[-1], "apache-2.0", CARD_BASE[BUILTIN])
    card: Any = None
    path = Path(source.location) / "README.md"
    if path.is_file():
        with contextlib.suppress(Exception):  # YAML of any kind, by anybody
            card = ModelCard.load(path).data
    base = getattr(card, "base_model", None)
    base = base[0] if isinstance(base, list) and len(base) == 1 else base
    license = getattr(card, "license", None)
    return About(
        _called(name, source),
        license if isinstance(license, str) else None,
        base if isinstance(base, str) else None,
    )
