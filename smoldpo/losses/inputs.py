"""What a loss may read: log-probabilities of some pairs, and facts of the pairs themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from smoldpo.losses.divergences import Divergence, reverse_kl
from smoldpo.types import PairLogps, TokenizedPair


def betas(beta: float, pairs: Sequence[TokenizedPair], like: PairLogps) -> float | torch.Tensor:
    """β of each pair, [pairs], where some pairs have their own; else `beta`."""
    own = [pair.numbers.beta for pair in pairs]
    if all(each is None for each in own):
        return beta
    return like.chosen.new_tensor([beta if each is None else each for each in own])


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
    """How much further apart a pair's rewards must be; one a pair, or 0."""
    whole_chosen: torch.Tensor | None = None
    """log π(c|x) over all tokens of c, where `policy.chosen` is another: under `ld_alpha`."""
    liked: torch.Tensor | None = None
    """Of single answers (unpaired losses) whether people liked c; r then is another prompt's
    answer. None: pairs."""

    @classmethod
    def of(
        cls,
        policy: PairLogps,
        reference: PairLogps | None,
        pairs: Sequence[TokenizedPair],
        step: Sequence[TokenizedPair],
        beta: float,
        divergence: Divergence = reverse_kl,
        whole_chosen: torch.Tensor | None = None,
    ) -> LossInput:
        """From log-probabilities of `pairs`, which are some or all of the pairs of `step`."""
        numbers = policy.chosen.new_tensor
        margins = [pair.numbers.margin for pair in pairs]
        liked = [pair.numbers.liked for pair in pairs]
        return cls(
            policy,
            reference,
            numbers([pair.chosen_tokens for pair in pairs]),
            numbers([pair.rejected_tokens for pair in pairs]),
            betas(beta, pairs, policy),
            sum(pair.chosen_tokens for pair in step) / len(step),
            divergence,
            numbers(margins) if any(margins) else 0.0,
            whole_chosen,
            None if None in liked else torch.tensor(liked, device=policy.chosen.device),
        )

    @property
    def chosen_likelihood(self) -> torch.Tensor:
        """log π(c|x) over all tokens of c, for likelihood terms."""
        return self.policy.chosen if self.whole_chosen is None else self.whole_chosen

    @property
    def known_reference(self) -> PairLogps:
        """`reference`, by losses that compare with one."""
        if self.reference is None:
            raise ValueError("this loss compares with a reference, and none was given")
        return self.reference

    @property
    def chosen_ratio(self) -> torch.Tensor:
        """log π(c|x) - log π_ref(c|x)."""
        return self.policy.chosen - self.known_reference.chosen

    @property
    def rejected_ratio(self) -> torch.Tensor:
        """log π(r|x) - log π_ref(r|x)."""
        return self.policy.rejected - self.known_reference.rejected

    @property
    def scores(self) -> tuple[torch.Tensor, torch.Tensor]:
        """f'(π/π_ref) of chosen and rejected: the log-ratios themselves for reverse KL."""
        return self.divergence(self.chosen_ratio), self.divergence(self.rejected_ratio)

    @property
    def difference(self) -> torch.Tensor:
        """By how much chosen's score leads: DPO's logits."""
        chosen, rejected = self.scores
        return chosen - rejected

    @property
    def difference_per_token(self) -> torch.Tensor:
        """`difference`, with each score divided by its answer's tokens."""
        chosen, rejected = self.scores
        return chosen / self.chosen_tokens - rejected / self.rejected_tokens


def discount_tails(logps: PairLogps, ld_alpha: float) -> PairLogps:
    """LD-DPO, Liu et al. 2024 (https://arxiv.org/abs/2409.06411): the longer tail counts less.

    With n the tokens of the pair's shorter answer, log π(y|x) becomes Σ_{t ≤ n} log π(y_t) +
    α Σ_{t > n} log π(y_t), α = `ld_alpha` in [0, 1]: the whole sum less 1 - α of its tail.

    Raises:
        ValueError: log-probabilities without their tails.
    """
    if logps.chosen_tail is None or logps.rejected_tail is None:
        raise ValueError("ld_alpha needs the log-probabilities' tails, and none were given")
    left_out = 1 - ld_alpha
    return replace(
        logps,
        chosen=logps.chosen - left_out * logps.chosen_tail,
        rejected=logps.rejected - left_out * logps.rejected_tail,
    )


def pair_weights(
    policy: PairLogps, chosen_tokens: torch.Tensor, rejected_tokens: torch.Tensor
) -> torch.Tensor:
    """WPO, Zhou et al. 2024 (https://arxiv.org/abs/2406.11827): w(c) w(r), [pairs], detached.

    w(y) = exp of the mean over y's tokens of log π(y_t) - log Σ_v π(v)². Σ_v π(v)² is the
    probability that π gives on average to a token of its own, so w is near 1 for answers that π
    might give, and small for others. Not cut off above 1, as in TRL 1.16 and the paper's equation
    2.

    Raises:
        ValueError: log-probabilities without their squares.
    """
    if policy.chosen_squares is None or policy.rejected_squares is None:
        raise ValueError(
            "use_weighting needs Σ log Σ p² of the policy: make the engine with use_weighting"
        )
    chosen = (policy.chosen.detach() - policy.chosen_squares) / chosen_tokens
    rejected = (policy.rejected.detach() - policy.rejected_squares) / rejected_tokens
    return torch.exp(chosen + rejected)
