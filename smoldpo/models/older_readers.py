"""What older readers of a model folder look for, beside what transformers 5 writes.

transformers 5 writes the rotary base and its scaling into `rope_parameters`, and the precision as
`dtype`. transformers 4, mlx-lm and llama.cpp's converter look for `rope_theta`, `rope_scaling`,
`partial_rotary_factor` and `torch_dtype` at the top of config.json, and where these are missing
they take a default (10,000 for the base) without a word. In tokenizer_config.json transformers 4
knows neither the class that transformers 5 names nor its list of extra special tokens, and refuses
the tokenizer. transformers 5 reads the older names and its own alike.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME

from smoldpo.utils.files import write_json

TOKENIZER = "tokenizer_config.json"
NESTED = {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}
"""The old names of rotary bases by kind of layer (Gemma 3)."""


def add_older_names(folder: Path) -> None:
    """Let older readers understand a saved folder: its config.json if any, and its tokenizer."""
    for name, names in ((CONFIG_NAME, older_names), (TOKENIZER, _older_tokenizer)):
        path = folder / name
        if path.is_file():
            said = json.loads(path.read_text(encoding="utf-8"))
            write_json(path, dict(sorted((names(said) | said).items())))


def _older_tokenizer(said: dict[str, Any]) -> dict[str, Any]:
    """Renames in place, since transformers 4 takes no second name beside those that it refuses."""
    if said.get("tokenizer_class") == "TokenizersBackend":
        said["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(said.get("extra_special_tokens"), list):
        said["additional_special_tokens"] = said.pop("extra_special_tokens")
    return {}


def older_names(config: dict[str, Any]) -> dict[str, Any]:
    """The older names for what a config.json of transformers 5 says."""
    found: dict[str, Any] = {}
    if "dtype" in config:
        found["torch_dtype"] = config["dtype"]
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        found |= _flat(rope)
    for kind, name in NESTED.items():
        if kind in rope and "rope_theta" in rope[kind]:
            found[name] = rope[kind]["rope_theta"]
    if "full_attention" in rope and (scaling := _scaling(rope["full_attention"])):
        found["rope_scaling"] = scaling
    return found


def _flat(rope: dict[str, Any]) -> dict[str, Any]:
    found = {"rope_theta": rope["rope_theta"]}
    if "partial_rotary_factor" in rope:
        found["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if scaling := _scaling(rope):
        found["rope_scaling"] = scaling
    return found


def _scaling(rope: dict[str, Any]) -> dict[str, Any] | None:
    if rope.get("rope_type", "default") == "default":
        return None
    return {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
