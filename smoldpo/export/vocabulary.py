"""A byte-level BPE tokenizer as GGUF metadata: tokens, merges, kinds of tokens, ends, template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import gguf
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smoldpo.models.gguf_tokenizer import splitting_name
from smoldpo.models.token_rows import token_rows
from smoldpo.utils.errors import ModelError

NORMALIZERS = (None, "NFC")
"""llama.cpp knows none; NFC (Qwen) leaves text alone that is composed already, as nearly all is."""


def add_vocabulary(
    writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> None:
    """Write what a GGUF file says of the tokenizer.

    Raises:
        ModelError: a tokenizer of another kind, that splits text in a way llama.cpp has no name
            for, or with ids that the model has no rows for.
    """
    said = json.loads(tokenizer.backend_tokenizer.to_str())
    name = _require_known(tokenizer, said)
    rows = token_rows(model)
    tokens, types = _tokens(said, rows)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in said["model"]["merges"]])
    _add_ends(writer, tokenizer, model, rows)
    template: Any = tokenizer.chat_template
    if template:
        if isinstance(template, Mapping):
            template = [{"name": key, "template": text} for key, text in template.items()]
        writer.add_chat_template(template)


def _require_known(tokenizer: PreTrainedTokenizerBase, said: Mapping[str, Any]) -> str:
    """The pre-tokenizer's name."""
    kind, decoder = said["model"]["type"], (said["decoder"] or {}).get("type")
    if kind != "BPE" or decoder != "ByteLevel" or said["model"].get("byte_fallback"):
        raise ModelError(
            "its tokenizer is no byte-level BPE (as SmolLM's, Llama 3's and Qwen's are), and "
            "others cannot be exported as GGUF here; llama.cpp's convert_hf_to_gguf.py may"
        )
    normalizer = (said["normalizer"] or {}).get("type")
    if normalizer not in NORMALIZERS:
        raise ModelError(f"its tokenizer normalises text ({normalizer}), which llama.cpp does not")
    name = splitting_name(tokenizer)
    if name is None:
        raise ModelError("its tokenizer splits text in a way that llama.cpp has no name for")
    return name


def _tokens(said: Mapping[str, Any], rows: int) -> tuple[list[str], list[gguf.TokenType]]:
    """Each row's token and its kind; rows without a token are padding."""
    tokens = [f"[PAD{index}]" for index in range(rows)]
    types = [gguf.TokenType.UNUSED] * rows
    known = dict(said["model"]["vocab"])
    added = {entry["content"]: entry for entry in said["added_tokens"]}
    known |= {text: entry["id"] for text, entry in added.items()}
    for text, index in known.items():
        if index >= rows:
            raise ModelError(
                f"its tokenizer has the token {text!r} ({index}), and the model only {rows:,} rows"
            )
        tokens[index] = text
        types[index] = gguf.TokenType.NORMAL
        if text in added:
            special = added[text]["special"]
            types[index] = gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED
    return tokens, types


def _add_ends(writer: gguf.GGUFWriter, tokenizer: Any, model: PreTrainedModel, rows: int) -> None:
    """The ids of special tokens, and whether text gets a BOS and an EOS of itself."""
    for kind in ("bos", "eos", "unk", "pad"):
        index = getattr(tokenizer, f"{kind}_token_id")
        if index is not None and index < rows:
            getattr(writer, f"add_{kind}_token_id")(index)
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = ends if isinstance(ends, list) else [ends]
    others = [end for end in ends if end not in (None, tokenizer.eos_token_id)]
    for kind, index in zip(("eot", "eom"), others, strict=False):
        getattr(writer, f"add_{kind}_token_id")(index)
    bare = tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.encode("a", add_special_tokens=True)
    before, after = _around(bare, whole, tokenizer)
    writer.add_add_bos_token(before)
    writer.add_add_eos_token(after)
    writer.add_add_space_prefix(False)


def _around(bare: list[int], whole: list[int], tokenizer: Any) -> tuple[bool, bool]:
    """Whether the tokenizer puts BOS before a text, and EOS behind it.

    Raises:
        ModelError: it puts something else there.
    """
    for before in (False, True):
        for after in (False, True):
            bos, eos = [tokenizer.bos_token_id] * before, [tokenizer.eos_token_id] * after
            if [*bos, *bare, *eos] == whole:
                return before, after
    raise ModelError("its tokenizer adds tokens to a text that are neither BOS nor EOS")
