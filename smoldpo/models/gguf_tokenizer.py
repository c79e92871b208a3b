"""How a GGUF file's tokenizer splits text before it merges: `tokenizer.ggml.pre`.

The file only names it. transformers (5.23) knows some of the names, and splits all others as GPT-2
does, without a word: white space before digits then gives other tokens than in training. The names
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


def set_pre_tokenizer(tokenizer: PreTrainedTokenizerBase, fields: Mapping[str, Any]) -> None:
    """Let a tokenizer read from a GGUF file split text as the file says.

    Raises:
        ModelError: the file does not say it, or by a name that is not known here.
    """
    if fields.get("tokenizer.ggml.model") != "gpt2":
        return  # sentence pieces: nothing splits them
    name = fields.get("tokenizer.ggml.pre")
    known = getattr(gguf_tokenizer_mapping, "GGUF_PRE_TOKENIZER_SPLITS", {})
    first: Any
    if name in SINGLE_DIGITS:
        first, regex = pre_tokenizers.Digits(individual_digits=True), True
    elif name in AS_QWEN2 and "qwen2" in known:
        first, regex = pre_tokenizers.Split(Regex(known["qwen2"]), "isolated"), False
    elif name in AS_GPT2 or name in known:
        return  # as transformers has it
    else:
        how = (
            "does not say how" if name is None else f"says by a name not known here ({name!r}) how"
        )
        raise ModelError(
            f"it {how} its tokenizer splits text (tokenizer.ggml.pre); give the model's folder of "
            "safetensors, or a file converted anew"
        )
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)]
    )
