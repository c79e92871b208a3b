"""sequence_logps: the fast engine's log-probabilities, with gradients, for other training loops.

The model stays the caller's, as it is: a call computes with modules of its own that share its
parameters (engine/kernels/layers.py). Gradients flow to whatever parameters train.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smoldpo.data.tokenize import PairTokenizer, require_room
from smoldpo.engine.autotune import KernelChoice, choose_kernels
from smoldpo.engine.base import batched_logps
from smoldpo.engine.batching import STREAM_MULTIPLE, STREAM_TOKENS, TokenBatching
from smoldpo.engine.logprobs import LogprobModel
from smoldpo.engine.packing import pack
from smoldpo.models.families import unsupported
from smoldpo.models.load import positions
from smoldpo.models.token_rows import require_rows_of_pairs, token_rows
from smoldpo.types import PairLogps, PreferencePair, TokenizedPair, no_progress
from smoldpo.utils.errors import ModelError, UsageError
from smoldpo.utils.workers import Workers

VARIANTS = ("Dora", "MiCA")
"""PEFT's variants of LoRA, by the beginnings of their names, that treat each row by itself."""


def tokenize_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Iterable[PreferencePair], max_length: int = 1024
) -> list[TokenizedPair]:
    """Pairs as the model sees them (docs/engine.md, numerical conventions); once, before a loop.

    Raises:
        DataError: a dialogue that the chat template refuses.
        ModelError: a template or tokenizer that cannot be used.
    """
    return PairTokenizer(tokenizer, max_length).tokenize_all(pairs)


def sequence_logps(
    model: Any,
    pairs: Sequence[TokenizedPair] | Sequence[PreferencePair],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    max_length: int = 1024,
    stream_tokens: int = STREAM_TOKENS,
) -> PairLogps:
    """log π(chosen|x) and log π(rejected|x), each [pairs], with gradients unless under no_grad.

    Each is the sum over the answer's tokens, its end of turn included, in float32 or wider, on the
    model's device. The prompt is computed once for both answers, the LM head on answers alone. On a
    CPU a pair's numbers do not depend on which other pairs are in the call.

    Args:
        model: a transformers model of a family that the fast engine is proven on (docs/engine.md),
            or a PEFT model with LoRA adapters on its layers; without dropout, autocast or gradient
            checkpointing.
        pairs: tokenised ones, or PreferencePairs together with `tokenizer`.
        max_length: of prompt and completion together, where they are tokenised here.
        stream_tokens: of a stream, which one thread computes; no result depends on it but by
            rounding.

    Raises:
        ModelError: a model that cannot be run this way, and why; a token for which it has no row.
        UsageError: no pairs, PreferencePairs without a tokenizer, autocast, or pairs too long for
            the model.
    """
    tokens = _tokenized(pairs, tokenizer, max_length)
    inner = _inner(model)
    if (reason := _obstacle(inner)) is not None:
        raise ModelError(f"sequence_logps: {reason}")
    if torch.is_autocast_enabled(inner.device.type):
        raise UsageError(
            "sequence_logps computes in the dtype of the weights: call it outside of "
            "torch.autocast, with a model in that dtype"
        )
    require_room(tokens, positions(inner))
    if tokenizer is not None:
        require_rows_of_pairs(tokenizer, token_rows(inner), tokens)
    # One boundary for every model, so that a policy with frozen layers gives what its reference
    # gives.
    workers = Workers(None if inner.device.type == "cpu" else 1)
    kernels = _kernels(inner.dtype, inner.device.type)
    own = [LogprobModel(inner, 0, kernels) for _ in range(workers.count)]
    return batched_logps(
        tokens,
        TokenBatching(stream_tokens),
        lambda worker, batch: own[worker].logps(pack(batch, inner.device, STREAM_MULTIPLE), None),
        no_progress,
        workers,
    )


def _tokenized(
    pairs: Sequence[Any], tokenizer: PreTrainedTokenizerBase | None, max_length: int
) -> Sequence[TokenizedPair]:
    if not len(pairs):
        raise UsageError("sequence_logps: there are no pairs")
    if all(isinstance(pair, TokenizedPair) for pair in pairs):
        return pairs
    if tokenizer is None:
        raise UsageError(
            "sequence_logps: pairs that are not tokenised need a tokenizer: give one, or tokenise "
            "them once with smoldpo.tokenize_pairs"
        )
    if not all(isinstance(pair, PreferencePair) for pair in pairs):
        raise UsageError("sequence_logps: give PreferencePairs, or TokenizedPairs; see load_pairs")
    return tokenize_pairs(tokenizer, pairs, max_length)


@functools.cache
def _kernels(dtype: torch.dtype, device: str) -> KernelChoice:
    """The faster kernels here, measured once: a program's models give comparable numbers."""
    return choose_kernels(dtype, device)


def _inner(model: Any) -> PreTrainedModel:
    """The transformers model; of a PEFT model with LoRA, the one that holds the adapters.

    Raises:
        ModelError: something else.
    """
    kinds = getattr(model, "peft_config", None)
    if kinds and not isinstance(model, PreTrainedModel):
        others = {str(kind.peft_type.value) for kind in kinds.values()} - {"LORA"}
        if others:
            raise ModelError(
                f"sequence_logps: knows PEFT's LoRA adapters, not {', '.join(sorted(others))}; "
                "merge them into the model"
            )
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"sequence_logps: takes a transformers model, not {type(model).__name__}; of a wrapper "
            "give the model inside it (.module)"
        )
    return model


def _obstacle(model: PreTrainedModel) -> str | None:
    """Why the engine must not run this model as it is now, and what to do."""
    if (reason := unsupported(model)) is not None:
        return f"{reason}; families: see docs/engine.md"
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return (
            f"its LM head is a {type(head).__name__}, not a plain linear layer; merge what is on it"
        )
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "its weights lie on several devices; load it on one"
    if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        return "its weights are sharded over processes; give a model that is whole here"
    if model.training and torch.is_grad_enabled() and model.is_activation_checkpointing:
        return (
            "it recomputes its layers in the backward pass; call gradient_checkpointing_disable()"
        )
    for name, module in model.named_modules():
        kind = type(module)
        if isinstance(module, nn.Linear) and kind is not nn.Linear:
            return (
                f"{name} is a {kind.__name__}, not a plain linear layer (quantised?); load it plain"
            )
        if "forward" in vars(module):
            label = name or "the model"
            return f"{label} has a forward of its own (a device map? a patch?); load it plain"
        if variant := _unknown_variant(module):
            return (
                f"{name} has adapters of a kind that may look at more than one row ({variant}), "
                "and here many pairs lie in one stream; call merge_and_unload()"
            )
        dropout = (
            module.p if isinstance(module, nn.Dropout) else vars(module).get("attention_dropout")
        )
        if module.training and dropout:
            return (
                f"{name} drops out {dropout:g} in training mode; call model.eval(), which keeps "
                "gradients"
            )
    return None


def _unknown_variant(module: Any) -> str | None:
    """What PEFT's adapters of a layer are, where a row's result may depend on other rows."""
    found = getattr(module, "lora_variant", None) or {}
    kinds = {name: type(variant).__name__ for name, variant in found.items()}
    others = [
        kind
        for name, kind in kinds.items()
        if name in module.active_adapters and not kind.startswith(VARIANTS)
    ]
    return others[0] if others else None
