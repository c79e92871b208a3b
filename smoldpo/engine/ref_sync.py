"""TR-DPO's synchronised reference: every so many steps it goes part of the way to the policy.

    θ_ref ← α θ + (1 - α) θ_ref    (Gorbatovski et al. 2024, arXiv 2404.09656, eq. 6; α = 1 copies)

What the policy has frozen is equal in both and stays so: the fast engine keeps a second copy only
of what trains, in the optimizer's precision and in the computing one, and trunk states serve both.
A reference that was another model from the start moves in all of its weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from smoldpo.models.weights import copy_sharing
from smoldpo.utils.errors import UsageError


class SyncedWeight(NamedTuple):
    """One weight of the reference, and the policy's that it follows."""

    name: str
    source: torch.Tensor
    """The policy's."""
    master: torch.Tensor
    """The reference's, in the optimizer's precision."""
    compute: torch.Tensor
    """The reference's that computes; it may be `master` itself."""


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
        return sum(weight.master.nbytes for weight in self._weights)

    @torch.no_grad()
    def sync(self, alpha: float) -> None:
        """Go the share `alpha` of the way to the policy as it is now."""
        for _, source, master, compute in self._weights:
            master.mul_(1.0 - alpha).add_(source.to(master.dtype), alpha=alpha)
            if compute is not master:
                compute.copy_(master)
        self.syncs += 1

    def capture(self) -> dict[str, torch.Tensor]:
        """The weights that move, by name; none before the first move, for they are the start's."""
        weights = self._weights if self.syncs else ()
        return {each.name: each.master.detach().cpu().contiguous() for each in weights}

    @torch.no_grad()
    def restore(self, saved: Mapping[str, torch.Tensor], syncs: int) -> None:
        """Become what was captured after so many moves."""
        self.syncs = syncs
        for name, _, master, compute in self._weights if syncs else ():
            master.copy_(saved[name])
            compute.copy_(master)


def synced_copy(
    policy: PreTrainedModel, masters: Iterable[tuple[str, torch.nn.Parameter]]
) -> SyncedReference:
    """A reference that is the policy as it is now: what trains is copied, what is frozen is shared.

    Args:
        policy: in the computing precision, before an engine has changed its modules.
        masters: what trains, in the optimizer's precision.
    """
    sources, ours = dict(masters), dict(policy.named_parameters())
    model = copy_sharing(policy, {name: ours[name].detach().clone() for name in sources})
    theirs = dict(model.named_parameters())
    weights = []
    for name, source in sources.items():
        compute: torch.Tensor = theirs[name]
        master = compute if compute.dtype == source.dtype else source.detach().clone()
        weights.append(SyncedWeight(name, source, master, compute))
    return SyncedReference(model, weights)


def synced_model(
    policy: PreTrainedModel,
    masters: Iterable[tuple[str, torch.nn.Parameter]],
    reference: PreTrainedModel,
    reference_masters: Mapping[str, torch.Tensor],
    *,
    own: bool,
) -> SyncedReference:
    """A reference with a whole model of its own.

    Args:
        masters: what trains of the policy, in the optimizer's precision.
        reference_masters: all of the reference's weights in that precision, by name.
        own: it did not begin as the policy, so that what the policy has frozen moves as well.

    Raises:
        UsageError: its weights have other names or shapes than the policy's.
    """
    sources: dict[str, torch.Tensor] = dict(policy.named_parameters()) if own else {}
    sources |= dict(masters)
    ours, theirs = dict(policy.named_parameters()), dict(reference.named_parameters())
    shapes, others = ({n: p.shape for n, p in each.items()} for each in (ours, theirs))
    differing = sorted(n for n in shapes | others if shapes.get(n) != others.get(n))
    if differing:
        raise UsageError(
            "sync_ref_model mixes the policy's weights into the reference's, and these have other "
            f"names or shapes: {', '.join(differing[:3])}; take a reference of the same "
            "architecture and size"
        )
    return SyncedReference(
        reference,
        [SyncedWeight(n, sources[n], reference_masters[n], theirs[n]) for n in sources],
    )
