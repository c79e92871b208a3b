"""Model families that the fast engine is held against the plain one on."""

from __future__ import annotations

from transformers import PreTrainedModel

FAMILIES = {"llama", "smollm3", "qwen2", "qwen3", "mistral"}
"""Model types for which the fast engine is held against the plain one (tests/equivalence)."""


def unsupported(model: PreTrainedModel) -> str | None:
    """Why the fast engine cannot run this model, or None."""
    kind = model.config.model_type
    if kind not in FAMILIES:
        return f"the fast engine is not proven on models of type {kind!r}"
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        return "its LM head has a bias"
    return None
