"""What an engine is to the trainer and to evaluation: pairs in, log-probabilities and gradients out.

The trainer sees an engine, not which one; an engine sees a loss function, not which one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from smoldpo.types import Advance, PairLogps, TokenizedPair, no_progress

if TYPE_CHECKING:
    from smoldpo.engine.ref_sync import SyncedReference


class LossFunction(Protocol):
    """A loss of log-probabilities, as losses.Objective is."""

    @property
    def needs_reference(self) -> bool:
        """Whether it compares with a reference; where not, none is run."""
        ...

    @property
    def whole_step(self) -> bool:
        """Whether it is no sum over pairs, and must see all pairs of a step at once."""
        ...

    def __call__(
        self,
        policy: PairLogps,
        reference: PairLogps | None,
        pairs: Sequence[TokenizedPair],
        step: Sequence[TokenizedPair],
    ) -> torch.Tensor:
        """One loss a pair, [pairs], whose mean over `step` is the step's loss.

        Args:
            policy, reference: log-probabilities of `pairs`.
            pairs: some of the pairs of `step`; all of them for a `whole_step` loss.
        """
        ...


class StepResult(NamedTuple):
    """What one optimizer step found: losses [pairs], and log-probabilities without gradients."""

    losses: torch.Tensor
    policy: PairLogps
    reference: PairLogps | None


class Engine(Protocol):
    """Computes log π(y|x) of policy and reference, and the gradients of a loss of them."""

    budget: int
    """How much goes through the model at once, in `budget_unit`; no result depends on it but by rounding."""
    budget_unit: str
    synced_reference: SyncedReference | None
    """The reference, where it moves during training (sync_ref_model). Once it has moved, steps compute its
    log-probabilities anew, and those kept from its start serve evaluation alone."""

    @property
    def policy(self) -> torch.nn.Module:
        """As it computes."""
        ...

    def prepare(self, pairs: Sequence[TokenizedPair], advance: Advance = no_progress) -> None:
        """Do once what is the same in every epoch; called with every pair before the first update."""
        ...

    def release_frozen(self, rest: bool = False) -> int:
        """After `prepare` of every pair: let go of weights that neither steps nor evaluation will read.

        Their values stay, in the file that they come from, and are back when something reads them. Returns
        the bytes of memory that were let go.

        Args:
            rest: of all that do not train, for a while in which the engine does nothing.
        """
        ...

    def policy_logps(
        self, pairs: Sequence[TokenizedPair], advance: Advance = no_progress
    ) -> PairLogps:
        """The policy's log-probabilities, float32 or wider on the CPU, without gradients."""
        ...

    def reference_logps(
        self, pairs: Sequence[TokenizedPair], advance: Advance = no_progress
    ) -> PairLogps:
        """The reference's log-probabilities, as it was at the start; computed as the policy's are.

        Raises:
            RuntimeError: the engine was made without a reference, or keeps none of a start that is gone.
        """
        ...

    def accumulate_gradients(
        self, pairs: Sequence[TokenizedPair], loss: LossFunction, advance: Advance = no_progress
    ) -> StepResult:
        """Add the gradient of the mean loss over `pairs` (one optimizer step) to the parameters.

        Returns each pair's loss [pairs], and the log-probabilities under policy and reference, the latter
        None for a loss that compares with none.
        """
        ...

    def trainable_parameters(self) -> Iterable[tuple[str, torch.nn.Parameter]]:
        """Names, as in the model, and parameters for the optimizer (float32 or wider)."""
        ...

    def updated(self) -> None:
        """Called after each optimizer step."""
        ...

    def drop_gradients(self) -> None:
        """Forget the parameters' gradients, a failed attempt's too, and give back their memory."""
        ...

    def halve_budget(self, pairs: Sequence[TokenizedPair]) -> bool:
        """After memory ran out over these pairs; False where one pair at once is what did not fit.

        Gradients are dropped.
        """
        ...

    def backward_bytes(
        self, pairs: Sequence[TokenizedPair], pairs_per_step: int
    ) -> tuple[int, int]:
        """Bytes kept for a backward pass over the longest pair alone, and over as many at once as the budget
        allows; measured by a forward pass. Called after `prepare`.
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
    columns = {name: [vars(part)[name] for part in parts] for name in vars(parts[0])}
    return PairLogps(
        **{
            name: None if any(each is None for each in column) else torch.cat(column)
            for name, column in columns.items()
        }
    )


def ordered(parts: Sequence[PairLogps], order: Sequence[int]) -> PairLogps:
    """As one, in the pairs' own order: row n of the parts together belongs to pair order[n]."""
    back = torch.empty(len(order), dtype=torch.long)
    back[torch.tensor(order)] = torch.arange(len(order))
    return join(parts).map(lambda each: each[back])
