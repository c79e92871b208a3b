"""Adapters on disk, in peft's format: what a folder with one says, and the model that it makes.

adapter_config.json          peft's; base_model_name_or_path is where others find the base
adapter_model.safetensors    peft's; pickled weights (adapter_model.bin) are never read
smoldpo_base.json            ours, if a run wrote it: {"model", "sha256", "dtype"} of the base
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from smoldpo.models.adapters import NAME, is_adapted, magnitude_of
from smoldpo.models.hf_logging import quiet
from smoldpo.models.weight_files import headers
from smoldpo.utils.errors import ModelError, named_few, whole_reason

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


def sort_modules(folder: Path) -> None:
    """Sort the names of modules in adapter_config.json.

    peft holds them as sets, whose order is another in each process: equal adapters would be unequal
    files.
    """
    config = _object(folder / CONFIG)
    for key in ("target_modules", "exclude_modules"):
        if isinstance(config.get(key), list):
            config[key].sort()
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / CONFIG).write_text(text, encoding="utf-8")


def merged(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """`model` (changed in place) with the folder's adapter added into its weights.

    It computes what peft's model computes. Where an adapter is on one of two tied matrices, or on
    both, the LM head gets a matrix of its own first: else each would get the other's change too.

    Raises:
        ModelError: an adapter that does not fit the model, is damaged, or of a kind that cannot be
            merged.
    """
    with _adapted(model, folder) as adapted:
        _untie(adapted.get_base_model())
        plain = adapted.merge_and_unload()
    plain.all_tied_weights_keys = plain.get_expanded_tied_weights_keys(all_submodels=True)
    return plain


@dataclass(frozen=True)
class LowRank:
    """What an adapter adds to the weight W [F, D] of one linear layer: scaling · B A.

    Attributes:
        name: the module's, as in the model without adapters.
        a, b: [r, D] and [F, r], in the model's precision.
        magnitude: of DoRA: [F], to which the rows of the sum are scaled.
    """

    name: str
    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None


def low_rank_parts(model: PreTrainedModel, folder: Path) -> list[LowRank]:
    """What the folder's adapter adds to `model`, layer by layer; the model cannot be used after.

    Raises:
        ModelError: as merged; or an adapter that holds more than such parts of linear layers.
    """
    with _adapted(model, folder) as adapted:
        config = adapted.peft_config[NAME]
        if config.bias != "none" or getattr(config, "modules_to_save", None):
            raise ModelError("it holds whole weights beside those of low rank")
        parts = []
        for name, module in adapted.get_base_model().named_modules():
            if not is_adapted(module):
                continue
            if not isinstance(module.base_layer, nn.Linear) or name.endswith("lm_head"):
                raise ModelError(f"it changes {name}, which is no linear layer of the decoder")
            magnitude = magnitude_of(module)
            parts.append(
                LowRank(
                    name,
                    module.lora_A[NAME].weight.detach(),
                    module.lora_B[NAME].weight.detach(),
                    float(module.scaling[NAME]),
                    None if magnitude is None else magnitude.weight.detach(),
                )
            )
        return parts


@contextlib.contextmanager
def _adapted(model: PreTrainedModel, folder: Path) -> Iterator[Any]:
    """peft's model with the folder's adapter; errors in the block are this adapter's."""
    from peft import PeftModel

    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what peft warns of is an error here, or mended
            adapted = PeftModel.from_pretrained(
                model, str(folder), is_trainable=False, ignore_mismatched_sizes=True
            )
            _require_mergeable(adapted)
            _require_exact(adapted, folder)
            yield adapted
    except ModelError as error:
        raise ModelError(f"{folder}: the adapter cannot be put into its model: {error}") from None
    except Exception as error:  # peft, safetensors and torch raise without a common base
        raise ModelError(
            f"{folder}: the adapter cannot be put into its model: {whole_reason(error)}"
        ) from None


def _require_mergeable(adapted: Any) -> None:
    config = adapted.peft_config["default"]
    kind = getattr(config.peft_type, "value", config.peft_type)
    if not hasattr(adapted.base_model, "merge_and_unload"):
        raise ModelError(f"it is of kind {kind}, which cannot be merged into weights; LoRA can")
    if getattr(config, "layer_replication", None):
        raise ModelError("it repeats layers of its model (layer_replication), which is not read")


def _require_exact(adapted: Any, folder: Path) -> None:
    """Every tensor of the adapter is in the file, and none else, in the model's shapes.

    peft only warns where the file lacks some, and would leave those at random; of what is left over
    it says nothing. A file may hold the embeddings and the head as well: peft writes them where an
    adapter stands on them, or where rows were added.
    """
    from peft import get_peft_model_state_dict

    stored = headers(folder / WEIGHTS)
    wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    known = get_peft_model_state_dict(adapted, save_embedding_layers=True) | wanted
    if missing := sorted(wanted.keys() - stored.keys()):
        raise ModelError(f"{WEIGHTS} lacks {named_few(missing)}")
    if left := sorted(stored.keys() - known.keys()):
        raise ModelError(f"{WEIGHTS} holds {named_few(left)}, for which its model has no place")
    for name, tensor in stored.items():
        if tensor.shape != tuple(known[name].shape):
            whole = name not in wanted
            why = "; it was trained on embeddings of another size" if whole else ""
            raise ModelError(
                f"{name} is {list(tensor.shape)} in {WEIGHTS}, and {list(known[name].shape)} in "
                f"its model{why}"
            )
    with safe_open(folder / WEIGHTS, "pt") as file:
        for name in sorted(stored.keys() - wanted.keys()):
            if not torch.equal(file.get_tensor(name).to(known[name].dtype), known[name].cpu()):
                raise ModelError(
                    f"{WEIGHTS} holds embeddings and an LM head that differ, and its model ties "
                    "them; it was trained on an untied one"
                )


def _untie(model: Any) -> None:
    """Give the LM head a matrix of its own, where an adapter is on it or on tied embeddings."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if not any(isinstance(end, BaseTunerLayer) for end in ends):
        return
    embeddings, head = (_without_adapter(end) for end in ends)
    if head is None or head.weight is not embeddings.weight:
        return
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False


def _without_adapter(module: Any) -> Any:
    for inner in ("base_layer", "original_module"):
        while hasattr(module, inner):
            module = getattr(module, inner)
    return module


def _object(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} is no JSON object")
    return value
