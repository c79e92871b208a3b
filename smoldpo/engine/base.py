"""What an engine is to the trainer and to evaluation: pairs in, log-probabilities and gradients out.

The trainer sees an engine, not which one. A loss function takes the policy's and the reference's
log-probabilities of some pairs (each [pairs]) and returns one loss a pair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch

from smoldpo.types import Advance, PairLogps, TokenizedPair, no_progress

LossFunction = Callable[[PairLogps, PairLogps], torch.Tensor]


class Engine(Protocol):
    """Computes log π(y|x) of policy and reference, and the gradients of a loss of them."""

    budget: int
    """How much goes through the model at once, in `budget_unit`; no result depends on it but by rounding."""
    budget_unit: str

    def prepare(self, pairs: Sequence[TokenizedPair], advance: Advance = no_progress) -> None:
        """Do once what is the same in every epoch; called with every pair before the first update."""
        ...

    def policy_logps(
        self, pairs: Sequence[TokenizedPair], advance: Advance = no_progress
    ) -> PairLogps:
        """The policy's log-probabilities, float32 or wider on the CPU, without gradients."""
        ...

    def reference_logps(
        self, pairs: Sequence[TokenizedPair], advance: Advance = no_progress
    ) -> PairLogps:
        """The reference's log-probabilities; computed as the policy's are."""
        ...

    def accumulate_gradients(
        self, pairs: Sequence[TokenizedPair], loss: LossFunction, advance: Advance = no_progress
    ) -> tuple[torch.Tensor, PairLogps, PairLogps]:
        """Add the gradient of the mean loss over `pairs` (one optimizer step) to the parameters.

        Returns each pair's loss [pairs], and the log-probabilities under policy and reference.
        """
        ...

    def trainable_parameters(self) -> Iterable[tuple[str, torch.nn.Parameter]]:
        """Names, as in the model, and parameters for the optimizer (float32 or wider)."""
        ...

    def updated(self) -> None:
        """Called after each optimizer step."""
        ...

    def halve_budget(self, pairs: Sequence[TokenizedPair]) -> bool:
        """After memory ran out over these pairs; False where one pair at once is what did not fit.

        What a failed attempt left in gradients is dropped.
        """
        ...

    def disk_bytes(self, pairs: Sequence[TokenizedPair]) -> int:
        """Bytes that `prepare` over these pairs will write to disk."""
        ...

    def reference_sha256(self, pairs: Sequence[TokenizedPair]) -> str | None:
        """SHA-256 (hex) of the reference's log-probabilities, where they are kept."""
        ...


def join(parts: Sequence[PairLogps]) -> PairLogps:
    """Log-probabilities of consecutive batches as one."""
    return PairLogps(
        torch.cat([part.chosen for part in parts]), torch.cat([part.rejected for part in parts])
    )
