"""A model is what its files say, whole: nothing made up, nothing left over, nothing packed.

transformers fills a weight that the files lack with random numbers, leaves out what it has no place
for, and says so in a warning. Here each is an error that names the weight. These are none:

    a tied head or embedding that is stored once, or twice with equal values
    rotary frequencies (rotary_emb.inv_freq) and position_ids, which are computed
    what transformers' class of the model leaves out by its own word (multi-token prediction, ...)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from smoldpo.models.freeze import decoder_layers, layer_of
from smoldpo.models.weight_files import PLAIN, StoredTensor
from smoldpo.utils.errors import ModelError, named_few

COMPUTED = re.compile(r"rotary_emb\.inv_freq$|(^|\.)position_ids$")
"""Buffers that models compute for themselves; older files hold them."""


def require_unpacked(config: PreTrainedConfig) -> None:
    """Refuse weights that are quantised, by what config.json says.

    Raises:
        ModelError: they are. It does not say of which model.
    """
    said = getattr(config, "quantization_config", None)
    if said is None and not isinstance(getattr(config, "quantization", None), Mapping):
        return
    found = said.get("quant_method") if isinstance(said, Mapping) else None
    kind = found or ("mlx" if said is None else "quantization_config in config.json")
    raise ModelError(_packed(f"{kind}"))


def _packed(how: str) -> str:
    return (
        f"its weights are packed ({how}), and smoldpo computes with plain ones; give the model "
        "unpacked (bfloat16, float16 or float32), or a GGUF file, which is unpacked here"
    )


def require_complete(
    model: PreTrainedModel,
    loading: Mapping[str, Any],
    stored: Mapping[str, StoredTensor],
) -> None:
    """Refuse a loaded model that is not exactly what its files hold.

    Args:
        loading: what from_pretrained says of it (output_loading_info).
        stored: its files' tensors; empty where they are unknown.

    Raises:
        ModelError: a weight that is missing, left over, of another shape, stored twice or packed.
            It does not say of which model.
    """
    places = _places(model, stored)
    for name, place in places.items():
        if stored[name].dtype not in PLAIN and model.state_dict()[place].is_floating_point():
            raise ModelError(_packed(f"{name} is {stored[name].dtype}"))
    problems = [
        *_missing(model, sorted(loading["missing_keys"])),
        *_left_over(model, sorted(loading["unexpected_keys"])),
        *_misshapen(loading["mismatched_keys"]),
        *_misnamed(model, places),
        *_untied(model),
        *loading["error_msgs"],
    ]
    if problems:
        raise ModelError(
            "; ".join(problems) + ". Get the model again, whole and with its own config"
        )


def _places(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """The weight of the model that each stored name means, as transformers reads it.

    It adds or takes off the name of the base model ("model."). Names that it converts otherwise are
    left out.
    """
    state, base = model.state_dict().keys(), model.base_model_prefix
    found = {}
    for name in stored:
        shorter = name[len(base) + 1 :] if name.startswith(base) else name  # any sign for the dot
        for place in (name, f"{base}.{name}", shorter):
            if place in state:
                found[name] = place
                break
    return found


def _misnamed(model: PreTrainedModel, places: Mapping[str, str]) -> list[str]:
    """Two names of one weight, of which transformers reads one; or one named unlike the rest."""
    names: dict[str, str] = {}
    for name, place in places.items():
        if place in names:
            return [f"its files hold {names[place]} and {name}, which are one weight of the model"]
        names[place] = name
    prefix = f"{model.base_model_prefix}."
    exact = [name for name, place in places.items() if name == place and name.startswith(prefix)]
    other = [name for name, place in places.items() if name != place]
    if exact and other:
        return [f"its files name {named_few(other)} unlike the rest, such as {exact[0]}"]
    return []


def _missing(model: PreTrainedModel, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    outside = [name for name in names if not name.startswith(f"{model.base_model_prefix}.")]
    if type(model).__name__.endswith("ForSequenceClassification") and outside == list(names):
        return [f"is no reward model; its weights lack {named_few(names)}"]
    said = f"its files lack {named_few(names)}"
    head = model.get_output_embeddings()
    if head is not None and any(model.get_submodule(_module(name)) is head for name in names):
        tied = model.config.get_text_config().tie_word_embeddings
        says = "is" if tied else "is not"
        said += f", though config.json says that the LM head {says} tied to the embeddings"
    return [said]


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _left_over(model: PreTrainedModel, names: Sequence[str]) -> list[str]:
    names = [name for name in names if not COMPUTED.search(name)]
    if not names:
        return []
    said = f"its files hold {named_few(names)}, for which its config.json has no place"
    layers, deepest = decoder_layers(model), max(layer_of(name) for name in names)
    if deepest >= layers:
        said += f" (num_hidden_layers is {layers}, and the files go up to layer {deepest})"
    return [said]


def _misshapen(found: Iterable[tuple[str, Sequence[int], Sequence[int]]]) -> list[str]:
    said = [
        f"{name} is {list(theirs)} in its files, and {list(ours)} by its config.json"
        for name, theirs, ours in sorted(found)
    ]
    more = [f"{len(said) - 3} more are of other shapes"] if len(said) > 3 else []
    return said[:3] + more


def _untied(model: PreTrainedModel) -> list[str]:
    """transformers keeps both, where its older versions and other programs take one for both."""
    for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        if model.get_parameter(target) is not model.get_parameter(source):
            return [
                f"its config.json ties {target} to {source}, but its files hold both and they "
                "differ (set tie_word_embeddings to false if they are meant to)"
            ]
    return []
