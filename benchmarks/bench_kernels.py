"""Native kernels against torch's functions: thread CPU time, in turns, on one thread.

    python benchmarks/bench_kernels.py PAIRS.jsonl [--seconds 40] [--train-layers 5]

SmolLM2-135M on eight real pairs. CPU time of a thread does not count what other processes take of
the machine (but for caches and memory, which all share), and the fastest of many turns counts.
The floor is what the products alone take at the rate that this machine's blocks reach in a loop.
Standard output is Markdown.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable

import torch

from smoldpo._version import __version__
from smoldpo.config.layer_spec import LayerSelection
from smoldpo.data.load import load_pairs
from smoldpo.data.tokenize import PairTokenizer
from smoldpo.engine.autotune import KernelChoice
from smoldpo.engine.base import EngineSettings
from smoldpo.engine.batching import STREAM_MULTIPLE
from smoldpo.engine.cache.trunk_states import MemoryStore
from smoldpo.engine.compile import Parameters
from smoldpo.engine.fast import FastEngine
from smoldpo.engine.kernels.native.library import load, supported
from smoldpo.engine.packing import pack, pair_length
from smoldpo.engine.precision import MasterWeights
from smoldpo.losses import Objective
from smoldpo.models.freeze import freeze
from smoldpo.models.load import find_model, load_model, load_tokenizer
from smoldpo.types import TokenizedPair
from smoldpo.utils.files import processor_name

LOSS = Objective.of(beta=0.1)
PAIRS, LENGTHS = 8, range(190, 301)


class Ways:
    """One engine, its optimizer, and the phases of a run on a stream of pairs."""

    def __init__(self, pairs: list[TokenizedPair], train_layers: int, kernels: KernelChoice):
        model = load_model(find_model("builtin"), torch.float32)
        at = model.config.num_hidden_layers - train_layers
        freeze(model, LayerSelection(at))
        self.parameters = Parameters.of(model)
        masters = MasterWeights(model, torch.bfloat16)
        settings = EngineSettings(torch.bfloat16, kernels=kernels)
        self.engine = FastEngine(model, masters, None, settings, MemoryStore(2e9))
        self.pairs = pairs
        self.engine.prepare(pairs)
        trained = [parameter for _, parameter in self.engine.trainable_parameters()]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-6, weight_decay=0.01, fused=True)
        policy = self.engine._models[0].policy
        self.batch = pack(pairs, "cpu", STREAM_MULTIPLE, self.engine.batching.prefix)
        self.phases: dict[str, Callable[[], object]] = {
            "step: gradients": self.gradients,
            "step: AdamW and publishing": self.update,
        }
        if policy.trunk is not None:
            states = policy.trunk_states(self.batch)
            self.phases["first pass: trunk"] = lambda: policy.trunk_states(self.batch)
            self.phases["first pass: reference"] = torch.no_grad()(
                lambda: policy.logps(self.batch, states)
            )

    def gradients(self) -> None:
        """Forward and backward of the eight pairs, into the optimizer's float32."""
        self.optimizer.zero_grad(set_to_none=True)
        self.engine.accumulate_gradients(self.pairs, LOSS)

    def update(self) -> None:
        """The optimizer's step, and the weights rounded for the next one."""
        self.optimizer.step()
        self.engine.updated()


def turns(ways: dict[str, Callable[[], object]], seconds: float) -> dict[str, tuple[float, float]]:
    """Fastest and median milliseconds of thread CPU time of each, which take turns."""
    for way in ways.values():
        way()
    times: dict[str, list[float]] = {name: [] for name in ways}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 3:
        for name, way in ways.items():
            start = time.thread_time_ns()
            way()
            times[name].append((time.thread_time_ns() - start) / 1e6)
    return {name: (min(each), statistics.median(each)) for name, each in times.items()}


def block_rate() -> float:
    """TFLOP/s of products whose operands stay in the nearest cache: nothing can go beyond it."""
    native, best = load(supported()[0]), math.inf
    for _ in range(300):
        start = time.thread_time_ns()
        native.call("block_loop", 30)
        best = min(best, time.thread_time_ns() - start)
    return 2 * 32 * 32 * 32 * 256 * 30 / best / 1e3


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pairs")
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--train-layers", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = PairTokenizer(load_tokenizer(find_model("builtin")), 512)
    some = tokenizer.tokenize_all(load_pairs(arguments.pairs).pairs[:100])
    pairs = [pair for pair in some if pair_length(pair) in LENGTHS][:PAIRS]
    native = supported()[0]
    kinds = {"torch": KernelChoice(), "native": KernelChoice(native=native)}
    ways = {kind: Ways(pairs, arguments.train_layers, choice) for kind, choice in kinds.items()}
    both = {f"{n}, {k}": way for k, w in ways.items() for n, way in w.phases.items()}
    found = turns(both, arguments.seconds)
    tokens = sum(map(pair_length, pairs))
    scored = sum(pair.chosen_tokens + pair.rejected_tokens for pair in pairs)
    rate, parameters = block_rate(), ways["native"].parameters
    operations = {
        "step: gradients": parameters.epoch(tokens - scored, scored),
        "first pass: trunk": 2.0 * tokens * parameters.below,
        "first pass: reference": parameters.once(tokens - scored, scored)
        - 2.0 * tokens * parameters.below,
    }
    print(f"# Native kernels ({native}) against torch's functions\n")
    print(f"{processor_name()}; torch {torch.__version__}; smoldpo {__version__}; one thread;")
    print(f"{len(pairs)} pairs of hh_helpful, {tokens:,} tokens, {scored} scored; SmolLM2-135M,")
    print(f"{arguments.train_layers} layers train; rate of blocks {rate:.2f} TFLOP/s.\n")
    print(
        "| ms a pair, thread CPU time, fastest (median) | torch | native | ratio | floor | share |"
    )
    print("| --- | --: | --: | --: | --: | --: |")
    for name in ways["native"].phases:
        old, new = (tuple(t / len(pairs) for t in found[f"{name}, {kind}"]) for kind in kinds)
        floor = operations.get(name, 0.0) / rate / 1e9 / len(pairs)
        share = f"{floor:.1f} | {floor / new[0]:.0%}" if floor else "- | -"
        cells = f"{old[0]:.1f} ({old[1]:.1f}) | {new[0]:.1f} ({new[1]:.1f}) | {old[0] / new[0]:.2f}"
        print(f"| {name} | {cells} | {share} |")


if __name__ == "__main__":
    main()
