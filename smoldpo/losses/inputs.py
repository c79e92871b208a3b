"""What a loss may read: log-probabilities of some pairs, and what is known of the pairs themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from smoldpo.losses.divergences import Divergence, reverse_kl
from smoldpo.types import PairLogps, TokenizedPair


@dataclass(frozen=True)
class LossInput:
    """Pairs as a loss sees them: every tensor is [pairs], log-probabilities are in nats.

    In formulas: π policy, π_ref reference, c chosen, r rejected, |y| scored tokens of an answer.
    """

    policy: PairLogps
    reference: PairLogps | None
    """None for losses that compare with none."""
    chosen_tokens: torch.Tensor
    rejected_tokens: torch.Tensor
    beta: float | torch.Tensor
    """One β, or one a pair."""
    mean_chosen_tokens: float
    """|c| averaged over the pairs of the whole step, of which these may be a part."""
    divergence: Divergence = reverse_kl
    margin: float | torch.Tensor = 0.0
    """How much further apart a pair's rewards must be; one a pair, or none."""

    @classmethod
    def of(
        cls,
        policy: PairLogps,
        reference: PairLogps | None,
        pairs: Sequence[TokenizedPair],
        step: Sequence[TokenizedPair],
        beta: float,
        divergence: Divergence = reverse_kl,
    ) -> LossInput:
        """From log-probabilities of `pairs`, which are some or all of the pairs of `step`."""
        return cls(
            policy,
            reference,
            policy.chosen.new_tensor([len(pair.chosen_ids) for pair in pairs]),
            policy.chosen.new_tensor([len(pair.rejected_ids) for pair in pairs]),
            beta,
            sum(len(pair.chosen_ids) for pair in step) / len(step),
            divergence,
        )

    @property
    def chosen_ratio(self) -> torch.Tensor:
        """log π(c|x) - log π_ref(c|x)."""
        return self.policy.chosen - self._reference.chosen

    @property
    def rejected_ratio(self) -> torch.Tensor:
        """log π(r|x) - log π_ref(r|x)."""
        return self.policy.rejected - self._reference.rejected

    @property
    def chosen_score(self) -> torch.Tensor:
        """f'(π/π_ref) of chosen: the log-ratio itself for the usual reverse KL."""
        return self.divergence(self.chosen_ratio)

    @property
    def rejected_score(self) -> torch.Tensor:
        """f'(π/π_ref) of rejected."""
        return self.divergence(self.rejected_ratio)

    @property
    def difference(self) -> torch.Tensor:
        """By how much chosen's score leads: DPO's logits."""
        return self.chosen_score - self.rejected_score

    @property
    def difference_per_token(self) -> torch.Tensor:
        """The same with each score divided by the answer's tokens."""
        return self.chosen_score / self.chosen_tokens - self.rejected_score / self.rejected_tokens

    @property
    def _reference(self) -> PairLogps:
        if self.reference is None:
            raise ValueError("this loss compares with a reference, and none was given")
        return self.reference
