"""What a run minimises: one loss or a weighted sum, with the pairs' own numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from smoldpo.config.losses import FACTS, needs_reference
from smoldpo.losses import pairwise
from smoldpo.losses.divergences import Divergence, divergence, reverse_kl
from smoldpo.losses.inputs import LossInput, discount_tails, pair_weights
from smoldpo.types import PairLogps, TokenizedPair

Loss = Callable[..., torch.Tensor]

LOSSES: dict[str, Loss] = {name: getattr(pairwise, f"{name}_loss") for name in FACTS}
"""Functions of a LossInput, and of the options that FACTS lists under the same name."""


@dataclass(frozen=True)
class Objective:
    """Σ weight · loss, and what an engine must know to compute its gradients (engine/base.py)."""

    terms: tuple[tuple[Loss, float], ...]
    beta: float
    needs_reference: bool
    whole_step: bool
    """Whether the losses need the log-probabilities of a whole step at once."""
    divergence: Divergence = reverse_kl
    ld_alpha: float | None = None
    use_weighting: bool = False

    @classmethod
    def of(
        cls,
        names: Sequence[str] = ("sigmoid",),
        weights: Sequence[float] = (),
        *,
        beta: float,
        options: Mapping[str, Any] | None = None,
        rpo_alpha: float | None = None,
        f_divergence_type: str = "reverse_kl",
        f_alpha_divergence_coef: float = 0.5,
        ld_alpha: float | None = None,
        use_weighting: bool = False,
    ) -> Objective:
        """The sum of the named losses.

        Args:
            weights: one a name; by default 1 each, as in TRL.
            options: values of config.losses.OPTIONS; each loss takes its own, the others are left.
            rpo_alpha: weight of RPO's likelihood term, if there is one.
            ld_alpha: weight of the tokens by which the longer answer is longer (LD-DPO), in [0, 1].
            use_weighting: weigh each pair by how likely the policy itself finds its answers (WPO).
        """
        known = options or {}
        terms: list[tuple[Loss, float]] = []
        for name, weight in zip(names, weights or [1.0] * len(names), strict=True):
            own = {key: known[key] for key in FACTS[name].options if key in known}
            terms.append((partial(LOSSES[name], **own), weight))
        if rpo_alpha:
            terms.append((pairwise.nll_per_answer, rpo_alpha))
        return cls(
            tuple(terms),
            beta,
            needs_reference(names),
            any(FACTS[name].whole_step for name in names),
            divergence(f_divergence_type, f_alpha_divergence_coef),
            ld_alpha,
            use_weighting,
        )

    def logps_for_loss(self, logps: PairLogps) -> PairLogps:
        """Log-probabilities as the losses compare them, of policy and reference: see `ld_alpha`.

        Likelihood terms alone take the whole sums.
        """
        return logps if self.ld_alpha is None else discount_tails(logps, self.ld_alpha)

    def __call__(
        self,
        policy: PairLogps,
        reference: PairLogps | None,
        pairs: Sequence[TokenizedPair],
        step: Sequence[TokenizedPair],
    ) -> torch.Tensor:
        """One loss a pair, [pairs]; the arguments are those of engine/base.py."""
        inputs = LossInput.of(
            self.logps_for_loss(policy),
            None if reference is None else self.logps_for_loss(reference),
            pairs,
            step,
            self.beta,
            self.divergence,
            whole_chosen=policy.chosen,
        )
        losses = self.of_input(inputs)
        if self.use_weighting:
            losses = losses * pair_weights(policy, inputs.chosen_tokens, inputs.rejected_tokens)
        weights = [pair.numbers.weight for pair in pairs]
        return losses if all(w == 1 for w in weights) else losses * losses.new_tensor(weights)

    def of_input(self, inputs: LossInput) -> torch.Tensor:
        """The weighted sum for what is given, [pairs]; pairs' own weights are not in it."""
        return torch.stack([weight * loss(inputs) for loss, weight in self.terms]).sum(0)
