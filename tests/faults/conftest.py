"""Small runs to kill, starve and resume."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest

from conftest import rows
from faults import child

LONG = os.environ.get("SMOLDPO_FAULTS") == "long"
"""`make faults`: thirty kills instead of a few."""


@pytest.fixture(scope="session", autouse=True)
def server():
    child.prepare_server()


class Workplace:
    """A folder with a model's name, pairs, a cache of its own, and a way to run smoldpo in it."""

    def __init__(self, folder: Path, model: Path, pairs: Path):
        self.folder, self.model, self.pairs = folder, model, pairs
        self._numbers = itertools.count()

    def train(self, name: str, *more: object, **options):
        return self.start(*self.training(name, *more), **options)

    def training(self, name: str, *more: object) -> list[object]:
        return [
            "train", "--model", self.model, "--data", self.pairs, "--output-dir", name,
            "--per-device-train-batch-size", 2, "--gradient-accumulation-steps", 4,
            "--learning-rate", "1e-2", "--num-train-epochs", 3, "--dtype", "float32", "--device", "cpu",
            "--freeze-layers", 2, "--compile", "off", "--sample-prompt", "none", "--max-tokens", 400,
            "--warmup-ratio", 0,
            "--generate-prompts", 2, "--max-new-tokens", 4, "--save-steps", 2, "--eval-steps", 5, *more,
        ]  # fmt: skip

    def start(self, *words: object, environment: dict | None = None, **options) -> child.Child:
        environment = {"XDG_CACHE_HOME": str(self.folder / "cache")} | (environment or {})
        log = self.folder / f"said-{next(self._numbers)}.txt"
        return child.start(*words, log=log, environment=environment, **options)

    def run(self, *words: object, **options) -> tuple[int, str]:
        started = self.start(*words, **options)
        return started.wait(), started.said

    def ok(self, *words: object, **options) -> str:
        code, said = self.run(*words, **options)
        assert code == 0, said
        return said

    def __truediv__(self, name: str) -> Path:
        return self.folder / name


@pytest.fixture(scope="session")
def whole(server, tmp_path_factory, tiny_folder) -> Path:
    """The run as it comes out when nothing happens to it; what is compared names no path, so once will do."""
    folder = tmp_path_factory.mktemp("whole")
    pairs = folder / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows(40)))
    place = Workplace(folder, tiny_folder, pairs)
    place.ok(*place.training("whole"))
    return place / "whole"


@pytest.fixture(scope="session")
def other_model(tmp_path_factory, tiny_tokenizer, tiny_config) -> Path:
    """The tiny model with other random weights."""
    import torch
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("other-model")
    torch.manual_seed(1)
    LlamaForCausalLM(tiny_config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def wide_model(tmp_path_factory, tiny_tokenizer, tiny_config) -> Path:
    """A model whose gradients alone need more memory than everything before the first step."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = tiny_config.to_dict() | {"hidden_size": 512, "intermediate_size": 2048, "head_dim": 128}
    folder = tmp_path_factory.mktemp("wide-model")
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def place(tmp_path, tiny_folder, write_rows) -> Workplace:
    return Workplace(tmp_path, tiny_folder, write_rows(rows(40)))
