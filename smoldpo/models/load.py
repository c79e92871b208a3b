"""From a model's name (built-in, folder, run, GGUF file, hub id) to a model and its tokenizer.

Weights are read as safetensors only, never as pickles, and no code of a model's own is ever run.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from smoldpo.models.adapter_folders import (
    CONFIG,
    AdapterBase,
    LowRank,
    is_adapter,
    low_rank_parts,
    merged,
    read_base,
)
from smoldpo.models.builtin import BUILTIN, builtin_gguf
from smoldpo.models.completeness import require_complete, require_unpacked
from smoldpo.models.gguf import unpack_gguf
from smoldpo.models.hf_logging import quiet
from smoldpo.models.weight_files import narrow_dtype, stored_tensors
from smoldpo.models.weights import weights_sha256
from smoldpo.utils.errors import ModelError, UsageError, whole_reason
from smoldpo.utils.hub import cached_only, hub_is_unreachable

HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")


@dataclass(frozen=True)
class ModelSource:
    """A model that can be loaded: what the user called it, and what transformers is to open."""

    name: str
    location: str
    cached_only: bool = False
    """The hub does not answer: what is cached may load, and nothing is asked for."""
    base: ModelSource | None = None
    """Of an adapter: the model that it is put into."""
    base_is: AdapterBase | None = None
    """Of an adapter: what it says of that model."""

    @property
    def is_local(self) -> bool:
        return Path(self.location).is_dir()


def find_model(name: str) -> ModelSource:
    """Turn a name into something to load; a GGUF file is unpacked on first use.

    Raises:
        UsageError: no such folder or file.
        ModelError: a folder without a model, or a GGUF file that cannot be read.
    """
    if name == BUILTIN:
        return ModelSource(name, str(unpack_gguf(builtin_gguf())))
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UsageError(f"{name}: no such file")
        return ModelSource(name, str(unpack_gguf(path)))
    if path.is_dir():
        folder = _model_folder(path)
        return _adapter(name, folder) if is_adapter(folder) else ModelSource(name, str(folder))
    if path.exists():
        raise UsageError(
            f"{name}: is a file of unknown kind; give a folder, a .gguf file or a hub id"
        )
    if HUB_ID.match(name):
        return ModelSource(name, name, cached_only=hub_is_unreachable("model", name))
    raise UsageError(
        f"{name}: no such folder; give a model folder, a run folder, a .gguf file, "
        f"a hub id such as HuggingFaceTB/SmolLM2-135M-Instruct, or {BUILTIN}"
    )


def _model_folder(folder: Path) -> Path:
    for candidate in (folder, folder / "model"):
        if (candidate / "config.json").is_file() or is_adapter(candidate):
            return candidate
    raise ModelError(
        f"{folder}: holds no config.json; a model folder has config.json, *.safetensors and the "
        f"tokenizer's files, an adapter has {CONFIG} (a run folder has them under model/)"
    )


def _adapter(name: str, folder: Path) -> ModelSource:
    said = read_base(folder)
    try:
        base = find_model(said.model) if not _is_an_adapter_too(said.model) else None
    except (UsageError, ModelError) as error:
        raise ModelError(f"{name}: is an adapter, and its model is not there: {error}") from None
    if base is None:
        raise ModelError(f"{name}: is an adapter of an adapter, {said.model}; merge that one first")
    return ModelSource(name, str(folder), base=base, base_is=said)


def _is_an_adapter_too(name: str) -> bool:
    path = Path(name).expanduser()
    return any(is_adapter(folder) for folder in (path, path / "model"))


def load_model(
    source: ModelSource, dtype: torch.dtype, device: str = "cpu", *, as_stored: Collection[str] = ()
) -> PreTrainedModel:
    """The model in `dtype` on `device`, in evaluation mode and with every dropout at 0.

    An adapter is added into its model's weights, so that what comes is a plain model.

    Args:
        as_stored: types of models that rather come in bfloat16 or float16, where all of their
            files' weights are. Nothing is converted then, nor rounded: on a CPU the model is its
            files, mapped into memory.

    Raises:
        ModelError: weights that are missing, left over, damaged, packed or not safetensors
            (models/completeness.py); a hub out of reach; a model that needs code of its own; an
            adapter whose model is not the one that it was trained on.
    """
    model: Any
    if source.base is not None:
        model = merged(_base_model(source, dtype), Path(source.location))
        return model.to(device).eval()
    model = _load_complete(source, AutoModelForCausalLM, dtype, as_stored)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for key in ("attention_dropout", "attn_dropout", "resid_dropout", "hidden_dropout"):
        if getattr(model.config, key, 0):
            setattr(model.config, key, 0.0)
    return model.to(device).eval()


def check_model(source: ModelSource) -> None:
    """Find out now whether `load_model` will refuse the model, where it is needed only later on.

    What is loaded is dropped again; most of it is not even read (`as_stored` for every type).

    Raises:
        ModelError: as load_model.
    """
    if source.base is not None:
        load_model(source, torch.float32)
    else:
        _load_complete(source, AutoModelForCausalLM, "auto")


def load_classifier(source: ModelSource) -> PreTrainedModel:
    """A sequence classifier (a reward model), in the precision that its weights are stored in.

    Raises:
        ModelError: as load_model, also where it is a model of another kind.
    """
    if source.base is not None:
        raise ModelError(
            f"{source.name}: is an adapter; a reward model is read whole, so merge it into its "
            "model"
        )
    auto = AutoModelForSequenceClassification
    return _load_complete(source, auto, "auto", part="reward model").eval()


def _load_complete(
    source: ModelSource,
    auto: Any,
    dtype: torch.dtype | str,
    as_stored: Collection[str] = (),
    part: str = "model",
) -> PreTrainedModel:
    """The model on the CPU, every weight of it from its files and every tensor of these in it."""
    try:
        with quiet(), cached_only(source.cached_only):
            stored = stored_tensors(source.location)
            config = AutoConfig.from_pretrained(source.location, trust_remote_code=False)
            require_unpacked(config)
            narrow = narrow_dtype(source.location, as_stored) if as_stored else None
            model, loading = auto.from_pretrained(
                source.location,
                dtype=narrow or dtype,
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # which are refused below, all of them and by name
                output_loading_info=True,
            )
        if getattr(model, "_hf_peft_config_loaded", False):
            raise ModelError(_adapter_inside(source))
        require_complete(model, loading, stored or {})
    except ModelError as error:
        raise ModelError(f"{source.name}: {error}") from None
    except Exception as error:  # transformers, safetensors and the hub raise without a common base
        raise _explained(source, error, part) from None
    return model


def _adapter_inside(source: ModelSource) -> str:
    if source.is_local:
        return (
            f"holds a model and an adapter on it; keep them in folders of their own ({CONFIG} and "
            "the adapter's weights in one, the rest in the other), and give the one that you mean"
        )
    return "is an adapter on the hub; download it (hf download) and give the folder"


def _base_model(source: ModelSource, dtype: torch.dtype) -> PreTrainedModel:
    """The model of an adapter; one that a run wrote down is held to what it was then."""
    base, said = source.base, source.base_is
    assert base is not None and said is not None
    if said.sha256 is None:
        return load_model(base, dtype)
    model: Any = load_model(base, getattr(torch, str(said.dtype), torch.float32))
    if weights_sha256(model) != said.sha256:
        raise ModelError(
            f"{source.name}: is an adapter of {said.model}, whose weights are no longer those that "
            "it was trained on"
        )
    return model.to(dtype)


def load_base(source: ModelSource) -> PreTrainedModel:
    """The model of an adapter, in float32.

    Raises:
        ModelError: as load_model; what is loaded is no adapter.
    """
    if source.base is None:
        raise ModelError(f"{source.name}: holds a whole model, and no adapter")
    return _base_model(source, torch.float32)


def load_parts(source: ModelSource) -> list[LowRank]:
    """What an adapter adds to its model, layer by layer, in float32.

    Raises:
        ModelError: as load_base and low_rank_parts.
    """
    return low_rank_parts(load_base(source), Path(source.location))


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The model's tokenizer; an adapter without one has its model's.

    Raises:
        ModelError: there is none, or it is damaged.
    """
    if source.base is not None and not (Path(source.location) / "tokenizer_config.json").is_file():
        return load_tokenizer(source.base)
    if source.is_local:
        _require_tokenizer_files(source)
    try:
        with quiet(), cached_only(source.cached_only):
            return AutoTokenizer.from_pretrained(source.location, trust_remote_code=False)
    except Exception as error:  # as above
        raise _explained(source, error, "tokenizer") from None


TOKENIZERS = (
    ("tokenizer.json",),
    ("tokenizer.model",),
    ("vocab.json", "merges.txt"),
    ("spiece.model",),
    ("sentencepiece.bpe.model",),
    ("vocab.txt",),
    ("tekken.json",),
    ("tokenizer.model.v3",),
)
"""Files of which a tokenizer can be made: one of these sets."""


def _require_tokenizer_files(source: ModelSource) -> None:
    """transformers makes some tokenizers of nothing, and of others does not say what is missing."""
    folder = Path(source.location)
    if any(all((folder / name).is_file() for name in names) for names in TOKENIZERS):
        return
    raise ModelError(
        f"{source.name}: has no tokenizer: neither tokenizer.json nor tokenizer.model is there, "
        "nor vocab.json with merges.txt; copy tokenizer.json and tokenizer_config.json from the "
        "model that it was made from"
    )


def require_same_tokens(tokenizer: PreTrainedTokenizerBase, reference: ModelSource) -> None:
    """Refuse a reference that reads token ids otherwise than the policy.

    Raises:
        UsageError: the vocabularies differ.
    """
    if _named_tokens(load_tokenizer(reference)) != _named_tokens(tokenizer):
        raise UsageError(
            f"reference {reference.name}: its vocabulary is not the policy's, so their "
            "log-probabilities cannot be compared; give a model of the same family"
        )


def _named_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The vocabulary without names that GGUF files give to rows without a token."""
    padding = re.compile(r"\[PAD\d+\]")
    return {text: i for text, i in tokenizer.get_vocab().items() if not padding.fullmatch(text)}


def positions(model: PreTrainedModel) -> int | None:
    """How many positions the model was made for, where it says."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _explained(source: ModelSource, error: Exception, part: str = "model") -> ModelError:
    reason = whole_reason(error)
    if "trust_remote_code" in reason or "custom code" in reason:
        reason = "it needs code of its own, which smoldpo never runs"
    elif "does not recognize this architecture" in reason:
        kind = re.search(r"model type `(.*?)`", reason)
        known = f"its type, {kind[1]!r}," if kind else "its type"
        reason = f"{known} is none that this version of transformers knows; update transformers"
    elif "not a valid JSON" in reason:
        reason = "its config.json is damaged; get it again"
    elif "safetensors" in reason and "no file named" in reason:
        reason = "it holds no *.safetensors; convert its weights (pickled weights are never read)"
    elif not source.is_local:
        if source.cached_only:
            reason = "the hub does not answer, and the cache has none"
        return ModelError(
            f"{source.name}: is no local folder, and its {part} cannot be loaded from the hub: "
            f"{reason}. Check the name and the network, or give a local folder or {BUILTIN}"
        )
    return ModelError(f"{source.name}: the {part} cannot be loaded: {reason}")
