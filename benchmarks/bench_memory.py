"""Peak memory of whole runs, phase by phase, on a random model of SmolLM2-1.7B's shape in bfloat16
files.

    python benchmarks/bench_memory.py [--layers 24] [--pairs 5] [--folder FOLDER]

A model is made first (3.4 GB on disk, gone afterwards unless --folder says where to keep it). Then
`smoldpo train`, each in a process of its own, with the upper two layers training and with adapters
on all layers, over a few of the built-in pairs, computing in float32, answers included. What memory
takes does not depend on the weights.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from smoldpo.models.load import find_model, load_tokenizer


def make_model(folder: Path, layers: int) -> None:
    """SmolLM2-1.7B with random weights, the built-in model's tokenizer, and so many layers."""
    tokenizer = load_tokenizer(find_model("builtin"))
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def phases(model: Path, folder: Path, pairs: int, more: list[str]) -> dict[str, float]:
    """Peaks up to the end of each phase of a run, in MB (10^6 bytes)."""
    settings = f"""
        --model {model} --max-train-samples {pairs} --max-eval-samples 3 --num-train-epochs 1
        --max-length 96 --dtype float32 --generate-prompts 2 --max-new-tokens 16 --cache off
        --output-dir {folder}""".split()
    command = [sys.executable, "-m", "smoldpo", "train", *settings, *more]
    print(" ".join(command[2:]), flush=True)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, said = process.communicate()
    if process.returncode:
        sys.exit(said.decode())
    timings = json.loads((folder / "timings.json").read_text())
    return {phase: row["peak_mb"] for phase, row in timings.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--pairs", type=int, default=5, help="to train on")
    parser.add_argument("--folder", type=Path, help="keeps model and runs; else they are temporary")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        model = folder / "model"
        folder.mkdir(parents=True, exist_ok=True)
        if not (model / "config.json").exists():
            make_model(model, arguments.layers)
        ways = {
            "upper two layers": ["--freeze-layers", str(arguments.layers - 2)],
            "adapters on all layers": ["--use-peft"],
        }
        for number, (name, more) in enumerate(ways.items()):
            peaks = phases(model, folder / f"run-{number}-{os.getpid()}", arguments.pairs, more)
            print(f"{name}: " + ", ".join(f"{phase} {mb:,.0f} MB" for phase, mb in peaks.items()))


if __name__ == "__main__":
    main()
