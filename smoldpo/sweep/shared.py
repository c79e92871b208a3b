"""What the trials of a sweep share.

Pairs are read and tokenised once. Trunk states and reference log-probabilities are found in the
cache, because all trials compute in the same way: the first decides kernels, precision and
compiling. With a cache in memory the trials share the stores themselves (engine/build.py).
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from smoldpo.config.schema import TrainConfig
from smoldpo.data.load import TrainingData
from smoldpo.data.template_settings import NAMES
from smoldpo.evaluation.schema import Record
from smoldpo.sweep.spec import SPLIT_SETTINGS
from smoldpo.training.fingerprint import Computing, Fingerprint, tokenizer_sha256
from smoldpo.training.policy_and_reference import EngineRecord, PolicyAndReference
from smoldpo.training.run_inputs import RunInputs, load_inputs
from smoldpo.training.setup import TokenizedData, load_data, tokenize
from smoldpo.utils import progress
from smoldpo.utils.errors import UsageError
from smoldpo.utils.files import write_json

FILE = "computing.json"
CONTENTS = ("model", "reference", "configuration", "tokenizer", "chat_template")
"""Of a fingerprint: what must be the same in all trials that name the same models."""


class SharedRecord(Record):
    """computing.json: how the first trial computes, and the digests of each set of models."""

    computing: Computing | None
    models: dict[str, dict[str, str]]


class ChangedError(UsageError):
    """A model is no longer what it was in earlier trials: the sweep cannot go on."""


class SharedInputs:
    """The data, tokens and computing choices that all trials share.

    Args:
        folder: of the sweep; how its first trial computed is kept there, for a sweep that goes on.
    """

    def __init__(self, folder: Path):
        self._file = folder / FILE
        self._data: dict[str, TrainingData] = {}
        self._tokens: dict[str, TokenizedData] = {}
        self._described = False
        self._record = SharedRecord(computing=None, models={})
        if self._file.is_file():
            self._record = SharedRecord.read(self._file, "sweep anew with --overwrite")

    @property
    def threads(self) -> int | None:
        """How many the first trial had."""
        return self._record.computing.threads if self._record.computing else None

    def settle_auto(self, config: TrainConfig) -> TrainConfig:
        """The configuration with what the first trial's automatic settings came to."""
        computing = self._record.computing
        if computing is None:
            return config
        first = {"dtype": computing.dtype, "device": computing.device}
        if computing.engine == "fast":  # the plain engine does not tell whether to compile
            first["compile"] = "on" if computing.compiled else "off"
        auto = {name: value for name, value in first.items() if getattr(config, name) == "auto"}
        return config.model_copy(update=auto)

    def load(self, config: TrainConfig) -> RunInputs:
        """Everything that a run works with.

        Raises:
            ChangedError: a model is not what it was in an earlier trial.
        """
        computing = self._record.computing
        kernels = computing.kernels if computing else None
        with progress.silenced() if self._described else contextlib.nullcontext():
            loaded = load_inputs(config, kernels, self._read, self._encode)
        self._described = True
        self._update_record(config, loaded.fingerprint)
        return loaded

    def _update_record(self, config: TrainConfig, fingerprint: Fingerprint) -> None:
        """Compare the models with those of earlier trials, and settle how all trials compute.

        The first trial settles it; of the fast engine, the first trial that has it.
        """
        now, computing = fingerprint.computing, self._record.computing
        dtype = "in float64" if now.dtype == "float64" else ""
        models = " ".join(filter(None, (config.model, config.reference, dtype)))
        contents = {part: fingerprint.contents[part] for part in CONTENTS}
        then = self._record.models.setdefault(models, contents)
        changed = [part for part in CONTENTS if then[part] != contents[part]]
        if changed:
            raise ChangedError(
                f"{models}: has changed since the sweep's first trials ({', '.join(changed)}), so "
                "its trials could not be compared; put it back, or sweep anew with --overwrite"
            )
        if computing is None:
            self._record.computing = now
        elif computing.engine == "plain":
            engine = {name: getattr(now, name) for name in EngineRecord.model_fields}
            self._record.computing = computing.model_copy(update=engine)
        write_json(self._file, self._record.model_dump(mode="json"))

    def _read(self, config: TrainConfig) -> TrainingData:
        """As load_data."""
        key = _data_key(config)
        if key not in self._data:
            self._data[key] = load_data(config)
        return self._data[key]

    def _encode(
        self, config: TrainConfig, models: PolicyAndReference, data: TrainingData
    ) -> TokenizedData:
        """As tokenize: once for the same pairs, tokenizer, and room in the model."""
        tokenizer = models.tokenizer
        parts = [_data_key(config), tokenizer_sha256(tokenizer), str(tokenizer.chat_template)]
        room = [models.facts.positions, models.facts.rows]
        key = json.dumps([*parts, config.max_length, _template(config), *room])
        if key not in self._tokens:
            self._tokens[key] = tokenize(config, models, data)
        return self._tokens[key]


def _template(config: TrainConfig) -> dict[str, Any]:
    """What the tokens follow from beside the pairs, the tokenizer and max_length."""
    return config.model_dump(include={*NAMES, "allow_template_mismatch"})


def _data_key(config: TrainConfig) -> str:
    """What the pairs of a trial follow from; of one source the seed is no part."""
    parts = config.model_dump(include={*SPLIT_SETTINGS, "max_train_samples"})
    return json.dumps(parts, sort_keys=True)
