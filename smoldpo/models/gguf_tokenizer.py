"""How a GGUF file's tokenizer splits text before it merges: `tokenizer.ggml.pre`.

The file only names it. transformers (5.23) knows some of the names, and splits all others as GPT-2
does, without a word: white space before digits then gives other tokens than in training. Nor does
it know that some names mean that a piece which is a token is not put together by merges. The names
and what they mean are llama.cpp's (llama-vocab.cpp).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import Regex, pre_tokenizers
from transformers import PreTrainedTokenizerBase
from transformers.integrations.gguf import gguf_tokenizer_mapping

from smoldpo.utils.errors import ModelError

SINGLE_DIGITS = {
    "smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2",
}  # fmt: skip
"""Each digit by itself first, then as GPT-2."""
AS_GPT2 = {
    "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4", "jina-es",
    "jina-de", "jina-v2-es", "jina-v2-de", "jina-v1-en", "jina-v2-code", "roberta-bpe", "gigachat",
    "a.x-4.0", "mellum", "modern-bert",
}  # fmt: skip
AS_QWEN2 = {"stablelm2", "hunyuan", "solar-open", "grok-2"}
MERGES_IGNORED = {
    "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2",
    "jina-v5-nano", "tekken",
}  # fmt: skip
"""A piece that is a token is that token, whatever the merges make of it (`ignore_merges`)."""
WRITTEN = ("smollm", "llama-bpe", "smaug-bpe", "qwen2", "qwen35", "tekken", "gpt-4o", "gpt-2")
"""Names that exports write: of those that mean the same, one."""
PROBE = (
    "It's 12345 o'clock\u2014DON'T  stop!\n\n\tdef f(x):\r\n    return x**2 # 3.14 \u00b2\u2155 "
    "\u0391\u03b2\u03b3 \u4f60\u597d\u4e16\u754c \u0645\u0631\u062d\u0628\u0627 "
    "\u0928\u092e\u0938\u094d\u0924\u0947 e\u0301te\u0301 \U0001f600\U0001f44d\U0001f3fd  "
    "camelCase I'LL a/b\n/c  \n 7 \u00a0x"
)
"""Text on which the ways of splitting differ."""


def splitter(name: str | None) -> Any:
    """The pre-tokenizer that a name stands for; None: not known here."""
    known = getattr(gguf_tokenizer_mapping, "GGUF_PRE_TOKENIZER_SPLITS", {})
    first: Any
    if name in AS_GPT2:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name in SINGLE_DIGITS:
        first, regex = pre_tokenizers.Digits(individual_digits=True), True
    elif (as_known := "qwen2" if name in AS_QWEN2 else name) in known:
        first, regex = pre_tokenizers.Split(Regex(known[as_known]), "isolated"), False
    else:
        return None
    return pre_tokenizers.Sequence(
        [first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)]
    )


def set_pre_tokenizer(tokenizer: PreTrainedTokenizerBase, fields: Mapping[str, Any]) -> None:
    """Let a tokenizer read from a GGUF file split text as the file says.

    Raises:
        ModelError: the file does not say it, or by a name that is not known here.
    """
    if fields.get("tokenizer.ggml.model") != "gpt2":
        return  # sentence pieces: nothing splits them
    name = fields.get("tokenizer.ggml.pre")
    found = splitter(name)
    if found is None:
        how = (
            "does not say how" if name is None else f"says by a name not known here ({name!r}) how"
        )
        raise ModelError(
            f"it {how} its tokenizer splits text (tokenizer.ggml.pre); give the model's folder of "
            "safetensors, or a file converted anew"
        )
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = found
    backend.model.ignore_merges = name in MERGES_IGNORED


def splitting_name(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The name by which a GGUF file says how a byte-level tokenizer splits text; None: no such.

    It is found by what the tokenizer does with a text on which all ways differ.
    """
    backend = tokenizer.backend_tokenizer
    if backend.pre_tokenizer is None:
        return None
    pieces = backend.pre_tokenizer.pre_tokenize_str(PROBE)
    for name in WRITTEN:
        known = splitter(name)
        if (
            known is not None
            and backend.model.ignore_merges == (name in MERGES_IGNORED)
            and known.pre_tokenize_str(PROBE) == pieces
        ):
            return name
    return None
