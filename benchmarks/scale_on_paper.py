"""Pairs a day and bytes on the wire on 1 to 512 GPUs, on paper: the table of docs/scale.md.

    python benchmarks/scale_on_paper.py [--reached 0.35] [--pairs 16]

Nothing is measured here: a GPU is taken to reach a share of 989 TFLOP/s (bfloat16), eight of them
to send 300 GB/s to each other, and more 50 GB/s each, and nothing of that at the same time as it
computes. Replace what you have measured.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from smoldpo.config.schema import TrainConfig
from smoldpo.plan.ranks import PlannedRanks

PEAK, NODE, NETWORK = 989e12, 300e9, 50e9
TOKENS, ANSWERS, TWICE = 265, 150, 400
"""Of a pair: in one stream, in its answers, and in the plain engine's two rows."""


@dataclass(frozen=True)
class Case:
    """A model and how it trains; `operations` of one pair."""

    name: str
    parameters: float
    trainable: float
    operations: float
    fsdp: bool = False


CASES = [
    Case("135M, 25 layers frozen", 134.5e6, 17.7e6, 6 * 17.7e6 * TOKENS + 4 * 28.3e6 * ANSWERS),
    Case("1.7B, LoRA", 1.711e9, 18.1e6, 4 * 1.711e9 * TOKENS),
    Case("3B, whole, fsdp", 3.075e9, 3.075e9, (6 + 2) * 3.075e9 * TWICE, fsdp=True),
]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reached", type=float, default=0.35, help="share of the peak (0.35)")
    parser.add_argument("--pairs", type=int, default=16, help="of a rank in a step (16)")
    a = parser.parse_args()
    print("| model | GPUs | MB a rank sends a step | computing, ms | sending, ms | pairs a day |")
    print("|" + " --- |" * 6)
    for case in CASES:
        config = TrainConfig(fsdp=case.fsdp)
        for count in (1, 8, 64, 512):
            ranks = PlannedRanks(count, NODE if count <= 8 else NETWORK)
            numbers = int(case.trainable), int(case.parameters)
            sent = ranks.bytes_sent(config, *numbers, 4, 2, 1.0) if count > 1 else 0.0
            computing = a.pairs * case.operations / (a.reached * PEAK)
            sending = sent / ranks.bandwidth
            day = 86400 * count * a.pairs / (computing + sending)
            print(
                f"| {case.name} | {count} | {sent / 1e6:,.0f} | {1e3 * computing:,.1f} "
                f"| {1e3 * sending:,.1f} | {day:,.3g} |"
            )


if __name__ == "__main__":
    main()
