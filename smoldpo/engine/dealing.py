"""Work that is dealt to the ranks of a run, and whose results all of them have in the end.

Item i is computed on rank i mod the number of ranks, there by a worker. What a stream gives does
not depend on who computes it, so neither do the results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from smoldpo.types import PairLogps
from smoldpo.utils.distributed import Ranks
from smoldpo.utils.workers import Workers

Item = TypeVar("Item")
Result = TypeVar("Result")


def deal(
    ranks: Ranks,
    workers: Workers,
    work: Callable[[int, Item], Result],
    items: Sequence[Item],
    finished: Callable[[Item], None] = lambda _: None,
    abandon: Callable[[], None] = lambda: None,
    device: torch.device | str = "cpu",
    idle: Callable[[], object] | None = None,
) -> list[Result]:
    """What `work` gives for each item, on all ranks; the arguments of Workers.run.

    Args:
        finished: of other ranks' items called when this rank has finished as many.
        device: where tensors of other ranks' results go.
        work: gives tensors, PairLogps, None, or tuples of these.
        idle: called in place of work where this rank has one item less than others, which need it
            to compute theirs: to share its part of the weights.

    Raises:
        Exception: as Workers.run and Ranks.share.
    """
    if ranks.size == 1:
        return workers.run(work, items, lambda item, _: finished(item), abandon)
    own = range(ranks.rank, len(items), ranks.size)

    def rounds_done(index: int, _: Result) -> None:
        start = index - ranks.rank
        for item in items[start : start + ranks.size]:
            finished(item)

    def compute() -> list[Any]:
        found = workers.run(lambda w, index: work(w, items[index]), own, rounds_done, abandon)
        if idle is not None and len(own) * ranks.size < len(items):
            idle()
        return [_to_json(result) for result in found]

    shares = ranks.share(compute, tied=idle is not None)
    places = (divmod(index, ranks.size) for index in range(len(items)))
    return [_from_json(shares[rank][place], device) for place, rank in places]


def _to_json(value: Any) -> Any:
    """Numbers as Python's floats, which hold every bit of a float32 or float64."""
    if isinstance(value, torch.Tensor):
        return {"dtype": str(value.dtype).removeprefix("torch."), "values": value.tolist()}
    if isinstance(value, PairLogps):
        return {"logps": {n: _to_json(t) for n, t in vars(value).items() if t is not None}}
    return None if value is None else [_to_json(part) for part in value]


def _from_json(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, list):
        return tuple(_from_json(part, device) for part in value)
    if value is None:
        return None
    if "logps" in value:
        return PairLogps(**{n: _from_json(t, device) for n, t in value["logps"].items()})
    dtype = getattr(torch, value["dtype"])
    return torch.tensor(value["values"], dtype=torch.float64).to(dtype).to(device)
