"""Policy and reference of a run, in an engine, with where they came from and how they are saved."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smoldpo.engine.autotune import dtype_name
from smoldpo.engine.base import Engine
from smoldpo.engine.kernels.lora import copy_adapters
from smoldpo.engine.precision import cast_frozen, master_dtype
from smoldpo.models.adapters import Adapter
from smoldpo.models.families import FAMILIES
from smoldpo.models.load import ModelSource, load_model
from smoldpo.models.mapped_weights import file_page_releaser
from smoldpo.models.save import base_of, save_adapter, save_model
from smoldpo.models.weights import copy_sharing, weights_sha256
from smoldpo.utils.errors import ModelError
from smoldpo.utils.memory import trim_memory
from smoldpo.utils.shares import is_shared_out, kept_by_first


@dataclass(frozen=True)
class ModelFacts:
    """Policy and reference as they were loaded.

    Attributes:
        dtype: in which they compute.
        stored_dtype: in which the policy was loaded: full precision, or that of its files where
            narrower.
        mapped: whether the policy's weights, where not converted since, are mapped from their
            files.
        positions: the longest input that both models take; None where they do not say.
        rows: token ids that both models have a row for.
        hashes: SHA-256 (hex) of the weights: `policy_start` and `reference`.
        configuration_sha256: of the models' configurations.
    """

    source: ModelSource
    reference_source: ModelSource
    device: str
    dtype: torch.dtype
    stored_dtype: torch.dtype
    mapped: bool
    positions: int | None
    rows: int
    hashes: dict[str, str]
    configuration_sha256: str


@dataclass(frozen=True)
class Trainable:
    """What of a policy trains.

    Attributes:
        frozen_layers: decoder layers frozen from below by freeze_layers.
        adapter: where adapters train, which.
        rates: peak learning rates of parameters that have one of their own.
        policy_bytes: of the policy, its adapters with it, in full precision.
        saved_bytes: of what the run saves: the whole model, its adapters, or both.
    """

    frozen_layers: int
    adapter: Adapter | None
    rates: dict[str, float]
    policy_bytes: int
    saved_bytes: int


class EngineRecord(BaseModel):
    """Which engine computes, and how; a part of environment.json and of resume.json."""

    engine: str
    kernels: dict[str, bool | str]
    """Fields of KernelChoice; none for the plain engine."""
    compiled: bool


@dataclass
class PolicyAndReference:
    """Policy and reference in an engine, the tokenizer, and what is known of them.

    Attributes:
        cache_folders: folders of the cache that the engine uses.
    """

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    facts: ModelFacts
    trainable: Trainable
    computing: EngineRecord
    cache_folders: set[Path]
    gathered: list[tuple[str, torch.Tensor]] | None = None
    """What trained, whole, on the first rank, where each rank has a share alone."""

    def gather_trained(self) -> None:
        """Have the first rank know all that trained; all ranks call this. Later steps are not in
        it.
        """
        named = list(self.engine.trainable_parameters())
        if any(is_shared_out(weight) for _, weight in named):
            self.gathered = [(name, kept_by_first(weight).cpu()) for name, weight in named]

    def _weights(self) -> Iterable[tuple[str, torch.Tensor]]:
        return self.engine.trainable_parameters() if self.gathered is None else self.gathered

    def reference(self) -> PreTrainedModel:
        """The reference, loaded anew; in full precision, or its files' where narrower."""
        return load_model(
            self.facts.reference_source,
            master_dtype(self.facts.dtype),
            self.facts.device,
            as_stored=FAMILIES,
        )

    def trained(self) -> Any:
        """The policy as it is now, to be saved; frozen weights come from where they were loaded.

        What trains is in full precision. With adapters it is peft's model.

        Raises:
            ModelError: what is there now is not what was loaded at the start.
        """
        start = self._start()
        if self.trainable.adapter is not None:
            return self.trainable.adapter.on(start, self._weights())
        return copy_sharing(start, self._what_trained(start))

    def tuned(self, reference: PreTrainedModel) -> PreTrainedModel:
        """The policy as it is now, to answer beside the reference, which was loaded in its dtype.

        Where that is the policy's start, all but what trained is the reference's own; else what is
        equal.

        Raises:
            ModelError: as `trained`, where the start is loaded anew.
        """
        start = reference
        if not self.shares:
            start = self._start()
            torch.nn.Module.to(start, self.facts.device)
            start = cast_frozen(start, self.facts.dtype, share_with=reference)
        model = copy_sharing(start, self._what_trained(start))
        if self.trainable.adapter is not None:
            policy = self.engine.policy
            if self.gathered is not None:
                adapter = self.trainable.adapter
                policy = adapter.on(copy_sharing(start), self.gathered).get_base_model()
            copy_adapters(model, policy)
        return model

    @property
    def shares(self) -> bool:
        """Whether reference and policy have all but what trains in common."""
        return self.facts.reference_source == self.facts.source

    def _what_trained(self, start: PreTrainedModel) -> dict[str, torch.Tensor]:
        """Where the start's weights are, by name; with adapters none of its own."""
        if self.trainable.adapter is not None:
            return {}
        return {name: weight.detach().to(start.device) for name, weight in self._weights()}

    def save(self, folder: Path, card: str, merge: bool) -> None:
        """Save the policy as it is now as `folder`/model; adapters as such, unless to be merged.

        Merged, they stand beside it as `folder`/adapter; where they do not, one of an earlier end
        is removed.

        Raises:
            SmoldpoError: as save_model; a start that has changed.
        """
        full, trained = master_dtype(self.facts.dtype), self.trained()
        if self.trainable.adapter is None:
            save_model(folder / "model", trained, self.tokenizer, card, full)
            return
        if self.facts.source.base is None:
            dtype = dtype_name(full)
            base = base_of(self.facts.source, self.facts.hashes["policy_start"], dtype)
            target = folder / ("adapter" if merge else "model")
            save_adapter(target, trained, self.tokenizer, card, self.facts.source, base)
        if merge:
            save_model(
                folder / "model", self.trainable.adapter.merged(trained), self.tokenizer, card, full
            )
        else:
            shutil.rmtree(folder / "adapter", ignore_errors=True)

    def _start(self) -> PreTrainedModel:
        """The policy as it was loaded, anew."""
        trim_memory()
        model = load_model(self.facts.source, self.facts.stored_dtype)
        digest = weights_sha256(model, master_dtype(self.facts.dtype), file_page_releaser())
        if digest != self.facts.hashes["policy_start"]:
            raise ModelError(
                f"{self.facts.source.name}: has changed on disk since this run began, so its "
                "frozen weights cannot be saved together with the trained ones; put it back and "
                "run again"
            )
        return model
