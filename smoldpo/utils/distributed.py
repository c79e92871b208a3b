"""Ranks: processes that compute one run together, as torchrun starts them; one process is one rank.

Every rank runs the same program over the same pairs, and computes its share of the streams. Where
ranks meet, they exchange how each fared: what fails or is told to stop on one ends, or is done
again, on all. One process needs none of this: its `Ranks` do nothing.

This file is free of torch; several ranks are in rank_group.py.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from smoldpo.utils import progress
from smoldpo.utils.errors import SmoldpoError, UsageError

if TYPE_CHECKING:
    import torch


class RankLostError(SmoldpoError):
    """Another rank has gone: it was killed, or its machine is out of reach."""


class PeerFailedError(SmoldpoError):
    """What ended another rank, for those that end with it; with that rank's exit code."""

    def __init__(self, text: str, exit_code: int):
        super().__init__(text)
        self.exit_code = exit_code


class Ranks:
    """This process among its ranks; as it is here, the only one.

    Attributes:
        rank, size: this process's number, from 0, and how many there are.
        local_rank, local_size: the same on this machine.
        agreed: the failure that ends this process is known to the first rank, which says it.
    """

    rank, size, local_rank, local_size = 0, 1, 0, 1
    agreed = False

    @property
    def first(self) -> bool:
        """Whether this process writes the run folder, and speaks."""
        return self.rank == 0

    @property
    def apart(self) -> bool:
        """Whether this process may stop here by itself, because no rank waits for it."""
        return True

    def share(self, work: Callable[[], Any], tied: bool = False) -> list[Any]:
        """What `work` gives on each rank, as JSON has it, by rank; the ranks meet at its end.

        Args:
            tied: ranks need each other within `work` too; so none stops within it by itself, and
                where it fails on one, that rank can but end, which ends the others.

        Raises:
            Exception: where it fails or is stopped on one rank, on all: an error of memory as an
                OutOfMemoryError, a signal as InterruptedRunError, others as PeerFailedError.
            RankLostError: a rank has gone.
        """
        return [work()]

    def of_first(self, work: Callable[[], Any]) -> Any:
        """What `work` gives on the first rank, as JSON has it; the others do not call it."""
        return self.share(lambda: work() if self.first else None)[0]

    def on_first(self, work: Callable[[], object]) -> None:
        """Do `work` on the first rank; the others wait for it. Raises as `share`."""
        self.share(lambda: self.first and bool(work()))

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The tensor of each rank, by rank; all have one shape.

        Raises:
            RankLostError: a rank has gone.
        """
        return [tensor]

    def add(self, tensor: torch.Tensor) -> None:
        """Add the tensors of all ranks, in any order, into each of them. Raises as `gather`."""

    def send_parts(
        self, out: torch.Tensor, tensor: torch.Tensor, received: Sequence[int], sent: Sequence[int]
    ) -> None:
        """Each rank sends a part of `tensor` to each; what comes fills `out`, by rank.

        Args:
            received, sent: lengths of the parts.

        Raises:
            RankLostError: a rank has gone.
        """
        out.copy_(tensor)

    def stopped_by(self, check: Callable[[], None]) -> None:
        """`check` raises where this process has been told to stop; asked when ranks meet."""

    def fail(self, error: BaseException) -> None:
        """Tell the others, wherever they meet next, that this process ends."""

    def close(self) -> None:
        """Leave the other ranks."""


ALONE = Ranks()
_world: Ranks = ALONE
_silent_end = False


def world() -> Ranks:
    """The ranks of this process: within rank_group.joined those that torchrun started, else itself
    alone."""
    return _world


def started_ranks() -> int:
    """How many ranks torchrun, or what sets the same variables, has started."""
    text = os.environ.get("WORLD_SIZE", "1")
    return int(text) if text.isdecimal() and "RANK" in os.environ else 1


def own_rank() -> int:
    """This process's number among those ranks; 0 where it is the only one."""
    text = os.environ.get("RANK", "0")
    return int(text) if started_ranks() > 1 and text.isdecimal() else 0


def first_speaks() -> bool:
    """Whether this is not the first rank, and ends for what the first rank says."""
    return _silent_end


@contextlib.contextmanager
def among(ranks: Ranks) -> Iterator[None]:
    """In the block `ranks` is this process's world; all but the first rank are silent."""
    global _world, _silent_end
    _world = ranks
    try:
        with contextlib.nullcontext() if ranks.first else progress.silenced():
            yield
    except BaseException as error:
        ranks.fail(error)
        _silent_end = ranks.agreed and not ranks.first
        raise
    finally:
        ranks.close()
        _world = ALONE


def require_one_rank(what: str) -> None:
    """Refuse what does not work on several ranks yet.

    Raises:
        UsageError: there are several.
    """
    if started_ranks() > 1:
        raise UsageError(
            f"{what} does not run on several ranks yet, and torchrun started {started_ranks()}; "
            "start it as one process"
        )
