"""A sweep that is killed or told to stop, between trials and within one, comes out as if it had not
been.
"""

import json
import signal

import pytest
import yaml

from faults import planted

PLACES = ["pairs", "beginning", "step", "figures", "end", "after", "winner", "results"]


@pytest.fixture
def sweep(place):
    """The words of a sweep of three trials into a folder of that name."""

    def words(name):
        plain = {
            "model": str(place.model), "data": str(place.pairs), "eval_fraction": 0.5,
            "max_steps": 5, "dtype": "float32", "device": "cpu", "compile": "off",
            "freeze_layers": 2, "warmup_ratio": 0, "per_device_train_batch_size": 4,
            "sample_prompt": "none", "generate_prompts": 0, "save_steps": 1,
            "sweep": {"learning_rate": [3e-4, 3e-2, 3e-3]},
        }  # fmt: skip
        (place / "mine.yaml").write_text(yaml.safe_dump(plain))
        return ["sweep", "mine.yaml", "--output-dir", name]

    return words


def outcome(folder):
    """All that a sweep found, but for what a clock says, and the winner's weights."""
    results = json.loads((folder / "results.json").read_text())
    for trial in results["trials"]:
        trial.pop("seconds")
    rows = []
    for number in (1, 2, 3):
        text = (folder / f"trials/00{number}/metrics.jsonl").read_text()
        rows.append([json.loads(line) | {"seconds": 0} for line in text.splitlines()])
    return results, rows, (folder / "best/model/model.safetensors").read_bytes()


WHOLE = []
"""How the sweep comes out when nothing happens to it; no path stands in it, so once will do."""


@pytest.fixture
def whole(place, sweep):
    if not WHOLE:
        place.ok(*sweep("whole"))
        WHOLE.append(outcome(place / "whole"))
    return WHOLE[0]


def test_killed_anywhere_and_resumed(place, sweep, whole):
    for where in PLACES:
        place.killed(*sweep(where), plant=planted.kill_in_sweep, at=where)
        said = place.ok("resume", where)
        assert ("goes on after step 3" in said) == (where == "step"), said
        assert ("goes on after step" in said) == (where in ("step", "figures")), where
        begun = [f"trial {number} of 3: learning_rate" in said for number in (1, 2, 3)]
        if where in ("winner", "results"):
            assert not any(begun), "finished trials are kept"
        else:
            assert begun == [where == "pairs", where != "after", True], (where, said)
        assert outcome(place / where) == whole, where


def test_killed_twice_and_given_again(place, sweep, whole):
    """The sweep's own command goes on as well; a second kill in another trial is no worse."""
    for trial in (1, 3):
        code, _ = place.run(
            *sweep("out"), plant=planted.kill_in_sweep, planted_with=("step", trial)
        )
        assert code == -signal.SIGKILL
    said = place.ok(*sweep("out"))
    assert "trial 2 of 3" not in said and "goes on after step 3" in said
    assert outcome(place / "out") == whole


def test_told_to_stop(place, sweep, whole):
    code, said = place.run(
        *sweep("out"), plant=planted.signal_in, planted_with=("step", signal.SIGINT)
    )
    assert code == 130
    assert "interrupted in trial 1 of 3" in said and "smoldpo resume" in said
    said = place.ok("resume", "out")
    assert "goes on after step 4" in said
    assert outcome(place / "out") == whole


def test_told_to_stop_while_loading(place, sweep, whole):
    found, said = place.run(
        *sweep("out"), plant=planted.signal_in, planted_with=("loading", signal.SIGTERM)
    )
    assert found == 143 and "interrupted in trial 1 of 3" in said
    place.ok("resume", "out")
    assert outcome(place / "out") == whole
