"""dpo_loss: every loss of docs/losses.md as a function of log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from smoldpo.config.load import build_config
from smoldpo.config.losses import FACTS, OPTIONS
from smoldpo.losses import LossInput
from smoldpo.training.loop import loss_function
from smoldpo.types import PairLogps
from smoldpo.utils.errors import ConfigError, UsageError, nearest

KNOWN = (
    *OPTIONS,
    "loss_weights",
    "rpo_alpha",
    "f_divergence_type",
    "f_alpha_divergence_coef",
)
"""Settings that are the loss's own: all but those of a schedule or of a reference that moves."""
OF_TOKENS = {
    "ld_alpha": "call smoldpo.losses.Objective on what sequence_logps gives",
    "use_weighting": "train with smoldpo.train",
}
"""Settings that read more of an answer than its sum, and what to do instead."""


class _NotGiven:
    """Stands where the answers' lengths would; a loss that computes with it says so."""

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        raise UsageError(
            "this loss is per token: give chosen_tokens and rejected_tokens, the number of scored "
            "tokens of each answer"
        )


def dpo_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor | None = None,
    reference_rejected_logps: torch.Tensor | None = None,
    beta: float | torch.Tensor = 0.1,
    loss_type: str | Sequence[str] = "sigmoid",
    *,
    chosen_tokens: torch.Tensor | None = None,
    rejected_tokens: torch.Tensor | None = None,
    margin: torch.Tensor | None = None,
    liked: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """Loss of each pair, [pairs], with its gradient; by default DPO's (Rafailov et al. 2023).

        -log σ(β [(log π(c|x) - log π(r|x)) - (log π_ref(c|x) - log π_ref(r|x))])

    The step's loss is the mean of what is returned. The arguments are the whole step: losses that
    sort (aot), or that average over all its tokens (sft), have no meaning over a part of it.

    Args:
        policy_chosen_logps, policy_rejected_logps: log π(y|x) in nats, summed over each answer,
            [pairs].
        reference_chosen_logps, reference_rejected_logps: the same of the reference; left out for
            losses that compare with none (simpo, cpo, orpo, sft).
        beta: one β, or one a pair [pairs].
        loss_type: a name, or several that are added up (docs/losses.md).
        chosen_tokens, rejected_tokens: scored tokens of each answer [pairs], for losses per token.
        margin: how much further apart a pair's rewards must be [pairs], for losses that know one.
        liked: for kto and apo_zero_unpaired, whether people liked each answer, bool [answers]. The
            rejected log-probabilities then are those of other prompts' answers, for kto's KL term.
        options: loss_weights, label_smoothing, rpo_alpha, f_divergence_type, and the other settings
            of the loss, by their names in `smoldpo train --help`.

    Raises:
        ConfigError: options that do not exist, that this loss does not read, or that contradict
            each other.
        UsageError: a tensor that is missing, that this loss has no use for, or of another shape.
    """
    names = [loss_type] if isinstance(loss_type, str) else list(loss_type)
    unknown = [
        f"{key} reads more of an answer than its log-probability: {OF_TOKENS[key]}"
        if key in OF_TOKENS
        else f"unknown option {key!r}{nearest(key, KNOWN)}"
        for key in options
        if key not in KNOWN
    ]
    if unknown:
        raise ConfigError(unknown)
    scalar = {} if isinstance(beta, torch.Tensor) else {"beta": beta}
    config = build_config({"loss_type": names} | scalar | options)
    given = {
        "policy_rejected_logps": policy_rejected_logps,
        "reference_chosen_logps": reference_chosen_logps,
        "reference_rejected_logps": reference_rejected_logps,
        "chosen_tokens": chosen_tokens,
        "rejected_tokens": rejected_tokens,
        "margin": margin,
        "beta": beta if isinstance(beta, torch.Tensor) else None,
        "liked": liked,
    }
    _check_shapes(policy_chosen_logps, given)
    objective = loss_function(config, config.beta)
    _check_use(config.loss_type, objective.needs_reference, given)
    reference = None
    if reference_chosen_logps is not None and reference_rejected_logps is not None:
        reference = PairLogps(reference_chosen_logps, reference_rejected_logps)
    lengths: tuple[Any, Any, Any] = (_NotGiven(), _NotGiven(), _NotGiven())
    if chosen_tokens is not None and rejected_tokens is not None:
        chosen, rejected = (n.to(policy_chosen_logps) for n in (chosen_tokens, rejected_tokens))
        lengths = (chosen, rejected, chosen.mean().item())
    return objective.of_input(
        LossInput(
            PairLogps(policy_chosen_logps, policy_rejected_logps),
            reference,
            *lengths[:2],
            beta,
            lengths[2],
            objective.divergence,
            0.0 if margin is None else margin,
            liked=liked,
        )
    )


def _check_shapes(first: torch.Tensor, given: dict[str, torch.Tensor | None]) -> None:
    if not isinstance(first, torch.Tensor) or first.ndim != 1 or not len(first):
        raise UsageError("policy_chosen_logps must be a tensor of shape [pairs], one number a pair")
    for name, tensor in given.items():
        if tensor is not None and getattr(tensor, "shape", None) != first.shape:
            shape = (
                list(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            )
            raise UsageError(
                f"{name} is {shape}, and policy_chosen_logps {list(first.shape)}: all must be "
                "[pairs]"
            )


def _check_use(
    names: Sequence[str], needs_reference: bool, given: dict[str, torch.Tensor | None]
) -> None:
    reference = [name for name in given if name.startswith("reference")]
    listed = " and ".join(names)
    if needs_reference and any(given[name] is None for name in reference):
        raise UsageError(f"{listed} compares with a reference: give {' and '.join(reference)}")
    if not needs_reference and any(given[name] is not None for name in reference):
        raise UsageError(
            f"{listed} compares with no reference: leave {' and '.join(reference)} out"
        )
    if (given["chosen_tokens"] is None) != (given["rejected_tokens"] is None):
        raise UsageError("give both chosen_tokens and rejected_tokens, or neither")
    if given["margin"] is not None and not any(FACTS[name].margin for name in names):
        fit = ", ".join(name for name, facts in FACTS.items() if facts.margin)
        raise UsageError(f"margin has no part in {listed}; it goes with {fit}")
    if given["liked"] is not None and not any(FACTS[name].unpaired for name in names):
        raise UsageError(f"liked has no part in {listed}, which takes pairs")
    if given["beta"] is not None and not any(FACTS[name].beta for name in names):
        raise UsageError(f"beta has no part in {listed}")
    if any(FACTS[name].whole_step for name in names) and (
        given["margin"] is not None or given["beta"] is not None
    ):
        raise UsageError(f"{listed} sorts the pairs, so none can have a margin or beta of its own")
