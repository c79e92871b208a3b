"""What a run began with, so that a resume goes on with the same or refuses, naming what differs.

It stands in RUN/resume.json, a ResumeRecord.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from smoldpo._version import __version__
from smoldpo.config.schema import TrainConfig
from smoldpo.data.load import TrainingData
from smoldpo.engine.autotune import dtype_name
from smoldpo.engine.cache.keys import code_sha256
from smoldpo.training.policy_and_reference import EngineRecord, PolicyAndReference
from smoldpo.training.setup import TokenizedData
from smoldpo.types import NO_NUMBERS, PreferencePair, TokenizedPair
from smoldpo.utils.errors import SmoldpoError, UsageError
from smoldpo.utils.files import processor_name, write_json

FILE = "resume.json"
FORMAT = 1
FREE_SETTINGS = {
    "output_dir", "overwrite", "save_steps", "save_minutes", "keep_checkpoints", "logging_steps",
    "cache", "cache_limit", "sample_prompt", "generate_prompts", "temperature", "max_new_tokens",
    "judges", "fail_under", "report_to", "merge", "threads", "nice",
    "ordered_sum", "fsdp",
}  # fmt: skip
"""Settings without a say in weights or data; an interrupted run may go on with others."""
FROM_NAMES = {
    "model", "reference", "data", "eval_data", "freeze_layers", "dtype", "engine", "compile",
    "kernels", "device", "chat_template", "tools", "documents", "template_date", "truncation",
    "score", "chat_template_kwargs", "allow_template_mismatch",
}  # fmt: skip
"""Settings whose effect is fixed below by content; their spelling may change."""
CONTENTS = {
    "model": "the model's weights",
    "reference": "the reference's weights",
    "configuration": "the model's or the reference's config.json",
    "tokenizer": "the tokenizer",
    "chat_template": "the chat template",
    "data": "the preference pairs",
    "tokens": "the tokens of the pairs",
}


class Computing(EngineRecord):
    """How a run computes; `threads` matters to the plain engine alone."""

    dtype: str
    device: str
    frozen_layers: int
    threads: int


class Fingerprint(BaseModel):
    """All that weights and losses of a run depend on: contents by SHA-256, the rest by value.

    Attributes:
        contents: SHA-256 (hex) by the names in CONTENTS.
        settings: those that have a say in weights or data.
        machine: what may round otherwise elsewhere: versions, the processor, smoldpo's own code.
    """

    contents: dict[str, str]
    settings: dict[str, Any]
    computing: Computing
    machine: dict[str, str]


class Finished(BaseModel):
    total_steps: int


class ResumeRecord(BaseModel):
    """resume.json: what a run began with, and how far it came.

    Attributes:
        began: the run's fingerprint at its beginning.
        folder: the working folder, in which relative names mean what they meant.
        finished: None until the run is.
        extended_at: the step at which epochs were added, where they were.
    """

    format: int = FORMAT
    began: Fingerprint
    folder: str
    finished: Finished | None = None
    extended_at: int | None = None


def fingerprint(
    config: TrainConfig,
    models: PolicyAndReference,
    data: TrainingData,
    tokenized: TokenizedData,
) -> Fingerprint:
    """The fingerprint of what is there now."""
    facts, tokenizer, settings = models.facts, models.tokenizer, config.model_dump()
    pairs = _sha256(
        f"{part} {pair.id} {pair.content_hash()}{_numbers(pair)}"
        for part, pairs in (("train", data.train), ("eval", data.eval))
        for pair in pairs
    )
    return Fingerprint(
        contents={
            "model": facts.hashes["policy_start"],
            "reference": facts.hashes["reference"],
            "configuration": facts.configuration_sha256,
            "tokenizer": tokenizer_sha256(tokenizer),
            "chat_template": _sha256([str(tokenizer.chat_template)]),
            "data": pairs,
            "tokens": tokens_sha256(tokenized.train + tokenized.eval),
        },
        settings={k: v for k, v in settings.items() if k not in FREE_SETTINGS | FROM_NAMES},
        computing=Computing(
            **models.computing.model_dump(),
            dtype=dtype_name(facts.dtype),
            device=facts.device,
            frozen_layers=models.trainable.frozen_layers,
            threads=torch.get_num_threads(),
        ),
        machine={
            "processor": processor_name(),
            "smoldpo": __version__,
            "smoldpo's forward pass": code_sha256()[:12],
            **{name: version(name) for name in ("torch", "transformers", "tokenizers")},
        },
    )


def tokens_sha256(pairs: Sequence[TokenizedPair]) -> str:
    """SHA-256 (hex) of what the model sees of the pairs, and of what is scored where not all is."""
    return _sha256(
        repr((pair.id, pair.prompt_ids, pair.chosen_ids, pair.rejected_ids, *pair.masks))
        for pair in pairs
    )


def _numbers(pair: PreferencePair) -> str:
    """A pair's own weight, margin and beta, where it has any."""
    return "" if pair.numbers == NO_NUMBERS else f" {pair.numbers}"


def differences(began: Fingerprint, now: Fingerprint) -> list[str]:
    """What keeps a run from going on as it began, in words."""
    found = []
    for key, words in CONTENTS.items():
        if began.contents.get(key) != now.contents[key]:
            found.append(f"{words} ({key}) changed since the run began")
    for key in began.settings | now.settings:
        then = began.settings.get(key, default_of(key))
        today = now.settings.get(key)
        if then != today:
            more = "; epochs are added with --extend" if key == "num_train_epochs" else ""
            found.append(f"setting {key} is {today!r}, and was {then!r} when the run began{more}")
    then, today = began.computing.model_dump(), now.computing.model_dump()
    for key in today:
        if key != "threads" and then[key] != today[key]:
            found.append(f"{key} is {today[key]!r}, and was {then[key]!r} when the run began")
    return found


def default_of(setting: str) -> Any:
    """What a run had whose smoldpo did not know the setting yet."""
    field = TrainConfig.model_fields.get(setting)
    return None if field is None else field.get_default(call_default_factory=True)


def other_machine(began: Fingerprint, now: Fingerprint) -> list[str]:
    """What may round otherwise here than where the run began."""
    then: dict[str, Any] = dict(began.machine)
    today: dict[str, Any] = dict(now.machine)
    if began.computing.engine == "plain":
        then["threads"], today["threads"] = began.computing.threads, now.computing.threads
    return [f"{k}: {today[k]}, was {then.get(k)}" for k in today if then.get(k) != today[k]]


def write_resume_record(folder: Path, record: ResumeRecord) -> None:
    """Write resume.json; from then on the run can be resumed."""
    write_json(folder / FILE, record.model_dump(mode="json"))


def write_beginning(folder: Path, began: Fingerprint) -> None:
    """Say in the run folder what the run began with."""
    write_resume_record(folder, ResumeRecord(began=began, folder=str(Path.cwd())))


def mark_finished(folder: Path, total_steps: int) -> None:
    """Say in the run folder that the run of so many steps is finished."""
    finished = Finished(total_steps=total_steps)
    write_resume_record(
        folder, read_resume_record(folder).model_copy(update={"finished": finished})
    )


def read_resume_record(folder: Path) -> ResumeRecord:
    """What stands in resume.json.

    Raises:
        UsageError: no such folder, or none that holds a run which began.
        SmoldpoError: the file is damaged, or in a format that this version does not know.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such run folder")
    path = folder / FILE
    if not path.is_file():
        raise UsageError(
            f"{folder}: holds no run that can be resumed ({FILE} is missing: the run stopped "
            "before it began, or an older smoldpo made it); start it with smoldpo train"
        )
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        found, maker = plain["format"], plain["began"]["machine"].get("smoldpo")
        if found == FORMAT:
            return ResumeRecord.model_validate(plain)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        first = str(error).replace("\n", " ")
        raise SmoldpoError(f"{path}: cannot be read ({first}), so nothing can be resumed") from None
    raise SmoldpoError(
        f"{path}: the run was begun by smoldpo {maker}, which writes format {found!r}, and this is "
        f"smoldpo {__version__}, which reads {FORMAT}; resume the run with smoldpo {maker}"
    )


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
