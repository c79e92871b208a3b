"""`smoldpo evaluate`: any model, with or without a reference, on any pairs that training reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from smoldpo import progress
from smoldpo.data.load import LoadedPairs, load_pairs
from smoldpo.data.tokenize import PairTokenizer, require_room
from smoldpo.engine.build import choose_engine
from smoldpo.engine.kernels import Kernels, choose_kernels
from smoldpo.engine.plain import PlainEngine
from smoldpo.engine.precision import cast, compute_dtype, master_dtype, pick_device
from smoldpo.engine.scorer import score
from smoldpo.evaluation.metrics import PairScore, accuracies
from smoldpo.evaluation.scoring import pair_scores
from smoldpo.models.load import (
    find_model,
    load_model,
    load_tokenizer,
    positions,
    require_same_tokens,
)
from smoldpo.types import PairLogps, TokenizedPair


@dataclass(frozen=True)
class EvaluateOptions:
    """What `smoldpo evaluate` can be told besides model and data."""

    reference: str | None = None
    subset: str | None = None
    split: str | None = None
    max_samples: int | None = None
    max_length: int = 1024
    batch_size: int = 8
    dtype: str = "float32"
    device: str = "auto"
    engine: str = "auto"
    format: str | None = None
    columns: dict[str, str] | None = None


@dataclass
class Evaluation:
    """One score a pair, and the account of the rows they came from."""

    scores: list[PairScore]
    data: LoadedPairs
    notes: dict[str, int]

    def summary(self) -> dict[str, Any]:
        """What --json prints."""
        account = self.data.account()
        return {
            "n": len(self.scores),
            "accuracy": accuracies(self.scores),
            "rows_read": account["rows_read"],
            "dropped": account["dropped"],
            "notes": self.notes,
        }


def evaluate_model(model: str, data: str, options: EvaluateOptions) -> Evaluation:
    """Log-probabilities of both sides of every pair under the model, and the reference if given.

    Raises:
        SmoldpoError: as the loading of data and models.
    """
    loaded = load_pairs(
        data,
        subset=options.subset,
        split=options.split,
        format=options.format,
        columns=options.columns,
    )
    pairs = loaded.pairs[: options.max_samples]
    device = pick_device(options.device)
    dtype, _ = compute_dtype(options.dtype, device)
    source = find_model(model)
    with progress.spinner(f"loading {model}"):
        tokenizer = load_tokenizer(source)
        policy = load_model(source, master_dtype(dtype), device)
    reference_source = None
    if options.reference is not None:
        reference_source = find_model(options.reference)
        require_same_tokens(tokenizer, reference_source)
    reader = PairTokenizer(tokenizer, options.max_length)
    with progress.bar("tokenising", len(pairs)) as advance:
        tokenized = reader.tokenize_all(pairs, advance)
    require_room(tokenized, positions(policy))
    kernels = choose_kernels(dtype, device)  # once, so that equal models give equal numbers
    policy_logps = _logps("policy", policy, tokenized, dtype, options, kernels)
    reference_logps = None
    if reference_source is not None:
        del policy  # one model in memory at a time
        with progress.spinner(f"loading {options.reference}"):
            reference = load_model(reference_source, master_dtype(dtype), device)
        reference_logps = _logps("reference", reference, tokenized, dtype, options, kernels)
    scores = pair_scores(tokenized, policy_logps, reference_logps)
    return Evaluation(scores, loaded, dict(reader.notes))


def _logps(
    title: str,
    model: PreTrainedModel,
    pairs: list[TokenizedPair],
    dtype: torch.dtype,
    options: EvaluateOptions,
    kernels: Kernels,
) -> PairLogps:
    choice = choose_engine(options.engine, model)
    with progress.bar(title, len(pairs)) as advance:
        if choice.name == "fast":
            cast(model.requires_grad_(False), dtype)
            return score(model, pairs, kernels, advance)
        engine = PlainEngine(
            model,
            None,
            compute_dtype=dtype,
            train_batch_size=options.batch_size,
            eval_batch_size=options.batch_size,
        )
        return engine.policy_logps(pairs, advance)
