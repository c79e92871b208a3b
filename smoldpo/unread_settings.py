"""Which settings a choice reads (a loss, an optimizer, a schedule), and those that were set for nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def unread(
    changed: set[str], readers: Mapping[str, Sequence[str]], chosen: Sequence[str]
) -> list[str]:
    """A sentence for each setting that was changed and that none of `chosen` reads, though others do.

    Args:
        readers: which settings each possible choice reads.
    """
    known = dict.fromkeys(setting for reads in readers.values() for setting in reads)
    idle = set(known).difference(*(readers[name] for name in chosen)) & changed
    return [
        f"{setting} is read by {listed([n for n, r in readers.items() if setting in r])}, "
        f"not by {listed(chosen)}"
        for setting in known
        if setting in idle
    ]


def listed(names: Sequence[str]) -> str:
    """a, b and c"""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
