"""The interface of an engine: pairs in, log-probabilities and gradients out.

The trainer sees an engine, not which one; an engine sees a loss function, not which one.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from smoldpo.engine.batching import STREAM_TOKENS, Batching, saved_for_backward
from smoldpo.engine.dealing import deal
from smoldpo.types import Advance, PairLogps, TokenizedPair, no_progress
from smoldpo.utils.distributed import ALONE, Ranks
from smoldpo.utils.workers import Workers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from smoldpo.engine.autotune import KernelChoice
    from smoldpo.engine.ref_sync import SyncedReference


class LossFunction(Protocol):
    """A loss of log-probabilities, as losses.Objective is."""

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with a reference; where not, none is run."""
        ...

    @property
    def whole_step(self) -> bool:
        """Whether the loss is no sum over pairs, and must see all pairs of a step at once."""
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
    """None for a loss that compares with no reference."""


@dataclass(frozen=True)
class EngineSettings:
    """Everything an engine is told besides its models; see the settings in config/schema.py."""

    compute_dtype: torch.dtype = torch.float32
    train_batch_size: int = 8
    eval_batch_size: int = 8
    stream_tokens: int = STREAM_TOKENS
    cache: str = "memory"
    """auto, disk, memory or off."""
    cache_bytes: float = 0.0
    """Limit of the cache on disk."""
    compiled: bool = False
    kernels: KernelChoice | None = None
    """None: those that are faster here, by measuring."""
    needs_reference: bool = True
    """False for losses that compare with no reference: none is made or run."""
    use_weighting: bool = False
    """Whether the policy's squares (types.PairLogps) are wanted."""
    sync_ref_model: bool = False
    """Whether the reference moves during training (ref_sync.py)."""
    engine: str = "fast"
    """fast or plain."""
    ordered_sum: bool = True
    """Whether several ranks add gradients in the streams' order (gradient_sum.py)."""
    fsdp: bool = False
    """Whether each of several ranks keeps a share of every weight (sharding.py)."""


class Engine(ABC):
    """Computes log π(y|x) of policy and reference, and the gradients of a loss of them.

    Several ranks, each with such an engine, compute together: what goes through models is dealt to
    them, and each has all results. So each must call the same methods with the same pairs.
    """

    policy: PreTrainedModel
    """As it computes."""
    reference: PreTrainedModel | None
    """As it computes; None where there is none, or only as the policy's start."""
    batching: Batching
    """The batches that pairs are computed in; results depend on them by rounding alone."""
    workers: Workers
    """What computes several batches at once."""
    ranks: Ranks
    """Those that compute with this process."""
    synced_reference: SyncedReference | None
    """The reference, where it moves during training (sync_ref_model). After its first move, steps
    compute its log-probabilities anew; those of its start serve evaluation alone."""

    @property
    def device(self) -> torch.device:
        return self.policy.device

    @property
    def budget(self) -> int:
        """How much goes through the model at once, in `batching.unit`."""
        return self.batching.budget

    @budget.setter
    def budget(self, budget: int) -> None:
        self.batching = replace(self.batching, budget=budget)

    @abstractmethod
    def prepare(self, pairs: Sequence[TokenizedPair], advance: Advance = no_progress) -> None:
        """Compute once what is the same in every epoch. To be called before the first update."""

    @abstractmethod
    def release_frozen(self, rest: bool = False) -> int:
        """After `prepare` of all pairs: free the weights that neither steps nor evaluation read.

        Their values come back from their file when they are read. Returns the bytes released.

        Args:
            rest: all frozen weights, before a time in which the engine does nothing.
        """

    @abstractmethod
    def policy_logps(
        self, pairs: Sequence[TokenizedPair], advance: Advance = no_progress
    ) -> PairLogps:
        """The policy's log-probabilities, float32 or wider on the CPU, without gradients."""

    @abstractmethod
    def reference_logps(
        self, pairs: Sequence[TokenizedPair], advance: Advance = no_progress
    ) -> PairLogps:
        """The reference's log-probabilities, as it was at the start; computed as the policy's are.

        Raises:
            RuntimeError: the engine has no reference, or the reference's start is gone and these
                pairs were not prepared.
        """

    @abstractmethod
    def accumulate_gradients(
        self, pairs: Sequence[TokenizedPair], loss: LossFunction, advance: Advance = no_progress
    ) -> StepResult:
        """Add the gradient of the mean loss over `pairs` (one optimizer step) to the parameters."""

    @abstractmethod
    def trainable_parameters(self) -> Iterable[tuple[str, torch.nn.Parameter]]:
        """Names, as in the model, and parameters for the optimizer (float32 or wider)."""

    @abstractmethod
    def updated(self) -> None:
        """To be called after each optimizer step."""

    @abstractmethod
    def drop_gradients(self) -> None:
        """Free the parameters' gradients, a failed attempt's too."""

    @abstractmethod
    def _forward_policy(self, pairs: Sequence[TokenizedPair]) -> PairLogps:
        """The policy's log-probabilities of one batch, with gradients where these are on."""

    def compute_fewer_at_once(self, pairs: Sequence[TokenizedPair]) -> bool:
        """Drop gradients; then half as many streams of `pairs` at once. False where it was one.

        No result changes.
        """
        self.drop_gradients()
        at_once = min(self.workers.count, len(self.batching.step_batches(pairs)))
        self.workers.lower(max(1, at_once // 2))
        return at_once > 1

    def halve_budget(self, pairs: Sequence[TokenizedPair]) -> bool:
        """Drop gradients and halve the budget; False where all batches of `pairs` held one pair."""
        self.drop_gradients()
        smaller = self.batching.halved(pairs)
        self.batching = smaller or self.batching
        return smaller is not None

    def backward_bytes(
        self, pairs: Sequence[TokenizedPair], pairs_per_step: int
    ) -> tuple[int, int]:
        """Bytes kept for a backward pass over the longest pair, and over all batches at once.

        Measured by a forward pass. To be called after `prepare`.
        """
        longest = self.batching.longest(pairs)
        one = saved_for_backward(lambda: self._forward_policy([longest]), self.policy.parameters())
        at_once = self.workers.count
        return one, self.batching.backward_bytes(one, longest, pairs_per_step, at_once)

    def disk_bytes(self, pairs: Sequence[TokenizedPair]) -> int:
        """Bytes that `prepare` of these pairs will write to disk."""
        return 0

    def reference_sha256(self, pairs: Sequence[TokenizedPair]) -> str | None:
        """SHA-256 (hex) of the reference's log-probabilities, where they are stored."""
        return None


@contextlib.contextmanager
def naming(pairs: Sequence[TokenizedPair]) -> Iterator[None]:
    """An error in the block gets a note of the pairs that were computed."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in a stream of the pairs {', '.join(pair.id for pair in pairs)}")
        raise


def join(parts: Sequence[PairLogps]) -> PairLogps:
    """Log-probabilities of consecutive batches as one."""
    columns = {name: [vars(part)[name] for part in parts] for name in vars(parts[0])}
    known = {name: c for name, c in columns.items() if all(each is not None for each in c)}
    return PairLogps(**{name: torch.cat(column) for name, column in known.items()})


def batched_logps(
    pairs: Sequence[TokenizedPair],
    batching: Batching,
    logps_of: Callable[[int, Sequence[TokenizedPair]], PairLogps],
    advance: Advance,
    workers: Workers | None = None,
    ranks: Ranks = ALONE,
    in_step: bool = False,
) -> PairLogps:
    """Log-probabilities of `pairs`, batch by batch; the results are in the pairs' own order.

    Args:
        logps_of: called with the number of a worker and the pairs of a batch.
        in_step: all ranks call it equally often (dealing.py).
    """
    order = batching.indices(pairs)
    batches = [[pairs[index] for index in indices] for indices in order]

    def named(worker: int, batch: Sequence[TokenizedPair]) -> PairLogps:
        with naming(batch):
            return logps_of(worker, batch)

    def finished(batch: Sequence[TokenizedPair]) -> None:
        advance(len(batch))

    parts = deal(
        ranks,
        workers or Workers(1),
        named,
        batches,
        finished,
        idle=(lambda: named(0, batches[0])) if in_step else None,
    )
    flat = torch.tensor([index for indices in order for index in indices], dtype=torch.long)
    back = torch.empty_like(flat)
    back[flat] = torch.arange(len(flat))
    return join(parts).map(lambda each: each[back])
