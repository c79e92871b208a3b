"""Adapters on disk, in peft's format: what a folder with one says, and the model that it makes.

adapter_config.json          peft's; base_model_name_or_path is where others find the base
adapter_model.safetensors    peft's; pickled weights (adapter_model.bin) are never read
smoldpo_base.json            ours, if a run wrote it: {"model", "sha256", "dtype"} of the very base
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from smoldpo.errors import ModelError
from smoldpo.models.quiet import quiet

CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "smoldpo_base.json"


@dataclass(frozen=True)
class AdapterBase:
    """The model that an adapter belongs to: its name, and, where a run wrote it, what it holds."""

    model: str
    sha256: str | None = None
    dtype: str | None = None
    """The precision over which `sha256` was taken."""


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, and no model of its own."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def read_base(folder: Path) -> AdapterBase:
    """What the adapter's own files say of its base.

    Raises:
        ModelError: weights that are missing or pickled, a damaged file, or no word of the base.
    """
    if not (folder / WEIGHTS).is_file():
        raise ModelError(
            f"{folder}: holds an adapter without {WEIGHTS}; pickled weights are never read"
        )
    try:
        if (folder / BASE).is_file():
            said = _object(folder / BASE)
            return AdapterBase(*(str(said[key]) for key in ("model", "sha256", "dtype")))
        name = _object(folder / CONFIG)["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder}: its adapter's files cannot be read ({error})") from None
    if not name:
        raise ModelError(f"{folder}: {CONFIG} does not say which model the adapter belongs to")
    return AdapterBase(str(name))


def write_base(folder: Path, base: AdapterBase) -> None:
    """Say which model an adapter belongs to."""
    text = json.dumps(base.__dict__, indent=2) + "\n"
    (folder / BASE).write_text(text, encoding="utf-8")


def merged(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """`model` (changed in place) with the folder's adapter added into its weights.

    Raises:
        ModelError: an adapter that does not fit the model, is damaged, or of a kind that cannot be merged.
    """
    from peft import PeftModel

    try:
        with quiet():
            adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=False)
            _require_all(adapted, folder)
            return adapted.merge_and_unload()
    except Exception as error:  # peft, safetensors and torch raise without a common base
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise ModelError(
            f"{folder}: the adapter cannot be put into its model: {reason or type(error).__name__}"
        ) from None


def _require_all(adapted: Any, folder: Path) -> None:
    """peft only warns where the file lacks weights, and would leave those at random."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(folder / WEIGHTS, "pt") as file:
        theirs = set(file.keys())
    wanted = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if missing := sorted(wanted - theirs):
        raise ValueError(f"{WEIGHTS} lacks {missing[0]}")


def _object(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} is no JSON object")
    return value
