"""Checkpoints as files, and the random generators in them. What kills do to them: tests/faults."""

import json
import random

import numpy
import pytest
import torch

from smoldpo.training.checkpoint import (
    Checkpoint,
    DamagedError,
    load_checkpoint,
    newest,
    prune,
    remove_partial,
    save_checkpoint,
    saved_steps,
    verify,
)
from smoldpo.utils import rng
from smoldpo.utils.errors import SmoldpoError


def some(step, value=1.0):
    weights = {"a.b": torch.full((3, 2), value), "c": torch.arange(4.0)}
    return Checkpoint(step, {"weights": weights, "optimizer": {}}, {"best": {"value": 0.1 + 0.2}})


def test_what_is_saved_is_what_is_loaded(tmp_path):
    path = save_checkpoint(tmp_path, some(7))
    assert path.name == "step-7" and [p.name for p in tmp_path.iterdir()] == ["step-7"]
    found = load_checkpoint(path)
    assert found.step == 7 and found.state["best"] == {"value": 0.1 + 0.2}
    assert torch.equal(found.tensors["weights"]["a.b"], torch.ones(3, 2))
    assert found.tensors["optimizer"] == {}


def test_one_that_is_there_stays_unless_it_is_damaged(tmp_path):
    path = save_checkpoint(tmp_path, some(7))
    save_checkpoint(tmp_path, some(7, 2.0))
    assert load_checkpoint(path).tensors["weights"]["a.b"][0, 0] == 1
    (path / "state.json").write_text("{}")
    save_checkpoint(tmp_path, some(7, 2.0))
    assert load_checkpoint(path).tensors["weights"]["a.b"][0, 0] == 2


def test_every_bit_counts(tmp_path):
    path = save_checkpoint(tmp_path, some(1))
    for name in verify(path):
        raw = (path / name).read_bytes()
        for at in range(0, len(raw), 7):
            changed = bytearray(raw)
            changed[at] ^= 1 << at % 8
            (path / name).write_bytes(changed)
            with pytest.raises(DamagedError, match=name):
                load_checkpoint(path)
        (path / name).write_bytes(raw)
    load_checkpoint(path)


def test_a_checkpoint_under_another_name_is_refused(tmp_path):
    save_checkpoint(tmp_path, some(1)).rename(tmp_path / "step-9")
    said = []
    assert newest(tmp_path, said.append) is None and "holds step 1" in said[0]


def test_the_newest_stay_and_what_is_protected(tmp_path):
    for step in (2, 4, 10, 12):
        save_checkpoint(tmp_path, some(step))
    prune(tmp_path, 10, 2)  # 12 was refused, so it is neither counted nor removed
    assert saved_steps(tmp_path) == [4, 10, 12]
    prune(tmp_path, 12, 1, {4})
    assert saved_steps(tmp_path) == [4, 12]
    prune(tmp_path, 12, 9)
    assert saved_steps(tmp_path) == [4, 12]


@pytest.mark.parametrize("keep", [1, 2, 3, 5])
def test_as_many_stay_as_are_asked_for(tmp_path, keep):
    for step in range(1, 8):
        save_checkpoint(tmp_path, some(step))
        prune(tmp_path, step, keep)
        assert saved_steps(tmp_path) == list(range(1, step + 1))[-keep:]


def test_leftovers_are_swept_and_nothing_else(tmp_path):
    save_checkpoint(tmp_path, some(1))
    (tmp_path / ".step-3-abc").mkdir()
    (tmp_path / ".step-3-abc" / "weights.safetensors").write_text("half")
    (tmp_path / "notes").write_text("mine")
    remove_partial(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "step-1"]


def test_every_generator_goes_on_where_it_was():
    rng.seed_everything(3)
    draw = [random.random(), random.gauss(0, 1), numpy.random.rand(), numpy.random.randn()]
    draw.append(torch.rand(3).tolist())
    kept = rng.capture()
    first = [random.gauss(0, 1), random.random(), numpy.random.randn(), torch.randn(2).tolist()]
    rng.seed_everything(4)
    rng.restore(*kept)
    again = [random.gauss(0, 1), random.random(), numpy.random.randn(), torch.randn(2).tolist()]
    assert first == again
    rng.seed_everything(3)
    assert draw[0] == random.random()


@pytest.mark.parametrize("maker, error", [("9.8.7", SmoldpoError), (None, DamagedError)])
def test_a_format_of_another_version_is_refused_and_the_version_named(tmp_path, maker, error):
    """And not passed over for an older checkpoint, as a damaged one is."""
    save_checkpoint(tmp_path, some(1))
    path = save_checkpoint(tmp_path, some(2))
    for name, more in (("manifest.json", {}), ("state.json", {"smoldpo": maker})):
        plain = json.loads((path / name).read_text())
        (path / name).write_text(json.dumps(plain | {"format": 2} | more))
    with pytest.raises(
        SmoldpoError, match=r"by smoldpo 9\.8\.7 in format 2|names format 2"
    ) as refused:
        load_checkpoint(path)
    assert type(refused.value) is error
    if maker:
        with pytest.raises(SmoldpoError, match="resume the run with smoldpo 9"):
            newest(tmp_path, print)
    else:
        assert newest(tmp_path, print).step == 1
