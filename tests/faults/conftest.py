"""Small runs to kill, starve and resume."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from conftest import rows
from faults import child, planted
from smoldpo.training.checkpoint import saved_steps

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
            "--per-device-train-batch-size", 2, "--gradient-accumulation-steps", 2,
            "--learning-rate", "1e-2", "--num-train-epochs", 3, "--dtype", "float32", "--device",
            "cpu", "--freeze-layers", 2, "--compile", "off", "--sample-prompt", "none",
            "--stream-tokens",
            200, "--warmup-ratio", 0,
            "--generate-prompts", 0, "--save-steps", 2, "--eval-steps", 5, *more,
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

    def killed(
        self, *words: object, plant=planted.kill_in_step, at: object, environment=None
    ) -> None:
        """Run it until it kills itself: in the step after `at` finished ones, or where `plant`
        says.
        """
        told = {"plant": plant, "planted_with": (at,), "environment": environment}
        code, said = self.run(*words, **told)
        assert code == -signal.SIGKILL, said

    def __truediv__(self, name: str) -> Path:
        return self.folder / name


def workplace(folder: Path, model: Path) -> Workplace:
    """With fifteen pairs to train on, so that an epoch has four steps, and three held out."""
    pairs = folder / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows(18)))
    return Workplace(folder, model, pairs)


@pytest.fixture(scope="session")
def often(server, tmp_path_factory, tiny_folder) -> Workplace:
    """For runs that many tests copy or compare with; what is compared names no path, so once will
    do.
    """
    return workplace(tmp_path_factory.mktemp("often"), tiny_folder)


@pytest.fixture(scope="session")
def whole(often) -> Path:
    """The run as it comes out when nothing happens to it."""
    often.ok(*often.training("whole"))
    return often / "whole"


@pytest.fixture(scope="session")
def stopped_once(often) -> Path:
    often.killed(*often.training("stopped"), at=6)
    assert saved_steps(often / "stopped" / "checkpoints") == [4, 6]
    return often / "stopped"


@pytest.fixture
def stopped(place, stopped_once) -> Path:
    """That run killed in its seventh step, with checkpoints of steps 4 and 6: a copy of its own."""
    return Path(shutil.copytree(stopped_once, place / "run"))


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
def place(tmp_path, tiny_folder) -> Workplace:
    return workplace(tmp_path, tiny_folder)
