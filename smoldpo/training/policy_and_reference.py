"""Policy and reference of a run, in an engine, with where they came from and how they are saved."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smoldpo.engine.base import Engine
from smoldpo.engine.kernels.lora import copy_adapters
from smoldpo.engine.precision import cast_frozen, master_dtype
from smoldpo.models.adapters import Adapter
from smoldpo.models.families import FAMILIES
from smoldpo.models.load import ModelSource, load_model
from smoldpo.models.save import base_of, save_adapter, save_model
from smoldpo.models.weights import twin, weights_sha256
from smoldpo.utils.errors import ModelError
from smoldpo.utils.memory import file_page_releaser, trim_memory


@dataclass
class PolicyAndReference:
    """The engine with policy and reference in it, the tokenizer, and where they came from."""

    engine: Engine
    source: ModelSource
    reference_source: ModelSource
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype
    device: str
    bytes: int
    """Of the policy, its adapters with it, in full precision."""
    loaded: torch.dtype
    """In which the policy was loaded: that of its files where that is narrower, else full precision."""
    mapped: bool
    """Whether its weights, where they were not converted since, are mapped from their files."""
    saved_bytes: int
    """Of what the run saves: the whole model, its adapters, or both."""
    hashes: dict[str, str]
    frozen_layers: int
    positions: int | None
    configuration_sha256: str
    """Of the models' configurations."""
    cache_folders: set[Path]
    """Folders of the cache that this run uses."""
    computing: dict[str, Any]
    """How it computes, for environment.json."""
    adapter: Adapter | None = None
    """Where adapters train: which."""
    rates: dict[str, float] = field(default_factory=dict)
    """Peak learning rates of parameters that have one of their own."""

    def reference(self) -> PreTrainedModel:
        """The reference, loaded anew; in full precision, or that of its files where it is narrower."""
        return load_model(
            self.reference_source, master_dtype(self.dtype), self.device, as_stored=FAMILIES
        )

    def trained(self) -> Any:
        """The policy as it is now, to be saved: what is frozen comes from where it was loaded, as it was.

        What trains is in full precision. With adapters it is peft's model.

        Raises:
            ModelError: what is there now is not what was loaded at the start.
        """
        start = self._start()
        if self.adapter is not None:
            return self.adapter.on(start, self.engine.trainable_parameters())
        return twin(start, self._what_trained(start))

    def tuned(self, reference: PreTrainedModel) -> PreTrainedModel:
        """The policy as it is now, to answer beside the reference, which was loaded and brought to its dtype.

        Where that is the policy's start, all but what trained is the reference's own; else what is equal.

        Raises:
            ModelError: as `trained`, where the start is loaded anew.
        """
        start = reference
        if not self.shares:
            start = cast_frozen(self._start().to(self.device), self.dtype, share_with=reference)
        model = twin(start, self._what_trained(start))
        if self.adapter is not None:
            copy_adapters(model, self.engine.policy)
        return model

    @property
    def shares(self) -> bool:
        """Whether reference and policy have all but what trains in common."""
        return self.reference_source == self.source

    def _what_trained(self, start: PreTrainedModel) -> dict[str, torch.Tensor]:
        """Where the start's weights are, by name; with adapters none of its own."""
        if self.adapter is not None:
            return {}
        trained = self.engine.trainable_parameters()
        return {name: weight.detach().to(start.device) for name, weight in trained}

    def save(self, folder: Path, card: str, merge: bool) -> None:
        """Save the policy as it is now as `folder`/model; adapters as such, unless they are to be merged.

        Merged, they stand beside it as `folder`/adapter; where they do not, one of an earlier end is removed.

        Raises:
            SmoldpoError: as save_model; a start that has changed.
        """
        full, trained = master_dtype(self.dtype), self.trained()
        if self.adapter is None:
            save_model(folder / "model", trained, self.tokenizer, card, full)
            return
        if self.source.base is None:
            dtype = str(full).removeprefix("torch.")
            base = base_of(self.source, self.hashes["policy_start"], dtype)
            target = folder / ("adapter" if merge else "model")
            save_adapter(target, trained, self.tokenizer, card, self.source, base)
        if merge:
            save_model(folder / "model", self.adapter.merged(trained), self.tokenizer, card, full)
        else:
            shutil.rmtree(folder / "adapter", ignore_errors=True)

    def _start(self) -> PreTrainedModel:
        """The policy as it was loaded, anew."""
        trim_memory()
        model = load_model(self.source, self.loaded)
        digest = weights_sha256(model, master_dtype(self.dtype), file_page_releaser())
        if digest != self.hashes["policy_start"]:
            raise ModelError(
                f"{self.source.name}: has changed on disk since this run began, so its frozen "
                "weights cannot be saved together with the trained ones; put it back and run again"
            )
        return model
