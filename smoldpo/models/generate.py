"""Answers from a model: greedy or sampled, at once or as a stream of text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer


@torch.no_grad()
def generate_answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    write: Callable[[str], None] | None = None,
) -> str:
    """The model's answer to one tokenised prompt, without the end-of-turn token.

    Args:
        temperature: 0 takes the likeliest token each time; above 0 samples.
        write: given each new piece of text as it comes.
    """
    ids = torch.tensor([list(prompt_ids)], device=model.device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {}
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.eos_token_id,
        streamer=_Writer(tokenizer, write) if write else None,
        **({"do_sample": False} | sampling),
    )
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()


class _Writer(TextStreamer):
    """transformers' streamer, writing where we say instead of to standard output."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._write(text)
