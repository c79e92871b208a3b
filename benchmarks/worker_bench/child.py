"""What one build is measured at, in a process of its own: prints one JSON object.

    python child.py '{"kind": "steps", ...}'

It runs in builds from before and after there were workers, so it asks for nothing that only one of
them has. Other busy processes are started when everything is loaded, and end when it ends.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

if find_spec("smoldpo.utils.workers"):  # as the command line of that build sets it
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

BUSY = "import time\nend = time.monotonic() + {seconds}\nwhile time.monotonic() < end: pass"


class Neighbours:
    """Busy processes, for a bounded time."""

    def __init__(self, count: int, seconds: float):
        code = BUSY.format(seconds=seconds)
        self._all = [subprocess.Popen([sys.executable, "-S", "-c", code]) for _ in range(count)]
        if count:
            time.sleep(0.5)

    def end(self) -> None:
        """Stop them."""
        for process in self._all:
            process.kill()
            process.wait()


def steps(spec: dict[str, Any]) -> dict[str, Any]:
    """Seconds of the first pass, without neighbours, and of optimizer steps beside them."""
    from smoldpo.config.load import build_config
    from smoldpo.training.loop import train
    from smoldpo.training.run import load_inputs
    from smoldpo.training.state import TrainingState
    from smoldpo.utils import progress

    config = build_config(
        {
            "data": spec["data"],
            "freeze_layers": spec["freeze_layers"],
            "max_train_samples": spec["pairs"],
            "max_eval_samples": 8,
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "max_steps": spec["steps"],
            "dtype": spec["dtype"],
            "compile": "off",
            "cache": "memory",
            "logging_steps": 10_000,
        }
    )
    with progress.silenced():
        inputs = load_inputs(config)
        engine, pairs = inputs.models.engine, inputs.data.train
        begun = time.perf_counter()
        engine.prepare(pairs)
        first_pass = time.perf_counter() - begun
        neighbours = Neighbours(spec["busy"], spec["limit"] + 5)
        ended = [time.perf_counter()]

        def after_step(_: int) -> bool:
            ended.append(time.perf_counter())
            return ended[-1] - ended[0] > spec["limit"]

        try:
            train(
                engine,
                pairs,
                config,
                SimpleNamespace(log=lambda _: None),
                starts_at_reference=True,
                after_step=after_step,
                watch=lambda *_, **__: None,
                state=TrainingState(engine, config, inputs.models.trainable.rates),
            )
        finally:
            neighbours.end()
    seconds = [after - before for before, after in itertools.pairwise(ended)]
    return {"first_pass": first_pass / len(pairs), "steps": seconds[1:] or seconds}


def answers(spec: dict[str, Any]) -> dict[str, Any]:
    """Seconds a token of answers side by side, after a short warm-up."""
    import torch

    from smoldpo.data.load import load_pairs
    from smoldpo.data.tokenize import PairTokenizer
    from smoldpo.engine.precision import cast_frozen
    from smoldpo.evaluation.side_by_side import GENERATION_BATCH_SIZE
    from smoldpo.models.generate import generate_answers
    from smoldpo.models.load import find_model, load_model, load_tokenizer

    source = find_model("builtin")
    tokenizer = load_tokenizer(source)
    model = cast_frozen(load_model(source, torch.float32), getattr(torch, spec["dtype"]))
    reader = PairTokenizer(tokenizer, 512)
    pairs = load_pairs(spec["data"]).pairs[: spec["pairs"]]
    prompts = [reader.prompt_ids(pair.prompt) for pair in pairs]

    def said(tokens: int) -> tuple[int, float]:
        begun = time.perf_counter()
        found = generate_answers(
            model,
            tokenizer,
            prompts,
            max_new_tokens=tokens,
            temperature=1.0,
            seed=1,
            batch_size=GENERATION_BATCH_SIZE,
        )
        return sum(len(answer.ids) for answer in found), time.perf_counter() - begun

    said(2)
    tokens, seconds = said(128)
    return {"tokens": tokens, "seconds": seconds}


def choices(spec: dict[str, Any]) -> dict[str, Any]:
    """Precision and kernels, measured with nothing known from before."""
    from smoldpo.engine.autotune import choose_kernels, compute_dtype, forget_choices

    neighbours = Neighbours(spec["busy"], 60)
    try:
        forget_choices()
        dtype, why = compute_dtype("auto", "cpu")
        return {"dtype": str(dtype), "why": why, "kernels": str(choose_kernels(dtype, "cpu"))}
    finally:
        neighbours.end()


if __name__ == "__main__":
    told = json.loads(sys.argv[1])
    print(json.dumps({"steps": steps, "answers": answers, "choices": choices}[told["kind"]](told)))
