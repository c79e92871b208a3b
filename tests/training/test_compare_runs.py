"""Two runs are equal only if every file of their models is."""

import shutil
from pathlib import Path

import pytest

import smoldpo
from conftest import rows
from smoldpo.training.prove_resume import differences


@pytest.fixture
def runs(tiny_folder, tmp_path, monkeypatch) -> list[Path]:
    """A run with a checkpoint of its end and a model in two files, and a copy of it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    one, other = tmp_path / "one", tmp_path / "other"
    smoldpo.train(
        model=str(tiny_folder), data=rows(20), output_dir=str(one), max_steps=2, save_steps=1,
        generate_prompts=0, sample_prompt=None,
    )  # fmt: skip
    model = one / "model"
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    shutil.copy(
        model / "model-00001-of-00002.safetensors", model / "model-00002-of-00002.safetensors"
    )
    shutil.copytree(one, other)
    return [one, other]


def test_equal_runs_are_equal(runs):
    assert differences(*runs) == []


def test_every_file_of_a_model_counts(runs):
    second = runs[1] / "model" / "model-00002-of-00002.safetensors"
    changed = bytearray(second.read_bytes())
    changed[-1] ^= 1
    second.write_bytes(changed)
    assert differences(*runs) == ["model/model-00002-of-00002.safetensors"]
    second.unlink()
    assert differences(*runs) == ["model/model-00002-of-00002.safetensors"]


def test_without_a_model_nothing_is_equal(runs):
    for run in runs:
        shutil.rmtree(run / "model")
    assert differences(*runs) == ["model: neither run has saved one"]
