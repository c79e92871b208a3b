"""How many cores a process may use, and torch's threads in a block."""

import os

import pytest
import torch

from smoldpo.utils import threads
from smoldpo.utils.threads import computing, default_threads, torch_threads, usable_cores


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Four cores of two threads each, and a container without a limit."""
    topology, group = tmp_path / "cpu", tmp_path / "cgroup"
    group.mkdir()
    (group / "cpu.max").write_text("max 100000")
    for number in range(8):
        folder = topology / f"cpu{number}" / "topology"
        folder.mkdir(parents=True)
        folder.joinpath("thread_siblings_list").write_text(f"{number % 4},{number % 4 + 4}")
    monkeypatch.setattr(threads, "CONTROL_GROUP", group)
    monkeypatch.setattr(threads, "TOPOLOGY", topology)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return group


def test_threads_of_one_core_count_once(machine):
    assert usable_cores() == default_threads() == 4


def test_affinity_counts(machine, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 4, 5}, raising=False)
    assert usable_cores() == 2


@pytest.mark.parametrize("limit, cores", [("250000 100000", 2), ("50000 100000", 1), ("x", 4)])
def test_a_containers_limit_counts(machine, limit, cores):
    (machine / "cpu.max").write_text(limit)
    assert usable_cores() == cores


def test_without_a_topology_each_processor_counts(machine, monkeypatch, tmp_path):
    monkeypatch.setattr(threads, "TOPOLOGY", tmp_path / "none")
    assert usable_cores() == 8


@pytest.mark.parametrize(
    "value, count", [("3", 3), ("3,2", 3), (" 2 ", 2), ("", 4), ("many", 4), ("0", 4)]
)
def test_openmps_number_is_the_default(machine, monkeypatch, value, count):
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert default_threads() == count


def test_torchs_threads_are_put_back():
    before = torch.get_num_threads()
    with pytest.raises(ValueError), torch_threads(before + 2):
        assert torch.get_num_threads() == before + 2
        raise ValueError
    assert torch.get_num_threads() == before
    with computing(5):
        assert torch.get_num_threads() == 5
    assert torch.get_num_threads() == before
