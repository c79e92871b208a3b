"""`smoldpo doctor`: what it finds, and a check of resumes that can fail."""

import json

import pytest

from conftest import keep_entry
from faults import child, planted
from smoldpo.cli import doctor
from smoldpo.engine.cache import folder as cache
from smoldpo.training import prove_resume


def test_it_looks_at_everything(cli, monkeypatch):
    result = cli("doctor", "--json")
    found = json.loads(result.out)
    assert set(found) == {
        "machine", "versions", "precision", "compiler", "disk", "cache", "builtin_model",
        "problems",
    }  # fmt: skip
    assert found["precision"]["gflops"]["float32"] > 0 and found["cache"]["entries"] == 0
    assert result.code == (1 if found["problems"] else 0)


def test_damage_in_the_cache_is_named(cli, tiny_folder, pairs_file):
    result = cli(
        "train", "--model", tiny_folder, "--data", pairs_file, "--max-steps", 1, "--freeze-layers",
        2, "--dtype", "float32", "--sample-prompt", "none", "--generate-prompts", 0,
        "--output-dir", "run",
    )  # fmt: skip
    assert result.code == 0
    before = {entry.folder: entry.used for entry in cache.entries()}
    assert json.loads(cli("doctor", "--json").out)["cache"]["damaged"] == []
    assert {entry.folder: entry.used for entry in cache.entries()} == before, "looking is not using"
    for pattern in ("*.states", "logps.json"):
        [path] = cache.cache_folder().rglob(pattern)
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
        result = cli("doctor")
        assert result.code == 1 and "is damaged" in result.out and str(path) in result.out
        assert "cache clear" in result.out


def test_little_room_is_a_problem(cli, monkeypatch):
    monkeypatch.setattr(doctor, "free_bytes", lambda _: 1000)
    result = cli("doctor")
    assert result.code == 1 and "little disk space" in result.out


def test_an_index_that_is_no_index(cli):
    folder = keep_entry("trunk", "aa11", 1000, 1)
    (folder / "one.json").write_text("[]")
    assert "one.states is damaged" in cli("doctor").out


def test_the_command_runs_in_a_process_of_its_own(tmp_path):
    process = prove_resume._smoldpo(tmp_path, "--version")
    assert process.communicate() == (None, "") and process.returncode == 0


class Forked:
    """A process that can be killed, forked from one that has imported everything."""

    plant = None
    """What is planted in the one that resumes."""

    def __init__(self, folder, *words):
        plant = self.plant if words[0] == "resume" else None
        self._child = child.start(*words, log=folder / f"{words[0]}.txt", plant=plant)

    @property
    def returncode(self):
        return self._child.process.exitcode

    def poll(self):
        return self.returncode

    def send_signal(self, number):
        self._child.signal(number)

    def communicate(self):
        self._child.wait()
        return "", self._child.said


class Wrong(Forked):
    plant = staticmethod(planted.resume_skips_a_pair)


@pytest.fixture
def proved(cli, monkeypatch):
    """What the command finds after one kill."""

    def run(process):
        child.prepare_server()
        monkeypatch.setattr(prove_resume, "KILLS", 1)
        monkeypatch.setattr(prove_resume, "_smoldpo", process)
        result = cli("doctor", "--prove-resume", "--json")
        found = json.loads(result.out)
        assert found["kills"] and found["steps"] == 12
        return result.code, found

    return run


def test_a_resume_is_compared_with_a_whole_run(proved):
    """Real processes, really killed."""
    code, found = proved(Forked)
    assert code == 0 and found["proven"] and not found["differences"]


def test_a_resume_that_skips_a_pair_is_not_proven(proved):
    code, found = proved(Wrong)
    assert code == 1 and not found["proven"] and found["differences"]
