"""A small model whose matrices are many pages wide, stored as models on the hub are."""

from os import fsync
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

LAYERS = 4


def make_wide(
    folder: Path,
    tokenizer,
    dtype: torch.dtype = torch.float32,
    tied: bool = True,
    width: int = 256,
    **saving,
) -> Path:
    """Four random layers, of 3 MB each in float32 at this width; values rounded to bfloat16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width,
        num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=4,
        tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16).to(dtype)
    model.save_pretrained(folder, **saving)
    tokenizer.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            fsync(opened.fileno())  # a page that is not on the disk yet may stay a while
    return folder


def below(model, frozen: int) -> list[torch.Tensor]:
    """The weights of so many layers, and of embeddings that no head shares."""
    weights = list(model.model.layers[:frozen].parameters())
    embeddings = model.get_input_embeddings().weight
    return weights + [embeddings] * (embeddings is not model.get_output_embeddings().weight)
