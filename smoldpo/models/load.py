"""From a model's name (built-in, folder, run, GGUF file, hub id) to a model and its tokenizer.

Weights are read as safetensors only, never as pickles, and no code of a model's own is ever run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from smoldpo.models.adapters import CONFIG, AdapterBase, is_adapter, merged, read_base
from smoldpo.models.builtin import BUILTIN, builtin_gguf
from smoldpo.models.gguf import unpack_gguf
from smoldpo.models.hf_logging import quiet
from smoldpo.models.weights import weights_sha256
from smoldpo.utils.errors import ModelError, UsageError
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
            files, mapped
                into memory.

    Raises:
        ModelError: weights that are missing, damaged or not safetensors; a hub out of reach; a
            model that needs code of its own; an adapter whose model is not the one that it was
            trained on.
    """
    if source.base is not None:
        return merged(_base_model(source, dtype), Path(source.location)).to(device).eval()
    try:
        with quiet(), cached_only(source.cached_only):
            if as_stored:
                dtype = narrow_dtype(source.location, as_stored) or dtype
            model = AutoModelForCausalLM.from_pretrained(
                source.location,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
            )
    except Exception as error:  # transformers, safetensors and the hub raise without a common base
        raise _explained(source, error) from None
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(
            f"{source.name}: is an adapter on the hub; download it (hf download) and give the "
            "folder"
        )
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for key in ("attention_dropout", "attn_dropout", "resid_dropout", "hidden_dropout"):
        if getattr(model.config, key, 0):
            setattr(model.config, key, 0.0)
    return model.to(device).eval()


def _base_model(source: ModelSource, dtype: torch.dtype) -> PreTrainedModel:
    """The model of an adapter; one that a run wrote down is held to what it was then."""
    base, said = source.base, source.base_is
    assert base is not None and said is not None
    if said.sha256 is None:
        return load_model(base, dtype)
    model = load_model(base, getattr(torch, str(said.dtype), torch.float32))
    if weights_sha256(model) != said.sha256:
        raise ModelError(
            f"{source.name}: is an adapter of {said.model}, whose weights are no longer those that "
            "it was trained on"
        )
    return model.to(dtype)


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The model's tokenizer; an adapter without one has its model's.

    Raises:
        ModelError: there is none, or it is damaged.
    """
    if source.base is not None and not (Path(source.location) / "tokenizer_config.json").is_file():
        return load_tokenizer(source.base)
    try:
        with quiet(), cached_only(source.cached_only):
            return AutoTokenizer.from_pretrained(source.location, trust_remote_code=False)
    except Exception as error:  # as above
        raise _explained(source, error, "tokenizer") from None


def require_same_tokens(tokenizer: PreTrainedTokenizerBase, reference: ModelSource) -> None:
    """Refuse a reference that reads token ids otherwise than the policy.

    Raises:
        UsageError: the vocabularies differ.
    """
    if load_tokenizer(reference).get_vocab() != tokenizer.get_vocab():
        raise UsageError(
            f"reference {reference.name}: its vocabulary is not the policy's, so their "
            "log-probabilities cannot be compared; give a model of the same family"
        )


def positions(model: PreTrainedModel) -> int | None:
    """How many positions the model was made for, where it says."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _explained(source: ModelSource, error: Exception, part: str = "model") -> ModelError:
    reason = next(
        (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
    )
    if "trust_remote_code" in str(error) or "custom code" in str(error):
        reason = "it needs code of its own, which smoldpo never runs"
    elif "safetensors" in reason and "no file named" in reason:
        reason = "it holds no *.safetensors; convert its weights (pickled weights are never read)"
    elif not source.is_local:
        if source.cached_only:
            reason = "the hub does not answer, and the cache has none"
        return ModelError(
            f"{source.name}: is no local folder, and its {part} cannot be loaded from the hub: "
            f"{reason.rstrip('.')}. Check the name and the network, or give a local folder or "
            f"{BUILTIN}"
        )
    return ModelError(f"{source.name}: the {part} cannot be loaded: {reason}")


# In which precision a model's files hold its weights.


NARROW = {"BF16": torch.bfloat16, "F16": torch.float16}


def narrow_dtype(location: str, types: Collection[str]) -> torch.dtype | None:
    """bfloat16 or float16, where every weight is stored in it; else None, also where unknown.

    Args:
        location: a model folder, or a hub id.
        types: of models for which it may be told. Others may compute with more than their weights:
            Gemma scales embeddings by a number that it makes in the precision in which it is
            loaded.
    """
    try:
        if _type(location) not in types:
            return None
        found = {dtype for path in _files(location) for dtype in _dtypes(path)}
    except (OSError, ValueError, KeyError, SafetensorError):
        return None  # loading will say what is wrong
    return NARROW.get(found.pop()) if len(found) == 1 else None


def _type(location: str) -> str:
    config = Path(str(cached_file(location, CONFIG_NAME)))
    return str(json.loads(config.read_text(encoding="utf-8"))["model_type"])


def _files(location: str) -> list[str]:
    """Paths of a folder's or a hub model's weights, found in transformers' order."""
    alone = cached_file(location, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False)
    if alone is not None:
        return [alone]
    index = Path(str(cached_file(location, SAFE_WEIGHTS_INDEX_NAME)))
    names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return [str(cached_file(location, name)) for name in sorted(names)]


def _dtypes(path: str) -> set[str]:
    with safe_open(path, "pt") as file:
        return {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
