"""TR-DPO's moving reference: every so many steps it goes part of the way to the policy.

    θ_ref ← α θ + (1 - α) θ_ref    (Gorbatovski et al. 2024, arXiv 2404.09656, equation 6; α = 1 copies)

What the policy has frozen is equal in both and stays so: the fast engine keeps a second copy only of what
trains, in the optimizer's precision and in the computing one, and trunk states serve both. A reference that
was another model from the start moves in all of its weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from smoldpo.models.weights import copy_sharing
from smoldpo.utils.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class SyncedWeight(NamedTuple):
    """One weight of the reference and what it follows."""

    name: str
    source: torch.Tensor
    """The policy's."""
    wide: torch.Tensor
    """The reference's, in the optimizer's precision."""
    narrow: torch.Tensor
    """The one that computes; it may be `wide` itself."""


class SyncedReference:
    """A reference model and the weights of it that move.

    Attributes:
        model: it computes with the weights as they are now.
        syncs: how often it has moved; 0: it is what it was at the start.
    """

    def __init__(self, model: PreTrainedModel, weights: Sequence[SyncedWeight]):
        self.model = model.requires_grad_(False)
        self._weights = weights
        self.syncs = 0

    @property
    def bytes(self) -> int:
        """Bytes of what moves, as a checkpoint holds it."""
        return sum(weight.wide.numel() * weight.wide.element_size() for weight in self._weights)

    @torch.no_grad()
    def sync(self, alpha: float) -> None:
        """Go the share `alpha` of the way to the policy as it is now."""
        for _, source, wide, narrow in self._weights:
            wide.mul_(1.0 - alpha).add_(source.to(wide.dtype), alpha=alpha)
            if narrow is not wide:
                narrow.copy_(wide)
        self.syncs += 1

    def capture(self) -> dict[str, torch.Tensor]:
        """The weights that move, by name; none before the first move, for they are the start's."""
        if not self.syncs:
            return {}
        return {weight.name: weight.wide.detach().cpu().contiguous() for weight in self._weights}

    @torch.no_grad()
    def restore(self, saved: Mapping[str, torch.Tensor], syncs: int) -> None:
        """Become what was captured after so many moves."""
        self.syncs = syncs
        if syncs:
            for name, _, wide, narrow in self._weights:
                wide.copy_(saved[name])
                narrow.copy_(wide)


def synced_copy(
    policy: PreTrainedModel, masters: Iterable[tuple[str, torch.nn.Parameter]]
) -> SyncedReference:
    """A reference that is the policy as it is now: what trains is copied, what is frozen is the same tensors.

    Args:
        policy: in the computing precision, before an engine has changed its modules.
        masters: what trains, in the optimizer's precision.
    """
    sources, ours = dict(masters), dict(policy.named_parameters())
    model = copy_sharing(policy, {name: ours[name].detach().clone() for name in sources})
    parameters = dict(model.named_parameters())
    weights = []
    for name, source in sources.items():
        narrow = parameters[name]
        same = narrow.dtype == source.dtype
        wide = narrow if same else source.detach().clone()
        weights.append(SyncedWeight(name, source, wide, narrow))
    return SyncedReference(model, weights)


def synced_model(
    policy: PreTrainedModel,
    masters: Iterable[tuple[str, torch.nn.Parameter]],
    reference: PreTrainedModel,
    wide: Mapping[str, torch.Tensor],
    *,
    own: bool,
) -> SyncedReference:
    """A reference with a whole model of its own.

    Args:
        wide: its weights in the optimizer's precision, by name.
        own: it did not begin as the policy, so that what the policy has frozen moves as well.

    Raises:
        UsageError: its weights have other names or shapes than the policy's.
    """
    sources: dict[str, torch.Tensor] = dict(policy.named_parameters()) if own else {}
    sources |= dict(masters)
    ours, others = _shapes(policy), _shapes(reference)
    other = [name for name in ours | others if ours.get(name) != others.get(name)]
    if other:
        raise UsageError(
            "sync_ref_model mixes the policy's weights into the reference's, and these have other names or "
            f"shapes: {', '.join(sorted(other)[:3])}; take a reference of the same architecture and size"
        )
    theirs = dict(reference.named_parameters())
    weights = [
        SyncedWeight(name, source, wide[name], theirs[name]) for name, source in sources.items()
    ]
    return SyncedReference(reference, weights)


def _shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
