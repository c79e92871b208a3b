"""What the benchmark's child processes do. They alone import torch, transformers and smoldpo.

python children.py NAME SPEC    a name of CHILDREN, and its arguments as JSON; says JSON
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

SHAPES = ((512, 576, 1536), (1024, 576, 1536), (2048, 576, 1536))
SKIP = 2
"""TRL's first micro-batches, which allocate and warm up, are not timed."""


def prepare(spec: dict[str, Any]) -> dict[str, Any]:
    """Unpack the model, write the pairs that both sides read, count their tokens, measure matmuls.

    Pairs longer than max_length are left out: the trainers cut them differently.
    """
    import torch

    from smoldpo.data.load import load_training_data
    from smoldpo.data.tokenize import PairTokenizer
    from smoldpo.engine.autotune import compute_dtype
    from smoldpo.models.freeze import layer_of
    from smoldpo.models.load import find_model, load_model, load_tokenizer
    from smoldpo.utils.devices import pick_device

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
    """Write the first pairs that fit into max_length; returns the tokens of prompt and
    completions.
    """
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
    """TRL's DPOTrainer over a sample of the pairs: start-up, and the pace of each part of its
    work.
    """
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from smoldpo.config.layer_spec import LayerSelection
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
    freeze(model, LayerSelection(spec["freeze_layers"]))
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


if __name__ == "__main__":
    print(json.dumps(CHILDREN[sys.argv[1]](json.loads(sys.argv[2]))))
