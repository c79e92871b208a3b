"""Faults 1 to 4: killed anywhere, a run goes on to the same bits; and the comparison can fail."""

import json
import random
import shutil
import signal
import time

import pytest

from faults import planted
from faults.conftest import LONG
from smoldpo.training.checkpoint import newest, saved_steps
from smoldpo.training.fingerprint import FREE_SETTINGS, FROM_NAMES
from smoldpo.training.prove_resume import differences, metrics

KILLS = 30 if LONG else 3


def row_count(run):
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def resume_until_done(place, name):
    """Resume; a run that was killed before it began is started again."""
    if not (place / name / "resume.json").exists():
        return place.ok(*place.training(name, "--overwrite"))
    code, said = place.run("resume", name)
    assert code == 0 or "is finished" in said, said
    return said


def test_killed_at_random_moments(place, whole):
    """Fault 1. Moments are spread over the whole run, loading and saves among them."""
    draw = random.Random(6)
    died_after = set()
    for number in range(KILLS):
        name = f"killed-{number}"
        child = place.train(name, environment={"XDG_CACHE_HOME": str(place / f"cache-{number}")})
        rows = int(16 * number / KILLS)  # of 16, 12 are steps and the others evaluations
        if rows:
            child.wait_until(lambda n=name, r=rows: row_count(place / n) >= r)
        time.sleep(draw.random() * (0.05 if rows else 1))
        child.signal(signal.SIGKILL)
        child.wait()
        steps = saved_steps(place / name / "checkpoints")
        died_after.add(steps[-1] if steps else 0)
        resume_until_done(place, name)
        assert differences(whole, place / name) == []
        left = [path for path in (place / name).rglob(".*") if path.name.startswith(".step")]
        assert not left
    assert len(died_after) > 1, "the kills came at different moments"


def test_lengths_and_weights_resume_exactly(place):
    """What these losses read beside the sums is kept with the reference, or computed anew to the
    bit.
    """
    more = ("--ld-alpha", 0.3, "--use-weighting", "--loss-type", "sigmoid,sft")
    place.ok(*place.training("whole", *more))
    place.killed(*place.training("run", *more), at=5)
    place.ok("resume", "run")
    assert differences(place / "whole", place / "run") == []
    assert not {"ld_alpha", "use_weighting"} & (FREE_SETTINGS | FROM_NAMES), "no resume with others"


def test_two_steps_differ(place, whole):
    """So the comparison of a step with another one can fail."""
    rows = [row for row in metrics(whole) if "loss" in row]
    assert len({row["loss"] for row in rows}) == len(rows) == 12


def test_stopped_and_resumed_again_and_again(place, whole):
    """Fault 2: within an epoch, at its edge (4, 8), inside an accumulation group; all in a row.

    Each time the run is killed in the middle of a step, after some of its streams.
    """
    stops = [3, 4, 5, 7, 8]
    for stop in stops:
        words = place.training("run", "--save-steps", 1) if stop == 3 else ["resume", "run"]
        place.killed(*words, at=stop)
        assert saved_steps(place / "run" / "checkpoints")[-1] == stop
    assert "after step 8 of 12" in place.ok("resume", "run")
    assert differences(whole, place / "run") == []


BEGAN = {
    "contents": ("model", "reference", "configuration", "tokenizer", "chat_template", "data",
     "tokens"),
    "computing": ("dtype", "device", "frozen_layers", "threads", "engine", "kernels", "compiled"),
    "machine": (
        "processor", "smoldpo", "smoldpo's forward pass", "torch", "transformers", "tokenizers",
    ),
}  # fmt: skip
"""The keys of resume.json as the version wrote them that had no wings (0.1.0, commit 397ce02)."""


def test_a_run_that_another_version_began_goes_on_exactly(place, whole, stopped):
    """The code differs, which is said; where it computes the same, the bits are the same."""
    path = stopped / "resume.json"
    record = json.loads(path.read_text())
    began = {
        part: {key: record["began"][part][key] for key in keys} for part, keys in BEGAN.items()
    }
    began["settings"] = record["began"]["settings"]
    began["machine"] |= {"smoldpo": "0.0.9", "smoldpo's forward pass": "0123456789ab"}
    older = {"format": 1, "began": began, "folder": record["folder"], "finished": None}
    path.write_text(json.dumps(older))
    said = place.ok("resume", "run")
    assert "smoldpo 0.0.9 began this run" in said and "not bit for bit" in said
    assert "smoldpo: " in said and "was 0.0.9" in said
    assert "smoldpo's forward pass: " in said and ", was 0123456789ab" in said
    assert "after step 6 of 12" in said
    assert differences(whole, stopped) == []


def test_a_format_of_another_version_is_refused_and_the_version_named(place, stopped):
    record = json.loads((stopped / "resume.json").read_text())
    record["began"]["machine"]["smoldpo"] = "9.8.7"
    (stopped / "resume.json").write_text(json.dumps(record | {"format": 2}))
    code, said = place.run("resume", "run")
    assert code == 1 and "begun by smoldpo 9.8.7" in said and "format 2" in said
    assert saved_steps(stopped / "checkpoints"), "nothing is touched"


@pytest.fixture(scope="module")
def noisy(often):
    """Runs that draw random numbers, whole and killed."""
    alone = {"OMP_NUM_THREADS": "1"}  # two threads would draw in any order
    noisy = often.training("noisy")
    often.ok(*noisy, plant=planted.random_numbers_matter, environment=alone)
    killed = often.training("killed")
    often.killed(*killed, plant=planted.kill_in_noisy_step, at=6, environment=alone)
    return often / "noisy", often / "killed"


@pytest.mark.parametrize(
    "fault, red",
    [
        (None, ()),
        ("rng", ("weights", "optimizer", "rng", "metrics.jsonl")),
        ("moment", ("weights", "optimizer", "metrics.jsonl")),
        ("one moment", ("weights", "optimizer", "model/model.safetensors")),
        ("pair", ("weights", "optimizer", "metrics.jsonl")),
        ("step", ("weights", "optimizer", "metrics.jsonl")),
    ],
)
def test_a_fault_planted_in_the_resume_turns_the_comparison_red(place, noisy, fault, red):
    whole, killed = noisy
    shutil.copytree(killed, place / "run")
    wrong = {"plant": planted.wrong_resume, "planted_with": (fault,)}
    place.ok("resume", "run", **wrong, environment={"OMP_NUM_THREADS": "1"})
    found = differences(whole, place / "run")
    assert bool(found) == bool(fault), found
    for part in red:
        assert any(part in line for line in found), (part, found)


def test_killed_between_every_two_file_operations_of_a_save(place):
    """Fault 3: the second save, with the removal of an older checkpoint, has so many operations."""
    words = ["--keep-checkpoints", 1, "--max-steps", 6]
    place.ok(*place.training("whole", *words), plant=planted.kill_at_file_operation,
             planted_with=(0, str(place / "count")))  # fmt: skip
    saves = 3
    each = int((place / "count").read_text()) // saves
    assert each >= 12
    operations = range(each + 1, 2 * each + 2)
    for operation in operations if LONG else operations[::4]:
        name = f"run-{operation}"
        training = place.training(name, *words)
        place.killed(*training, plant=planted.kill_at_file_operation, at=operation)
        assert max(saved_steps(place / name / "checkpoints")) in (2, 4)
        said = place.ok("resume", name)
        assert "refused" not in said
        assert differences(place / "whole", place / name) == []
        assert not list((place / name / "checkpoints").glob(".*"))
        assert saved_steps(place / name / "checkpoints") == [6]


FILES = [
    "weights.safetensors",
    "optimizer.safetensors",
    "rng.safetensors",
    "state.json",
    "manifest.json",
]


@pytest.mark.parametrize("how", ["flip", "cut", "missing"])
def test_a_damaged_checkpoint_is_refused_by_name(place, whole, stopped, how):
    """Fault 4: each file in its turn; a bit of a checkpoint's file, at a random place."""
    draw = random.Random(4)
    for file in FILES:
        path = stopped / "checkpoints" / "step-6" / file
        before = path.read_bytes()
        raw = bytearray(before)
        if how == "flip":
            inside = raw.index(b"sha256") if file == "manifest.json" else draw.randrange(len(raw))
            raw[inside] ^= 1 << draw.randrange(7)
        path.write_bytes(raw if how == "flip" else raw[:-7])
        if how == "missing":
            path.unlink()
        said = []
        assert newest(stopped / "checkpoints", said.append).step == 4
        (sentence,) = said
        assert "refused" in sentence and "step-6" in sentence and file in sentence
        if file != FILES[-1]:
            path.write_bytes(before)
    told = place.ok("resume", "run")
    assert "refused" in told and FILES[-1] in told
    assert "goes on after step 4 of 12" in told
    assert differences(whole, stopped) == []


def test_with_no_checkpoint_left_the_run_begins_anew(place, whole, stopped):
    for step in (4, 6):
        (stopped / "checkpoints" / f"step-{step}" / "manifest.json").unlink()
    said = place.ok("resume", "run")
    assert said.count("refused") == 2 and "after step 0 of 12" in said
    assert differences(whole, stopped) == []


def test_a_finished_run_says_so_and_can_be_extended(place):
    place.ok(*place.training("whole"))
    whole = place / "whole"
    code, said = place.run("resume", "whole")
    assert code == 2 and "is finished (12 steps)" in said and "--extend" in said
    said = place.ok("resume", "whole", "--extend", 1)
    assert "after step 12 of 16" in said
    steps = [row["step"] for row in metrics(whole) if "loss" in row]
    assert steps == list(range(1, 17))
    assert json.loads((whole / "resume.json").read_text())["finished"] == {"total_steps": 16}
    assert "num_train_epochs: 4.0" in (whole / "config.yaml").read_text()
    assert place.run("resume", "whole")[0] == 2


def test_elsewhere_and_with_other_threads(place, whole, tmp_path):
    """Relative names mean what they meant; the bits are those of any number of threads."""
    place.pairs = "pairs.jsonl"
    place.killed(*place.training("run"), at=6)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    threads = {"OMP_NUM_THREADS": "3"}
    said = place.ok("resume", place / "run", folder=elsewhere, environment=threads)
    assert "not bit for bit" not in said
    assert differences(whole, place / "run") == []


def test_early_stopping_and_the_best_policy_come_out_the_same(place):
    words = ["--eval-steps", 2, "--load-best-model-at-end", "--early-stopping-patience", 2]
    words += ["--metric-for-best-model", "eval_accuracy/logp"]
    place.ok(*place.training("whole", *words))
    for step in (3, 7):
        name = f"run-{step}"
        code, _ = place.run(
            *place.training(name, *words), plant=planted.kill_after_step, planted_with=(step,)
        )
        if code != 0:
            place.ok("resume", name)
        assert differences(place / "whole", place / name) == []


def test_checkpoints_by_the_clock(place, whole):
    """Every so many minutes; here each step takes longer than that."""
    words = ["--save-steps", "none", "--save-minutes", "1e-9", "--keep-checkpoints", 100]
    place.ok(*place.training("run", *words))
    assert saved_steps(place / "run" / "checkpoints") == list(range(1, 13))
    place.ok(*place.training("never", "--save-steps", "none", "--save-minutes", "none"))
    assert not (place / "never" / "checkpoints").exists()
    for name in ("run", "never"):
        assert metrics(place / name) == metrics(whole), "saving changes nothing"
