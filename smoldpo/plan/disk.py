"""Disk of a run, part by part. No torch."""

from __future__ import annotations


def disk_bytes(
    model: float, checkpoint: float, saved: int, keep: int, best: bool, store: float
) -> dict[str, float]:
    """Bytes on disk when a run ends: its model, the checkpoints that stay, what is kept for later runs."""
    stay = min(saved, keep + best)
    return {"model": model, "checkpoints": stay * checkpoint, "store": store}
