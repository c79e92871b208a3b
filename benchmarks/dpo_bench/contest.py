"""One workload by smoldpo and by TRL, and the floor that both are held against."""

from __future__ import annotations

import json
import statistics
import sys
from typing import Any

from dpo_bench.forecast import forecast_lines
from dpo_bench.running import Bench, Workload, plan, say, train

PROBE_PAIRS = 24


def options_of(bench: Bench, work: Workload) -> dict[str, Any]:
    """smoldpo's settings of a workload."""
    options: dict[str, Any] = {
        "model": bench.arguments.model,
        "data": bench.folder / "train.jsonl",
        "max-train-samples": work.pairs,
        "freeze-layers": work.freeze_layers,
        "learning-rate": work.learning_rate,
        "beta": work.beta,
        "num-train-epochs": work.epochs,
        "per-device-train-batch-size": bench.arguments.batch_size,
        "gradient-accumulation-steps": 1,
        "max-length": bench.arguments.max_length,
    }
    if work.eval_pairs:
        options["eval-data"] = bench.folder / "eval.jsonl"
    else:
        options["eval-fraction"] = 0
    return options


def run_smoldpo(bench: Bench, work: Workload) -> dict[str, Any]:
    """One whole run through the command line, and what its run folder says."""
    planned = None
    if bench.arguments.plan and not work.is_warm:  # plan reads no cache: W3's forecast is W1's
        bench.empty_cache()
        planned = plan(bench, options_of(bench, work))
        say(f"{work.name}: planned in {planned[0].seconds:.1f} s")
    if not work.is_warm:
        bench.empty_cache()
    folder = bench.folder / "run"
    finished, rows, environment = train(bench, folder, options_of(bench, work))
    timings = json.loads((folder / "timings.json").read_text())
    phases = {title: row["seconds"] for title, row in timings.items()}
    split = json.loads((folder / "data.json").read_text())["split"]
    if (split["train_pairs"], split["eval_pairs"]) != (work.pairs, work.eval_pairs):
        sys.exit(f"{work.name}: smoldpo took other pairs than it was given: {split}")
    seconds = sum(row["seconds"] for row in rows[1:]) or rows[0]["seconds"]
    pairs = sum(row["pairs"] for row in rows[1:]) or rows[0]["pairs"]
    epochs, once = floor(bench, work, environment["dtype"])
    prepared = phases.get("trunk and reference")
    return {
        "pace": pairs / seconds,
        "seconds": finished.seconds,
        "peak": finished.peak,
        "epochs_share": epochs * pairs / seconds,
        "once_share": None
        if work.is_warm or not prepared
        else once * (work.pairs + work.eval_pairs) / prepared,
        "phases": phases | {"steps": round(sum(row["seconds"] for row in rows), 2)},
        "dtype": environment["dtype"],
        "forecast": forecast_lines(work.name, planned, timings, finished) if planned else [],
    }


def floor(bench: Bench, work: Workload, dtype: str) -> tuple[float, float]:
    """Seconds that a pair's needed FLOPs take at the measured rate: in each epoch, and once.

    For p prompt and c completion tokens, of both sides together. Attention's own products and the
    optimizer are left out, so nothing reaches 100%.
    """
    facts = bench.facts
    below = sum(facts["layers"][: work.freeze_layers])
    above = sum(facts["layers"][work.freeze_layers :])
    head = facts["head"]
    head_passes = 4 if work.freeze_layers else 6
    epochs, once = [], []
    for side, count in (("train", work.pairs), ("eval", work.eval_pairs)):
        for p, c in facts["tokens"][side][:count]:
            once.append(2 * (p + c) * below + 2 * (p + c) * above + 2 * c * head)
            if side == "train":
                epochs.append(6 * (p + c) * above + head_passes * c * head)
    rate = 1e9 * max(facts["rates"].get(dtype) or facts["rates"]["float32"])
    return statistics.fmean(epochs) / rate, statistics.fmean(once) / rate


def sample(tokens: list[list[int]], count: int) -> list[int]:
    """`count` of the pairs, evenly spaced by length, in their order: the mean length stays."""
    by_length = sorted(range(len(tokens)), key=lambda index: sum(tokens[index]))
    count = min(count, len(tokens))
    return sorted(by_length[int((at + 0.5) * len(tokens) / count)] for at in range(count))


def run_trl(bench: Bench, work: Workload, micro_batch: int, pairs: int) -> dict[str, Any]:
    """TRL on a sample, scaled to the whole workload."""
    tokens = bench.facts["tokens"]
    spec = {key: bench.facts[key] for key in ("model", "device", "bf16")}
    spec |= {key: getattr(work, key) for key in ("freeze_layers", "learning_rate", "beta")}
    spec |= {
        "folder": str(bench.folder),
        "train": sample(tokens["train"][: work.pairs], pairs),
        "eval": sample(tokens["eval"], max(8, pairs // 4)) if work.eval_pairs else [],
        "micro_batch": micro_batch,
        "batch_size": bench.arguments.batch_size,
        "max_length": bench.arguments.max_length,
    }
    finished = bench.child("trl", spec)
    found = finished.report
    once = (work.pairs + work.eval_pairs) / found["precompute_pace"]
    seconds = found["startup"] + found["saving"] + work.epochs * work.pairs / found["pace"]
    if work.eval_pairs:
        seconds += 2 * work.eval_pairs / found["eval_pace"]
    return found | {
        "micro_batch": micro_batch,
        "sample": len(spec["train"]),
        "peak": finished.peak,
        "seconds": seconds + once,
        "seconds_warm": seconds,
    }


def best_micro_batch(bench: Bench, work: Workload) -> int:
    """The batch size at which TRL is fastest here, by a small probe of each."""
    sizes = bench.arguments.trl_batch_sizes
    if len(sizes) == 1:
        return sizes[0]
    probed = {}
    for size in sizes:
        probed[size] = run_trl(bench, work, size, PROBE_PAIRS)["pace"]
        say(f"{work.name}: TRL with {size} pairs a micro-batch: {probed[size]:.2f} pairs/s")
    return max(probed, key=probed.__getitem__)


def measure(bench: Bench, works: list[Workload]) -> dict[str, dict[str, Any]]:
    """Both trainers on each workload, in turns, round after round; medians over the rounds."""
    runs: dict[str, dict[str, list[Any]]] = {w.name: {"trl": [], "smoldpo": []} for w in works}
    best: dict[str, int] = {}
    for _ in range(bench.arguments.rounds):
        for work in works:
            both = runs[work.name]
            if work.is_warm and runs["W1"]["trl"]:
                # TRL, too, can read W1's reference log-probabilities back, from datasets' cache.
                cold = runs["W1"]["trl"][-1]
                both["trl"].append(cold | {"seconds": cold["seconds_warm"]})
            elif not bench.arguments.skip_trl:
                if work.name not in best:
                    best[work.name] = best_micro_batch(bench, work)
                both["trl"].append(run_trl(bench, work, best[work.name], bench.arguments.trl_pairs))
                say(f"{work.name}: TRL {both['trl'][-1]}")
            both["smoldpo"].append(run_smoldpo(bench, work))
            say(f"{work.name}: smoldpo {both['smoldpo'][-1]}")
    return {
        name: {who: median(found) for who, found in both.items()} for name, both in runs.items()
    }


def median(found: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of several: medians of numbers, the last of everything else."""
    if not found:
        return {}
    return {
        key: statistics.median(row[key] for row in found) if isinstance(last, float | int) else last
        for key, last in found[-1].items()
    }
