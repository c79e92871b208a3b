"""Pairs worth reading: those that changed sides, and those that the policy moved most. No torch here."""

from __future__ import annotations

from collections.abc import Sequence

from smoldpo.evaluation.metrics import PairScore

MOST = 4
"""Pairs of each kind."""


def notable(before: Sequence[PairScore], after: Sequence[PairScore]) -> dict[str, list[int]]:
    """Indices of pairs by kind; the margin is log π(chosen) - log π(rejected), in nats.

    changed: where the margin's sign is another than before, the furthest moved first
    best, worst: where the margin grew most, and where it fell most
    """
    old, new = ([s.margins["logp"] or 0.0 for s in scores] for scores in (before, after))
    moved = [b - a for a, b in zip(old, new, strict=True)]
    order = sorted(range(len(moved)), key=lambda i: -moved[i])
    changed = [i for i in order if (old[i] > 0) != (new[i] > 0)]
    changed.sort(key=lambda i: -abs(moved[i]))
    return {
        "changed": changed[:MOST],
        "best": [i for i in order if moved[i] > 0][:MOST],
        "worst": [i for i in reversed(order) if moved[i] < 0][:MOST],
    }
