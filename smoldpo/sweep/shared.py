"""What the trials of a sweep share. Pairs are read and tokenised once; what is computed once a pair
is found

in the cache, because every trial computes in the same way: kernels, precision and compiling are
decided by the first one. With a cache in memory, the stores themselves are handed on
(engine/build.py).
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from smoldpo.config.schema import TrainConfig
from smoldpo.data.load import TrainingData
from smoldpo.sweep.spec import SPLIT_SETTINGS
from smoldpo.training.fingerprint import Fingerprint, tokenizer_sha256
from smoldpo.training.policy_and_reference import PolicyAndReference
from smoldpo.training.run import RunInputs, load_inputs
from smoldpo.training.setup import TokenizedData, load_data, tokenize
from smoldpo.utils import progress
from smoldpo.utils.errors import UsageError
from smoldpo.utils.files import write_json

FILE = "computing.json"
CONTENTS = ("model", "reference", "configuration", "tokenizer", "chat_template")
"""Of a fingerprint: what must be the same in all trials that name the same models."""


OF_THE_ENGINE = ("engine", "kernels", "compiled")
"""Of how a trial computes: what the plain engine does not tell of."""


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
        self._said = False
        self._known: dict[str, Any] = {"computing": None, "models": {}}
        if self._file.is_file():
            self._known = json.loads(self._file.read_text(encoding="utf-8"))

    @property
    def threads(self) -> int | None:
        """How many the first trial had."""
        computing = self._known["computing"]
        return computing["threads"] if computing else None

    def decided(self, config: TrainConfig) -> TrainConfig:
        """The configuration with what the first trial's automatic settings came to."""
        computing = self._known["computing"]
        if computing is None:
            return config
        compiled = "on" if computing["compiled"] else "off"
        first = {"dtype": computing["dtype"], "device": computing["device"], "compile": compiled}
        auto = {name: value for name, value in first.items() if getattr(config, name) == "auto"}
        if computing["engine"] == "plain":
            auto.pop(
                "compile", None
            )  # which says nothing of the fast engine, that another model may get
        return config.model_copy(update=auto)

    def load(self, config: TrainConfig) -> RunInputs:
        """Everything that a run works with.

        Raises:
            ChangedError: a model is not what it was in an earlier trial.
        """
        known = self._known["computing"]
        kernels = known["kernels"] if known else None
        with progress.silenced() if self._said else contextlib.nullcontext():
            loaded = load_inputs(config, kernels, self._read, self._encode)
        self._said = True
        self._remember(config, loaded.fingerprint)
        return loaded

    def _remember(self, config: TrainConfig, fingerprint: Fingerprint) -> None:
        wide = "in float64" if fingerprint.computing.dtype == "float64" else ""
        models = " ".join(filter(None, (config.model, config.reference, wide)))
        contents = {part: fingerprint.contents[part] for part in CONTENTS}
        then = self._known["models"].setdefault(models, contents)
        changed = [part for part in CONTENTS if then[part] != contents[part]]
        if changed:
            raise ChangedError(
                f"{models}: has changed since the sweep's first trials ({', '.join(changed)}), so "
                "its trials could not be compared; put it back, or sweep anew with --overwrite"
            )
        self._decide(fingerprint.computing.model_dump())
        write_json(self._file, self._known)

    def _decide(self, computing: dict[str, Any]) -> None:
        """What the first trial came to holds for all; of the fast engine, the first that had it."""
        known = self._known["computing"]
        if known is None:
            self._known["computing"] = computing
        elif known["engine"] == "plain":
            self._known["computing"] = known | {part: computing[part] for part in OF_THE_ENGINE}

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
        key = json.dumps(
            [
                _data_key(config),
                tokenizer_sha256(tokenizer),
                str(tokenizer.chat_template),
                config.max_length,
                models.facts.positions,
            ]
        )
        if key not in self._tokens:
            self._tokens[key] = tokenize(config, models, data)
        return self._tokens[key]


def _data_key(config: TrainConfig) -> str:
    """What the pairs of a trial follow from; of one source the seed is no part."""
    parts = config.model_dump(include={*SPLIT_SETTINGS, "max_train_samples"})
    return json.dumps(parts, sort_keys=True)
