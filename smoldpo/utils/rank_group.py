"""Several ranks over torch.distributed: gloo between CPUs and for messages, nccl between GPUs."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist

from smoldpo.utils.distributed import (
    ALONE,
    PeerFailedError,
    RankLostError,
    Ranks,
    among,
    started_ranks,
    world,
)
from smoldpo.utils.errors import OutOfMemoryError, UsageError, whole_reason
from smoldpo.utils.memory import ran_out_of_memory
from smoldpo.utils.signals import InterruptedRunError

TIMEOUT = timedelta(hours=1)
"""A rank waits so long for another that lives; one that was killed is noticed at once."""
BLOCK = 4096
"""Bytes that every exchange sends; longer messages take a second one."""
LENGTH = struct.Struct("<q")


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """In the block this process is one of the ranks that torchrun started. All but the first are
    silent.

    Where there is one rank, or the block lies in another such block, nothing happens.

    Raises:
        RankLostError: the others cannot be reached.
        UsageError: some of torchrun's variables are missing.
    """
    if started_ranks() == 1 or world() is not ALONE:
        yield world()
        return
    ranks = RankGroup.of_environment()
    with among(ranks):
        yield ranks


class RankGroup(Ranks):
    """This process among several.

    What ranks send each other are JSON texts, and tensors of known shapes: nothing is unpickled.
    """

    def __init__(self, rank: int, size: int, local_rank: int, local_size: int):
        self.rank, self.size = rank, size
        self.local_rank, self.local_size = local_rank, local_size
        self._apart = False
        self._broken = False
        self._check: Callable[[], None] = lambda: None
        self._peers: list[list[Any]] = []
        self._peers = self.share(lambda: [socket.gethostname(), os.getpid()])

    @classmethod
    def of_environment(cls) -> RankGroup:
        """Join the ranks that torchrun's variables tell of.

        Raises:
            RankLostError: they cannot be reached.
            UsageError: a variable is missing, or is no number.
        """
        names = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"
        numbers = {name: os.environ.get(name, "") for name in (*names, "MASTER_PORT")}
        wrong = [name for name, text in numbers.items() if not text.isdecimal()]
        wrong += [] if os.environ.get("MASTER_ADDR") else ["MASTER_ADDR"]
        if wrong:
            raise UsageError(
                f"WORLD_SIZE is {numbers['WORLD_SIZE']}, so this is one of several ranks, but "
                f"{', '.join(wrong)} is not set to what torchrun sets it to; start it by torchrun"
            )
        rank, size, local_rank, local_size = (int(numbers[name]) for name in names)
        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        try:
            dist.init_process_group(backend, timeout=TIMEOUT)
        except RuntimeError as error:
            raise RankLostError(
                f"rank {rank} of {size}: the other ranks cannot be reached through "
                f"{os.environ['MASTER_ADDR']}:{numbers['MASTER_PORT']} ({whole_reason(error)})"
            ) from None
        return cls(rank, size, local_rank, local_size)

    @property
    def apart(self) -> bool:
        return self._apart

    def stopped_by(self, check: Callable[[], None]) -> None:
        self._check = check

    def share(self, work: Callable[[], Any], tied: bool = False) -> list[Any]:
        error: BaseException | None = None
        message: dict[str, Any] = {}
        try:
            self._apart = not tied
            message["value"] = work()
            tied = False
            self._check()
            self._apart = False
        except BaseException as caught:
            self._apart = False
            if tied:
                self._broken = True
                raise
            error, message = caught, _failure(caught)
        return self._agree(message, error)

    def _agree(self, message: dict[str, Any], error: BaseException | None) -> list[Any]:
        """Exchange how each rank fared: the values, or the error of the first that failed worst."""
        found = [json.loads(text) for text in self.exchange(json.dumps(message).encode())]
        failed = [rank for rank, each in enumerate(found) if "code" in each]
        if not failed:
            return [each["value"] for each in found]
        # The same on all ranks: an error comes before a lack of memory, and that before a signal.
        worst = min(failed, key=lambda rank: (KINDS.index(found[rank]["kind"]), rank))
        self.agreed = True
        if error is not None and worst == self.rank:
            raise error
        raise self._as_theirs(worst, **found[worst]) from None

    def _as_theirs(self, rank: int, kind: str, text: str, code: int) -> BaseException:
        if kind == "signal":
            return InterruptedRunError(code - 128)
        if kind == "memory":
            return OutOfMemoryError(f"rank {rank}: {text}")
        return PeerFailedError(f"{self._name(rank)}: {text}", code)

    def fail(self, error: BaseException) -> None:
        if self.agreed or self._broken or isinstance(error, RankLostError):
            return
        with contextlib.suppress(BaseException):  # they may have ended, having nothing left to do
            self._agree(_failure(error), error)

    def close(self) -> None:
        if not self._broken:
            dist.destroy_process_group()

    def exchange(self, payload: bytes) -> list[bytes]:
        """What each rank sends, by rank.

        Raises:
            RankLostError: a rank has gone.
        """
        head = LENGTH.pack(len(payload)) + payload
        heads = self._gathered(head[:BLOCK].ljust(BLOCK, b"\0"))
        lengths = [LENGTH.unpack_from(each)[0] for each in heads]
        bodies = [each[LENGTH.size :] for each in heads]
        left = max(lengths) + LENGTH.size - BLOCK
        if left > 0:
            rest = self._gathered(head[BLOCK:].ljust(left, b"\0"))
            bodies = [body + more for body, more in zip(bodies, rest, strict=True)]
        return [body[:length] for body, length in zip(bodies, lengths, strict=True)]

    def _gathered(self, block: bytes) -> list[bytes]:
        mine = torch.frombuffer(bytearray(block), dtype=torch.uint8)
        return [theirs.numpy().tobytes() for theirs in self.gather(mine)]

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        self._collective(lambda: dist.all_gather(found, tensor))
        return found

    def add(self, tensor: torch.Tensor) -> None:
        self._collective(lambda: dist.all_reduce(tensor))

    def send_parts(
        self, out: torch.Tensor, tensor: torch.Tensor, received: Sequence[int], sent: Sequence[int]
    ) -> None:
        self._collective(lambda: dist.all_to_all_single(out, tensor, list(received), list(sent)))

    def _collective(self, call: Callable[[], object]) -> None:
        try:
            call()
        except RuntimeError as error:
            self._broken = True
            raise RankLostError(self._lost(error)) from None

    def _lost(self, error: RuntimeError) -> str:
        host = socket.gethostname()
        gone = [
            self._name(rank)
            for rank, (their_host, pid) in enumerate(self._peers)
            if rank != self.rank and their_host == host and _has_ended(pid)
        ]
        # The first says it, unless it is the one that has gone.
        self.agreed = not self.first and self._name(0) not in gone
        if gone:
            return f"{' and '.join(gone)} ended without a word, so the other ranks end too"
        reason = whole_reason(error).partition(". This is typically")[0]
        return f"a rank on another machine has ended or is out of reach ({reason})"

    def _name(self, rank: int) -> str:
        hosts = {host for host, _ in self._peers}
        if rank >= len(self._peers):
            return f"rank {rank}"
        host, pid = self._peers[rank]
        return f"rank {rank} (process {pid}{f' on {host}' if len(hosts) > 1 else ''})"


KINDS = ("error", "memory", "signal")


def _failure(error: BaseException) -> dict[str, Any]:
    """What other ranks are told of an error."""
    if isinstance(error, InterruptedRunError):
        return {"kind": "signal", "text": "", "code": error.exit_code}
    kind = "memory" if ran_out_of_memory(error) else "error"
    known = getattr(error, "exit_code", None)
    text = str(error) if known else f"{type(error).__name__}: {whole_reason(error)}"
    return {"kind": kind, "text": text, "code": known or 1}


def _has_ended(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return True
