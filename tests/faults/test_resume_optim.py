"""Killed and resumed to the same bits: every optimizer, rates by pattern, averages, a moving
reference.
"""

import importlib.util
import shutil

import pytest

from faults import planted
from smoldpo.training.checkpoint import load_checkpoint
from smoldpo.training.prove_resume import differences

MOVING = ["--sync-ref-model", "--ref-model-sync-steps", 3, "--ref-model-mixup-alpha", 0.5]
AVERAGED = ["--ema-decay", 0.9]
CASES = {
    "adafactor, averaged": ["--optim", "adafactor", *AVERAGED],
    "momentum, moving": ["--optim", "sgd", "--sgd-momentum", 0.9, *MOVING],
    "rates": ["--learning-rates", "norms=1e-3", "--lr-scheduler-type", "warmup_stable_decay"],
    "the best average": [*AVERAGED, *MOVING, "--load-best-model-at-end"],
    "8 bits": ["--optim", "adamw_8bit"],
}


@pytest.mark.parametrize("name", CASES)
def test_killed_in_a_step_and_resumed(place, name):
    if name == "8 bits" and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    place.ok(*place.training("whole", *CASES[name]))
    place.killed(*place.training("run", *CASES[name]), at=7)
    assert "after step 6 of 12" in place.ok("resume", "run")
    assert differences(place / "whole", place / "run") == []


def test_the_plain_engine_with_a_moving_reference(place):
    words = ["--engine", "plain", "--save-steps", 1, *MOVING]
    place.ok(*place.training("whole", *words))
    for step in (2, 7):  # before the first move, and after the second
        name = f"run-{step}"
        place.killed(*place.training(name, *words), plant=planted.kill_after_step, at=step)
        place.ok("resume", name)
        assert differences(place / "whole", place / name) == []


@pytest.fixture(scope="module")
def moving(often):
    """A run with averaged weights and a moving reference, whole and killed in its eighth step."""
    words = [*AVERAGED, *MOVING]
    often.ok(*often.training("moving", *words))
    often.killed(*often.training("killed-moving", *words), at=7)
    return often / "moving", often / "killed-moving"


@pytest.mark.parametrize(
    "fault, red",
    [("average", ("averaged", "model/model")), ("reference", ("weights", "reference"))],
)
def test_what_a_resume_forgets_turns_the_comparison_red(place, moving, fault, red):
    whole, killed = moving
    shutil.copytree(killed, place / "run")
    kept = load_checkpoint(place / "run" / "checkpoints" / "step-6")
    assert kept.state["reference_syncs"] == 2 and kept.tensors["averaged"]
    assert kept.tensors["reference"].keys() == kept.tensors["weights"].keys()
    place.ok("resume", "run", plant=planted.wrong_resume, planted_with=(fault,))
    found = differences(whole, place / "run")
    for part in red:
        assert any(part in line for line in found), (part, found)


def test_another_value_is_another_run(place, moving):
    shutil.copytree(moving[1], place / "run")
    path = place / "run" / "config.yaml"
    text = path.read_text()
    for setting, value in (("ema_decay: 0.9", "ema_decay: 0.8"), ("alpha: 0.5", "alpha: 0.6")):
        path.write_text(text.replace(setting, value))
        code, said = place.run("resume", "run")
        assert code == 2 and f"is {value.split()[1]}, and was" in said
