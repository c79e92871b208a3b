"""The settings of the chat template and of truncation, read from configurations and files."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from smoldpo.config.load import load_yaml
from smoldpo.data.chat_template import TemplateSettings
from smoldpo.data.tokenize import Tokenization
from smoldpo.utils.errors import UsageError

NAMES = (
    *("chat_template_kwargs", "tools", "documents", "template_date"),
    *("truncation", "score"),
)
"""Settings that say how a dialogue becomes tokens, beside max_length and the template itself."""


def today() -> str:
    """The day as YYYY-MM-DD."""
    return datetime.date.today().isoformat()


def tokenization(
    max_length: int, options: Mapping[str, Any], model_folder: str = ""
) -> Tokenization:
    """How pairs become tokens; `options` holds settings by name, of which NAMES are read.

    Those that are None are those of the run that `model_folder` belongs to, or have their defaults.

    Raises:
        UsageError: a file of tools or documents that cannot be read.
    """
    of_run = _settings_of_run(model_folder) if model_folder else {}
    given = of_run | {name: options[name] for name in NAMES if options.get(name) is not None}
    day = given.get("template_date")
    template = TemplateSettings(
        date=datetime.date.fromisoformat(day) if day else None,
        kwargs=given.get("chat_template_kwargs", {}),
        tools=_objects("tools", given.get("tools")),
        documents=_objects("documents", given.get("documents")),
    )
    rest = {name: given[name] for name in ("truncation", "score") if name in given}
    return Tokenization(max_length, template, **rest)


def replace_template(tokenizer: PreTrainedTokenizerBase, file: str | None) -> None:
    """Give the tokenizer the chat template of a file, where there is one.

    Raises:
        UsageError: the file cannot be read, or is empty.
    """
    if file is None:
        return
    text = _read("chat-template", file)
    if not text.strip():
        raise UsageError(f"--chat-template {file}: is empty")
    tokenizer.chat_template = text


def _settings_of_run(model_folder: str) -> dict[str, Any]:
    """The settings in NAMES of the run whose folder holds this model; {} where there is none."""
    for folder in (Path(model_folder), Path(model_folder).parent):
        if (folder / "config.yaml").is_file() and (folder / "environment.json").is_file():
            settings = load_yaml(folder / "config.yaml")
            return {name: settings[name] for name in NAMES if settings.get(name) is not None}
    return {}


def _objects(option: str, file: str | None) -> tuple[dict[str, Any], ...]:
    """A JSON file that holds a list of objects."""
    if file is None:
        return ()
    try:
        value = json.loads(_read(option, file))
    except ValueError as error:
        raise UsageError(f"--{option} {file}: is no JSON: {error}") from None
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise UsageError(f"--{option} {file}: must hold a list of JSON objects")
    return tuple(value)


def _read(option: str, file: str) -> str:
    try:
        return Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        what = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UsageError(f"--{option} {file}: cannot be read: {what}") from None
