"""The floor: how many floating-point operations the loss needs, and no fewer.

For a pair of p prompt and c completion tokens (both sides together), N_b parameters in layers below the
freeze boundary, N_t above it, of which N_w train, N_h in the LM head; a product forward takes 2 operations a
parameter and token, backward 4 where the weights train and 2 where they do not:

    once a pair     trunk 2 (p + c) N_b,  reference 2 (p + c) N_t + 2 c N_h
    every epoch     (p + c) (4 N_t + 2 N_w) + 4 c N_h, or 6 c N_h where the head trains

Adapters count as parameters above the boundary that train, in the reference's pass too, where they are off:
they are few.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from smoldpo.engine.trunk import boundary


@dataclass(frozen=True)
class Parameters:
    """Parameters in matrix products, by what runs through them."""

    below: int
    above: int
    above_trains: int
    """Of those above, the ones whose gradients are formed."""
    head: int
    head_trains: bool

    @classmethod
    def of(cls, model: PreTrainedModel) -> Parameters:
        """Counted from a model with `requires_grad` set."""
        at = boundary(model)
        layers = [[p for p in layer.parameters() if p.ndim >= 2] for layer in model.model.layers]
        sizes = [sum(p.numel() for p in layer) for layer in layers]
        trains = sum(p.numel() for layer in layers for p in layer if p.requires_grad)
        head = model.get_output_embeddings().weight
        return cls(sum(sizes[:at]), sum(sizes[at:]), trains, head.numel(), head.requires_grad)

    def once(self, prompt_tokens: float, completion_tokens: float) -> float:
        """Operations of trunk and reference over so many tokens."""
        tokens = prompt_tokens + completion_tokens
        return 2 * tokens * (self.below + self.above) + 2 * completion_tokens * self.head

    def epoch(self, prompt_tokens: float, completion_tokens: float) -> float:
        """Operations of one epoch of the policy over so many tokens."""
        tokens = prompt_tokens + completion_tokens
        passes = 6 if self.head_trains else 4
        inside = 4 * self.above + 2 * self.above_trains
        return tokens * inside + passes * completion_tokens * self.head
