"""smoldpo against TRL's DPOTrainer: seconds, peak memory, and how near the work comes to its floor.

    python benchmarks/bench_dpo.py [--workloads W1,W2,W3] [--pairs 1000] [--output]

W1  layers 0-24 and the embeddings frozen, evaluation before and after, smoldpo's caches cold
W2  everything trains, one epoch, no evaluation
W3  W1 again with another beta, while smoldpo's cache holds what W1 left there

Each run is a process of its own, in turns, over the same pairs. smoldpo runs whole, from its command to
its end. TRL is measured on a sample of the pairs, evenly spaced by length, and scaled to all of them.
This process imports no torch: a child's peak memory is never below that of the process that starts it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_data_check import words

HERE = Path(__file__).resolve().parent
SHARED_DATA = HERE.parent.parent / "shared" / "data"
SHAPES = ((512, 576, 1536), (1024, 576, 1536), (2048, 576, 1536))
FROZEN_LAYERS = 25
PROBE_PAIRS = 24
SKIP = 2
"""TRL's first micro-batches, which allocate and warm up, are not timed."""


@dataclass(frozen=True)
class Workload:
    """What both trainers are asked to do."""

    name: str
    what: str
    freeze_layers: int
    learning_rate: float
    beta: float
    epochs: int
    pairs: int
    eval_pairs: int

    @property
    def is_warm(self) -> bool:
        """Whether both sides find what an earlier run kept."""
        return self.name == "W3"


@dataclass
class Finished:
    """A child process that ended well."""

    seconds: float
    peak: int
    output: str

    @property
    def report(self) -> Any:
        """What a child of this script says: JSON on its last line."""
        return json.loads(self.output.strip().splitlines()[-1])


@dataclass
class Bench:
    """The arguments, the folder that everything goes into, and what `prepare` found there."""

    arguments: argparse.Namespace
    folder: Path
    facts: dict[str, Any]

    def run(self, command: list[str]) -> Finished:
        """Run a command to its end; its peak resident memory is the kernel's own account."""
        settings = {
            "XDG_CACHE_HOME": str(self.folder / "cache"),
            "HF_HOME": str(self.folder / "hf"),
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
            "TQDM_DISABLE": "1",
            "OMP_NUM_THREADS": str(self.arguments.threads),
            "MKL_NUM_THREADS": str(self.arguments.threads),
        }
        out, errors = self.folder / "stdout", self.folder / "stderr"
        with out.open("w") as stdout, errors.open("w") as stderr:
            begin = time.perf_counter()
            process = subprocess.Popen(
                command, stdout=stdout, stderr=stderr, env=os.environ | settings
            )
            try:
                _, status, usage = os.wait4(process.pid, 0)
            except BaseException:
                process.kill()
                raise
            seconds = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            tail = "\n".join(errors.read_text(errors="replace").splitlines()[-30:])
            sys.exit(f"{tail}\n\nexit code {process.returncode}: {shlex.join(command)}")
        peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return Finished(seconds, peak, out.read_text())

    def child(self, name: str, spec: dict[str, Any]) -> Finished:
        """Run one of CHILDREN in a process of its own."""
        spec = spec | {"spawned": time.time()}
        return self.run([sys.executable, __file__, "--child", name, "--spec", json.dumps(spec)])

    def empty_cache(self) -> None:
        """Make smoldpo's caches cold; the unpacked model, which both sides read, stays."""
        for entry in (self.folder / "cache" / "smoldpo").glob("*"):
            if entry.name != "models":
                shutil.rmtree(entry)


# What the children do. They alone import torch, transformers and smoldpo.


def prepare(spec: dict[str, Any]) -> dict[str, Any]:
    """Unpack the model, write the pairs that both sides read, count their tokens, measure matmuls.

    Pairs longer than max_length are left out: the trainers cut them differently.
    """
    import torch

    from smoldpo.data.load import load_training_data
    from smoldpo.data.tokenize import PairTokenizer
    from smoldpo.engine.precision import compute_dtype, pick_device
    from smoldpo.models.freeze import layer_of
    from smoldpo.models.load import find_model, load_model, load_tokenizer

    device = pick_device(spec["device"])
    rates = {name: matmul_rates(name, device) for name in ("float32", "bfloat16")}
    source = find_model(spec["model"])
    data = load_training_data(spec["data"], eval_data=spec["eval_data"])
    uncut = PairTokenizer(load_tokenizer(source), 2**20)
    tokens = {
        side: write_fitting(spec, side, pairs, uncut)
        for side, pairs in (("train", data.train), ("eval", data.eval))
    }
    layers: dict[int, int] = {}
    model = load_model(source, torch.float32)
    for name, parameter in model.named_parameters():
        layers[layer_of(name)] = layers.get(layer_of(name), 0) + parameter.numel()
    return {
        "model": source.location,
        "device": device,
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "bf16": compute_dtype("auto", device)[0] == torch.bfloat16,
        "rates": rates,
        "tokens": tokens,
        "layers": [layers[index] for index in sorted(layers) if index >= 0],
        "head": model.get_output_embeddings().weight.numel(),
    }


def write_fitting(spec: dict[str, Any], side: str, pairs: Any, tokenizer: Any) -> list[list[int]]:
    """Write the first pairs that fit into max_length; returns the tokens of prompt and completions."""
    tokens: list[list[int]] = []
    with Path(spec["folder"], f"{side}.jsonl").open("w", encoding="utf-8") as file:
        for pair in pairs:
            if len(tokens) == spec[side]:
                break
            ids = tokenizer.tokenize(pair)
            if ids.longest <= spec["max_length"]:
                tokens.append([len(ids.prompt_ids), len(ids.chosen_ids) + len(ids.rejected_ids)])
                row = {key: getattr(pair, key) for key in ("prompt", "chosen", "rejected")}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return tokens


def matmul_rates(dtype_name: str, device: str, seconds: float = 0.3) -> list[float]:
    """GFLOP/s of the best of many products, of each of SHAPES."""
    import torch

    dtype, rates = getattr(torch, dtype_name), []
    wait = (lambda: None) if device == "cpu" else getattr(torch, device).synchronize
    for rows, inner, columns in SHAPES:
        left = torch.randn(rows, inner, device=device).to(dtype)
        right = torch.randn(columns, inner, device=device).to(dtype)
        torch.nn.functional.linear(left, right)
        best, end = float("inf"), time.perf_counter() + seconds
        while time.perf_counter() < end:
            wait()
            start = time.perf_counter()
            for _ in range(4):
                torch.nn.functional.linear(left, right)
            wait()
            best = min(best, (time.perf_counter() - start) / 4)
        rates.append(2 * rows * inner * columns / best / 1e9)
    return rates


def trl_run(spec: dict[str, Any]) -> dict[str, Any]:
    """TRL's DPOTrainer over a sample of the pairs: start-up, and the pace of each part of its work."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from smoldpo.models.freeze import freeze

    starts: list[float] = []
    precomputing = {"pairs": 0, "seconds": 0.0}

    class Timed(DPOTrainer):
        """TRL's trainer with a clock in it."""

        def _precompute_ref_logps(self, dataset, *args, **kwargs):
            begin = time.perf_counter()
            dataset = super()._precompute_ref_logps(dataset, *args, **kwargs)
            precomputing["seconds"] += time.perf_counter() - begin
            precomputing["pairs"] += len(dataset)
            return dataset

        def training_step(self, *args, **kwargs):
            starts.append(time.perf_counter())
            return super().training_step(*args, **kwargs)

    def timed(function, *args) -> float:
        begin = time.perf_counter()
        function(*args)
        if spec["device"] == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32)
    freeze(model, spec["freeze_layers"])
    train_rows, eval_rows = (
        conversations(Path(spec["folder"], f"{side}.jsonl"), spec[side])
        for side in ("train", "eval")
    )
    trainer = Timed(
        model=model,
        processing_class=AutoTokenizer.from_pretrained(spec["model"]),
        train_dataset=Dataset.from_list(train_rows),
        eval_dataset=Dataset.from_list(eval_rows) if eval_rows else None,
        args=DPOConfig(
            output_dir=str(Path(spec["folder"], "trl")),
            use_cpu=spec["device"] == "cpu",
            bf16=spec["bf16"],
            beta=spec["beta"],
            learning_rate=spec["learning_rate"],
            per_device_train_batch_size=spec["micro_batch"],
            per_device_eval_batch_size=spec["micro_batch"],
            gradient_accumulation_steps=spec["batch_size"] // spec["micro_batch"],
            num_train_epochs=1,
            max_length=spec["max_length"],
            precompute_ref_log_probs=True,
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=1,
        ),
    )
    startup = time.time() - spec["spawned"] - precomputing["seconds"]
    evaluating = timed(trainer.evaluate) if eval_rows else 0.0
    begin = time.perf_counter()
    end = begin + timed(trainer.train)
    evaluating += timed(trainer.evaluate) if eval_rows else 0.0
    skipped = min(SKIP, len(starts) - 1)
    return {
        "startup": startup,
        "precompute_pace": precomputing["pairs"] / precomputing["seconds"],
        "eval_pace": 2 * len(eval_rows) / evaluating if eval_rows else None,
        "pace": (len(train_rows) - skipped * spec["micro_batch"]) / (end - starts[skipped]),
        "saving": timed(trainer.save_model, str(Path(spec["folder"], "trl"))),
    }


def conversations(path: Path, chosen: list[int]) -> list[dict[str, Any]]:
    """Some rows of a file of pairs, as TRL's conversational format has them."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    made = []
    for row in (rows[index] for index in chosen):
        prompt = row["prompt"]
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        answers = {
            side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")
        }
        made.append({"prompt": prompt} | answers)
    return made


def make_tiny_model(spec: dict[str, Any]) -> dict[str, Any]:
    """A random Llama of four narrow layers with the built-in tokenizer: growth shows sooner."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from smoldpo.models.load import find_model, load_tokenizer

    torch.manual_seed(1)
    tokenizer = load_tokenizer(find_model("builtin"))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(spec["folder"])
    tokenizer.save_pretrained(spec["folder"])
    return {}


CHILDREN = {"prepare": prepare, "trl": trl_run, "tiny": make_tiny_model}


# What this process does: start the children in turns, and put what they say into a table.


def workloads(arguments: argparse.Namespace) -> list[Workload]:
    """Those asked for; W3 behind W1, whose cache it finds."""
    a = arguments
    frozen = (FROZEN_LAYERS, 2e-4)
    every = [
        Workload("W1", "25 layers frozen, cold", *frozen, 0.1, a.epochs, a.pairs, a.eval_pairs),
        Workload("W3", "W1 with beta 0.2, warm", *frozen, 0.2, a.epochs, a.pairs, a.eval_pairs),
        Workload("W2", "everything trains", 0, 5e-6, 0.1, 1, a.full_pairs, 0),
    ]
    return [workload for workload in every if workload.name in a.workloads]


def run_smoldpo(bench: Bench, work: Workload) -> dict[str, Any]:
    """One whole run through the command line, and what its run folder says."""
    if not work.is_warm:
        bench.empty_cache()
    folder = bench.folder / "run"
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
    finished, rows, environment = train(bench, folder, options)
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
    }


def train(
    bench: Bench, folder: Path, options: dict[str, Any]
) -> tuple[Finished, list[dict[str, Any]], dict[str, Any]]:
    """`smoldpo train` with these options: the process, its optimizer steps, its environment."""
    options |= {"device": bench.arguments.device, "sample-prompt": "none", "output-dir": folder}
    options |= {"cache": "disk", "generate-prompts": 0}  # TRL answers no prompts
    shutil.rmtree(folder, ignore_errors=True)
    settings = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    finished = bench.run([sys.executable, "-m", "smoldpo", "train", *settings])
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    steps = [row for row in map(json.loads, lines) if "seconds" in row]
    return finished, steps, json.loads((folder / "environment.json").read_text())


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


def growth(bench: Bench) -> list[str]:
    """smoldpo over more and more synthetic pairs: cost must grow as they do, memory must not."""
    model, sizes = bench.arguments.growth_model, bench.arguments.growth
    name = model
    if model is None:
        model, name = str(bench.folder / "tiny"), "a random Llama, 4 layers 64 wide, 3 frozen"
        bench.child("tiny", {"folder": model})
    lines = [
        f"\n## Growth\n\nSynthetic pairs, one epoch, no evaluation, cold cache, on {name}.\n",
        "| pairs | s | ms per further pair | peak MB | cache MB |\n|--:|--:|--:|--:|--:|",
    ]
    before: tuple[int, float] | None = None
    for count in sizes:
        data = bench.folder / "growth.jsonl"
        write_synthetic(data, count)
        bench.empty_cache()
        options = {"model": model, "data": data, "eval-fraction": 0, "num-train-epochs": 1}
        finished, steps, _ = train(bench, bench.folder / "run", options)
        pairs = sum(row["pairs"] for row in steps)
        kept = (bench.folder / "cache" / "smoldpo").glob("[!m]*/**/*")
        size = sum(path.stat().st_size for path in kept if path.is_file())
        each = 1e3 * (finished.seconds - before[1]) / (pairs - before[0]) if before else None
        before = (pairs, finished.seconds)
        lines.append(
            f"| {pairs:,} | {finished.seconds:.1f} | {number(each)} | {finished.peak / 1e6:,.0f} "
            f"| {size / 1e6:,.1f} |"
        )
        say(lines[-1])
    return lines


def write_synthetic(path: Path, pairs: int) -> None:
    """Random words: pairs of about 100 tokens, those of the chat template included."""
    rng = random.Random(1)
    vocabulary = ["".join(rng.choices("aeioubcdfghklmnprst", k=5)) for _ in range(5_000)]
    with path.open("w", encoding="utf-8") as file:
        for _ in range(pairs):
            row = {"prompt": words(rng, vocabulary, 12)}
            row |= {side: words(rng, vocabulary, 6) for side in ("chosen", "rejected")}
            file.write(json.dumps(row) + "\n")


def say(message: str) -> None:
    """Progress, on standard error."""
    print(message, file=sys.stderr, flush=True)


def number(value: float | None, form: str = ".2f") -> str:
    return "–" if value is None else format(value, form)


def table(bench: Bench, works: list[Workload], found: dict[str, dict[str, Any]]) -> list[str]:
    """The comparison, one line a workload, and below it what each figure is made of."""
    lines = [
        "| workload | TRL pairs/s (batch) | TRL s, scaled | TRL peak MB | smoldpo pairs/s | smoldpo s "
        "| smoldpo peak MB | TRL s / smoldpo s | TRL MB / smoldpo MB | floor, epochs | floor, once a pair |",
        "|---" + "|--:" * 10 + "|",
    ]
    notes = []
    for work in works:
        trl, ours = found[work.name]["trl"], found[work.name]["smoldpo"]
        what = f"{work.what}: {work.pairs:,} pairs x {work.epochs}, {work.eval_pairs} evaluated"
        theirs, ratios = ["–"] * 3, ["–"] * 2
        if trl:
            batch = f"{trl['pace']:.2f} ({trl['micro_batch']:.0f})"
            theirs = [batch, f"{trl['seconds']:,.0f}", f"{trl['peak'] / 1e6:,.0f}"]
            ratios = [f"{trl[key] / ours[key]:.1f}" for key in ("seconds", "peak")]
            evaluation = f"evaluation {trl['eval_pace']:.2f} pairs/s, " if trl["eval_pace"] else ""
            notes.append(
                f"- {work.name}, TRL: scaled from {trl['sample']:.0f} pairs; start-up "
                f"{trl['startup']:.1f} s, reference {trl['precompute_pace']:.2f} pairs/s"
                f"{' (not counted: kept)' if work.is_warm else ''}, {evaluation}"
                f"saving {trl['saving']:.1f} s"
            )
        phases = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in ours["phases"].items())
        notes.append(f"- {work.name}, smoldpo ({ours['dtype']}): {phases}")
        own = [f"{ours['pace']:.2f}", f"{ours['seconds']:,.1f}", f"{ours['peak'] / 1e6:,.0f}"]
        shares = [number(ours[key], ".0%") for key in ("epochs_share", "once_share")]
        cells = [f"{work.name}: {what}", *theirs, *own, *ratios, *shares]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", *notes, "", EXPLANATION]


EXPLANATION = """\
Pairs/s are those of the policy epochs, without the first step (TRL: the first two micro-batches). Seconds
are from the command to its end; the unpacked model was there before. Peak MB is the peak resident memory of
the process (10^6 bytes). Floor: the time that the FLOPs which the loss needs take at the best measured
matmul rate, as a share of the time taken; "once a pair" is the frozen layers and the reference. W3's TRL
is W1's without the reference pass, which it, too, can keep. Pairs longer than max_length are left out."""


def header(bench: Bench) -> list[str]:
    """The machine, the versions, the measured rates, the command."""
    from importlib.metadata import version

    facts, arguments = bench.facts, bench.arguments
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    names = ("smoldpo", "torch", "transformers", "trl")
    shown = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    command = shlex.join(["python", "benchmarks/bench_dpo.py", *shown])
    lines = [
        f"# DPO: smoldpo and TRL, {time.strftime('%Y-%m-%d')}\n",
        f"- machine: {processor()[0]}, {os.cpu_count()} cores, {memory:.0f} GB; "
        f"{', '.join(processor()[1]) or 'no amx, no avx512_bf16'}",
        f"- on {facts['gpu'] or facts['device']}, {arguments.threads} threads; load before: "
        f"{facts['load']:.2f}; {arguments.rounds} round(s)",
        f"- versions: {', '.join(f'{name} {version(name)}' for name in names)}; "
        f"Python {platform.python_version()}",
        f"- command: `{command}`",
    ]
    shapes = [f"{rows}x{inner}x{columns}" for rows, inner, columns in SHAPES]
    for dtype, rates in facts["rates"].items():
        each = ", ".join(f"{s} {rate:,.0f}" for s, rate in zip(shapes, rates, strict=True))
        lines.append(f"- matmul, {dtype}: best {max(rates):,.0f} GFLOP/s ({each})")
    tokens = facts["tokens"]["train"]
    prompt, both = (statistics.fmean(pair[at] for pair in tokens) for at in (0, 1))
    lines.append(
        f"- pairs: {Path(arguments.data).name}, max_length {arguments.max_length}; a pair has on average "
        f"{prompt:.0f} prompt tokens and {both:.0f} of both completions; {arguments.batch_size} pairs a step"
    )
    return [*lines, ""]


def processor() -> tuple[str, list[str]]:
    """The processor's name, and which of the instructions that matter for bfloat16 it has."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(errors="replace") if info.is_file() else ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^flags\s*:\s*(.+)$", text, re.MULTILINE)
    known = flags.group(1).split() if flags else []
    matter = [flag for flag in known if flag.startswith("amx") or flag == "avx512_bf16"]
    return (name.group(1) if name else platform.processor() or platform.machine()), matter


def output_path(arguments: argparse.Namespace, facts: dict[str, Any]) -> Path:
    """Where --output without a path writes: benchmarks/results/<machine>-<date>.md."""
    if arguments.output:
        return Path(arguments.output)
    machine = facts["gpu"] or f"{processor()[0]} {os.cpu_count()} cores"
    slug = re.sub(r"[^a-z0-9]+", "-", machine.lower().replace("(r)", "")).strip("-")
    return HERE / "results" / f"{slug}-{time.strftime('%Y-%m-%d')}.md"


def parse_arguments() -> argparse.Namespace:
    """The command line; sizes are those of the workloads in full unless told otherwise."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    add("--data", metavar="FILE", help="pairs (../shared/data/hh_helpful_train.jsonl or builtin)")
    add("--eval-data", metavar="FILE", help="held-out pairs (hh_helpful_dev.jsonl beside them)")
    add("--model", default="builtin", help="as smoldpo's --model takes it (builtin)")
    add("--workloads", type=lambda text: text.upper().split(","), default=["W1", "W2", "W3"])
    for name, default, what in (
        ("--pairs", 1000, "pairs of W1 and W3"),
        ("--eval-pairs", 200, "evaluated pairs of W1 and W3"),
        ("--epochs", 3, "epochs of W1 and W3"),
        ("--full-pairs", 240, "pairs of W2"),
        ("--trl-pairs", 96, "pairs that TRL is measured on"),
        ("--batch-size", 8, "pairs an optimizer step"),
        ("--max-length", 512, "tokens of prompt and completion"),
        ("--threads", os.cpu_count(), "threads of each run"),
        ("--rounds", 1, "rounds, of which medians are taken"),
    ):
        add(name, type=int, default=default, metavar="N", help=f"{what} ({default})")
    sizes = {"type": numbers, "metavar": "N,N"}
    add(
        "--trl-batch-sizes", **sizes, default=[1, 2, 4], help="of which TRL's best is taken (1,2,4)"
    )
    add("--skip-trl", action="store_true", help="measure smoldpo alone")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--growth", **sizes, help="also run time and peak memory over N synthetic pairs each")
    add("--growth-model", metavar="FOLDER", help="model of --growth (a tiny random one)")
    add("--output", nargs="?", const="", metavar="FILE", help="write it too (benchmarks/results/)")
    add("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    add("--spec", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    train_file, dev_file = (SHARED_DATA / f"hh_helpful_{side}.jsonl" for side in ("train", "dev"))
    if arguments.data is None:
        arguments.data = str(train_file) if train_file.is_file() else "builtin"
    beside = Path(arguments.data).with_name(dev_file.name)
    if arguments.eval_data is None and beside.is_file():
        arguments.eval_data = str(beside)
    if "W3" in arguments.workloads and "W1" not in arguments.workloads:
        parser.error("W3 finds what W1 kept: give --workloads W1,W3")
    if unknown := set(arguments.workloads) - {"W1", "W2", "W3"}:
        parser.error(f"--workloads: {', '.join(unknown)} is none of W1, W2, W3")
    if unknown := [size for size in arguments.trl_batch_sizes if arguments.batch_size % size]:
        parser.error(f"--trl-batch-sizes: {unknown} do not divide --batch-size")
    return arguments


def begin(arguments: argparse.Namespace, folder: Path) -> Bench:
    """Everything that is not counted: the model unpacked, the pairs written, the machine measured."""
    bench = Bench(arguments, folder, {})
    load = os.getloadavg()[0]
    spec = {key: getattr(arguments, key) for key in ("model", "data", "eval_data", "max_length")}
    spec |= {"folder": str(folder), "device": arguments.device, "eval": arguments.eval_pairs}
    spec["train"] = max(arguments.pairs, arguments.full_pairs)
    bench.facts = bench.child("prepare", spec).report | {"load": load}
    there = {side: len(tokens) for side, tokens in bench.facts["tokens"].items()}
    for name, side in (("pairs", "train"), ("full_pairs", "train"), ("eval_pairs", "eval")):
        if getattr(arguments, name) > there[side]:
            say(f"{name}: {there[side]}, because {arguments.data} has no more that fit")
            setattr(arguments, name, there[side])
    return bench


def main() -> None:
    arguments = parse_arguments()
    if arguments.child:
        print(json.dumps(CHILDREN[arguments.child](arguments.spec)))
        return
    # An exception, so that no child and no folder is left behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    with tempfile.TemporaryDirectory(prefix="bench-dpo-") as folder:
        bench = begin(arguments, Path(folder))
        works = workloads(arguments)
        lines = [*header(bench), *table(bench, works, measure(bench, works))]
        if arguments.growth:
            lines += growth(bench)
        text = "\n".join(lines) + "\n"
        print(text, end="")
        if arguments.output is not None:
            path = output_path(arguments, bench.facts)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
