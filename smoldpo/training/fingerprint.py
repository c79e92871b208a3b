"""What a run began with, so that a resume goes on with the same or refuses, naming what differs.

RUN/resume.json    {"format", "began": the fingerprint, "folder": the working folder, "finished"}
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from smoldpo._version import __version__
from smoldpo.config.schema import TrainConfig
from smoldpo.data.load import TrainingData
from smoldpo.engine.cache.keys import code_sha256
from smoldpo.training.policy_and_reference import PolicyAndReference
from smoldpo.training.setup import TokenizedData
from smoldpo.types import PLAIN, PreferencePair
from smoldpo.utils.errors import SmoldpoError, UsageError
from smoldpo.utils.files import processor_name, write_json

FILE = "resume.json"
FORMAT = 1
FREE_SETTINGS = {
    "output_dir", "overwrite", "save_steps", "save_minutes", "keep_checkpoints", "logging_steps",
    "cache", "cache_limit", "sample_prompt", "generate_prompts", "temperature", "max_new_tokens",
    "judges", "fail_under", "report_to", "merge",
}  # fmt: skip
"""Settings without a say in weights or data; an interrupted run may go on with others."""
FROM_NAMES = {"model", "reference", "data", "eval_data", "freeze_layers", "dtype", "engine"} | {
    "compile",
    "device",
}
"""Settings whose effect is fixed below, by content or by what was decided; their words may change."""
PARTS = {
    "model": "the model's weights",
    "reference": "the reference's weights",
    "configuration": "the model's or the reference's config.json",
    "tokenizer": "the tokenizer",
    "chat_template": "the chat template",
    "data": "the preference pairs",
    "tokens": "the tokens of the pairs",
}
COMPUTING = ("dtype", "device", "engine", "kernels", "compiled", "frozen_layers")


def fingerprint(
    config: TrainConfig, models: PolicyAndReference, data: TrainingData, tokenized: TokenizedData
) -> dict[str, Any]:
    """Everything that weights and losses of a run depend on: contents by SHA-256, the rest by value."""
    settings = config.model_dump()
    return {
        "contents": {
            "model": models.facts.hashes["policy_start"],
            "reference": models.facts.hashes["reference"],
            "configuration": models.facts.configuration_sha256,
            "tokenizer": tokenizer_sha256(models.tokenizer),
            "chat_template": _sha256([str(models.tokenizer.chat_template)]),
            "data": _sha256(
                f"{part} {pair.id} {pair.content_hash()}{_numbers(pair)}"
                for part, pairs in (("train", data.train), ("eval", data.eval))
                for pair in pairs
            ),
            "tokens": _sha256(
                repr((pair.id, pair.prompt_ids, pair.chosen_ids, pair.rejected_ids))
                for pair in tokenized.train + tokenized.eval
            ),
        },
        "settings": {k: v for k, v in settings.items() if k not in FREE_SETTINGS | FROM_NAMES},
        "computing": {
            "dtype": str(models.facts.dtype).removeprefix("torch."),
            "device": models.facts.device,
            "frozen_layers": models.trainable.frozen_layers,
            "threads": torch.get_num_threads(),
            **models.computing.model_dump(),
        },
        "machine": {
            "processor": processor_name(),
            "smoldpo": __version__,
            "smoldpo's forward pass": code_sha256()[:12],
            **{name: version(name) for name in ("torch", "transformers", "tokenizers")},
        },
    }


def _numbers(pair: PreferencePair) -> str:
    """A pair's own weight, margin and beta, where it has any."""
    return "" if pair.numbers == PLAIN else f" {pair.numbers}"


def differences(began: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What keeps a run from going on as it began, in words."""
    found = []
    for key, words in PARTS.items():
        if began["contents"].get(key) != now["contents"][key]:
            found.append(f"{words} ({key}) changed since the run began")
    for key in began["settings"] | now["settings"]:
        then = began["settings"].get(key, _default(key))
        today = now["settings"].get(key)
        if then != today:
            more = "; epochs are added with --extend" if key == "num_train_epochs" else ""
            found.append(f"setting {key} is {today!r}, and was {then!r} when the run began{more}")
    for key in COMPUTING:
        then, today = began["computing"].get(key), now["computing"][key]
        if then != today:
            found.append(f"{key} is {today!r}, and was {then!r} when the run began")
    return found


def _default(setting: str) -> Any:
    """What a run had whose smoldpo did not know the setting yet."""
    field = TrainConfig.model_fields.get(setting)
    return None if field is None else field.get_default(call_default_factory=True)


def other_machine(began: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What may round otherwise here than where the run began."""
    then, today = began["machine"], now["machine"]
    found = [f"{k}: {today[k]}, was {then.get(k)}" for k in today if then.get(k) != today[k]]
    threads = began["computing"]["threads"], now["computing"]["threads"]
    if threads[0] != threads[1]:
        found.append(f"threads: {threads[1]}, was {threads[0]}")
    return found


def write_beginning(folder: Path, began: dict[str, Any]) -> None:
    """Say in the run folder what the run began with; from now on it can be resumed."""
    write_json(
        folder / FILE,
        {"format": FORMAT, "began": began, "folder": str(Path.cwd()), "finished": None},
    )


def mark_finished(folder: Path, total_steps: int) -> None:
    """Say in the run folder that the run of so many steps is finished."""
    kept = read_beginning(folder)
    write_json(folder / FILE, kept | {"finished": {"total_steps": total_steps}})


def read_beginning(folder: Path) -> dict[str, Any]:
    """What stands in resume.json.

    Raises:
        UsageError: no such folder, or none that holds a run which began.
        SmoldpoError: the file is damaged.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such run folder")
    path = folder / FILE
    if not path.is_file():
        raise UsageError(
            f"{folder}: holds no run that can be resumed ({FILE} is missing: the run stopped before it "
            "began, or an older smoldpo made it); start it with smoldpo train"
        )
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["format"] != FORMAT:
            raise ValueError(f"its form is {kept['format']!r}, this smoldpo reads {FORMAT}")
        for part in ("contents", "settings", "computing", "machine"):
            kept["began"][part].keys()
        os.fspath(kept["folder"])
        return kept
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SmoldpoError(f"{path}: cannot be read ({error}), so nothing can be resumed") from None


def tokenizer_sha256(tokenizer: Any) -> str:
    """SHA-256 (hex) of all that a tokenizer does, but for its chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    whole = (
        backend.to_str()
        if backend is not None
        else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    )
    return _sha256([whole, json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)])


def _sha256(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()
