"""Answers from a model: one, greedy or sampled, as a stream of text; or many, to be compared."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TextStreamer,
    TopPLogitsWarper,
)

from smoldpo.models.load import positions
from smoldpo.models.token_rows import require_rows, token_rows
from smoldpo.types import Advance, no_progress
from smoldpo.utils.errors import UsageError
from smoldpo.utils.workers import Workers


@dataclass(frozen=True)
class Answer:
    """What a model said to one prompt."""

    ids: tuple[int, ...]
    """Its tokens, the end-of-turn token included where it came."""
    text: str
    """Without control tokens, and without white space around it."""
    ended: bool
    """Whether the end-of-turn token came before `max_new_tokens` were used up."""


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

    Sampled as the model's own generation settings say (top-k, repetition penalty, ...), which suits
    those who talk to it; `generate_answers` samples from the model's own distribution.

    Args:
        temperature: 0 takes the likeliest token each time; above 0 samples.
        write: given each new piece of text as it comes.

    Raises:
        ModelError: the prompt holds a token for which the model has no row.
    """
    require_rows(tokenizer, token_rows(model), [prompt_ids])
    ids = torch.tensor([list(prompt_ids)], device=model.device)
    ends = end_ids(model, tokenizer)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {}
    answering: Any = model
    output = answering.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
        streamer=_Writer(tokenizer, write) if write else None,
        **({"do_sample": False} | sampling),
    )
    return _text(tokenizer, output[0, ids.shape[1] :].tolist())


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int | Sequence[int],
    batch_size: int,
    top_p: float = 1.0,
    known: Mapping[int, Answer] = MappingProxyType({}),
    finished: Callable[[Sequence[int], Sequence[Answer]], None] | None = None,
    advance: Advance = no_progress,
) -> list[Answer]:
    """An answer to each tokenised prompt, in the prompts' order.

    At temperature 1 the tokens follow the model's own distribution, softmax of its logits: nothing
    in its generation settings (top-k, top-p, penalties, beams, ...) applies. An answer depends on
    model, prompt and seed alone, not on the prompts beside it, but for the rounding of products of
    other shapes. So equal prompts get equal answers, and two models answer a prompt with the same
    random numbers.

    Args:
        temperature: 0 takes the likeliest token each time; above 0 samples from
            softmax(logits / temperature).
        seed: one, or one a prompt.
        batch_size: prompts that are answered side by side, those of like length together; on a CPU
            a thread answers one such batch, so that no answer depends on the number of threads.
        top_p: the likeliest tokens whose probabilities add up to it are sampled from (nucleus
            sampling, Holtzman et al. 2020); 1: from all.
        known: answers of an earlier call, by the prompt's number. A batch is left out where all of
            its answers are known, and computed whole where one is not: so each answer has the bits
            that it had then.
        finished: called with the numbers of a batch's prompts and their answers, batch by batch.

    Raises:
        UsageError: a prompt leaves no room for its answer among the model's positions.
        ModelError: a prompt holds a token for which the model has no row.
    """
    require_rows(tokenizer, token_rows(model), prompts)
    _require_room(model, prompts, max_new_tokens)
    answers = dict(known)
    seeds = [seed] * len(prompts) if isinstance(seed, int) else seed
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    batches = [some for some in batches if not known.keys() >= set(some)]
    if known:
        advance(len(prompts) - sum(map(len, batches)))

    def work(_: int, some: list[int]) -> list[Answer]:
        batch = [(prompts[index], seeds[index]) for index in some]
        return _new_tokens(model, tokenizer, batch, max_new_tokens, temperature, top_p)

    def done(some: list[int], new: list[Answer]) -> None:
        answers.update(zip(some, new, strict=True))
        if finished is not None:
            finished(some, new)
        advance(len(some))

    Workers(None if model.device.type == "cpu" else 1).run(work, batches, done)
    return [answers[index] for index in range(len(prompts))]


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer: those the model's settings name, and the tokenizer's own."""
    found: set[int | None] = set()
    for settings in (model.generation_config, model.config.get_text_config(), tokenizer):
        ids = getattr(settings, "eos_token_id", None)
        found |= set(ids if isinstance(ids, list | tuple) else [ids])
    return sorted(token for token in found if token is not None)


@torch.no_grad()
def _new_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    seeded: Sequence[tuple[Sequence[int], int]],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
) -> list[Answer]:
    """Answers to prompts, each with its seed, that are padded on the left to one length."""
    ends = end_ids(model, tokenizer)
    prompts = [ids for ids, _ in seeded]
    longest = max(map(len, prompts))
    padded = [[0] * (longest - len(ids)) + list(ids) for ids in prompts]
    seen = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
    generators = [_generator(seed, ids) for ids, seed in seeded]
    sampling: list[LogitsProcessor] = []
    if temperature > 0 and top_p < 1:
        nucleus = [TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p)]
        sampling = [*nucleus, _Gumbel(1.0, generators)]
    elif temperature > 0:
        sampling = [_Gumbel(temperature, generators)]
    # Settings passed to `generate` only lie on top of the model's own, so each that may change a
    # distribution would have to be known by name. A shallow copy that has none is asked instead.
    answering: Any = copy.copy(model)
    answering.generation_config = GenerationConfig()
    output = answering.generate(
        input_ids=torch.tensor(padded, device=model.device),
        attention_mask=torch.tensor(seen, device=model.device),
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
        do_sample=False,
        logits_processor=LogitsProcessorList(sampling),
    )
    return [_answer(tokenizer, row, ends) for row in output[:, longest:].tolist()]


def _answer(tokenizer: PreTrainedTokenizerBase, ids: list[int], ends: list[int]) -> Answer:
    """The answer up to the first end of turn; what follows is padding."""
    end = next((place for place, token in enumerate(ids) if token in ends), None)
    said = ids if end is None else ids[: end + 1]
    return Answer(tuple(said), _text(tokenizer, said), ended=end is not None)


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


class _Gumbel(LogitsProcessor):
    """Sampling as an argmax: of logits / T + g with g ~ Gumbel(0, 1), each for itself, it follows
    softmax(logits / T) exactly (Maddison, Tarlow and Minka 2014, A* Sampling, section 2).

    Each row draws from a generator of its own, as many numbers at each step: so the prompts beside
    it change nothing, and another model that answers the prompt meets the same numbers.
    """

    def __init__(self, temperature: float, generators: list[torch.Generator]):
        self._temperature, self._generators = temperature, generators

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [B, V] to scores whose largest is the token sampled."""
        # float64: in float32 the likeliest draws would come in steps, and rare tokens not at all.
        uniform = torch.stack(
            [
                torch.rand(scores.shape[1], generator=generator, dtype=torch.float64)
                for generator in self._generators
            ]
        )
        return scores / self._temperature - (-uniform.log()).log().to(scores)


def _generator(seed: int, prompt: Sequence[int]) -> torch.Generator:
    """The random numbers for a prompt and a seed; on the CPU: the same for every device."""
    digest = hashlib.sha256(repr((seed, list(prompt))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))


def _require_room(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> None:
    longest, there = max(map(len, prompts), default=0), positions(model)
    if there is not None and longest + max_new_tokens > there:
        raise UsageError(
            f"the longest prompt has {longest:,} tokens, and the model {there:,} positions: too "
            f"few for an answer of {max_new_tokens:,} tokens; leave the prompt out, or lower "
            "--max-new-tokens"
        )


class _Writer(TextStreamer):
    """transformers' streamer, writing where we say instead of to standard output."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._write(text)
