"""Faults 5, 6, 8 and 10: told to stop, no disk, no number, no memory; and what resume refuses
(12).
"""

import json
import shutil
import signal
from pathlib import Path

import pytest

from conftest import rows
from faults import planted
from faults.conftest import workplace
from smoldpo.training.checkpoint import load_checkpoint, saved_steps, verify
from smoldpo.training.prove_resume import differences, metrics

ANSWERS = ["--generate-prompts", 2, "--max-new-tokens", 4]
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


@pytest.mark.parametrize(
    "where, step, number",
    [
        ("step", 4, signal.SIGINT),
        ("optimizer", 5, signal.SIGTERM),
        ("evaluation", 10, signal.SIGINT),
        ("last evaluation", 12, signal.SIGTERM),
        ("answers", 12, signal.SIGINT),
        ("pass", 0, signal.SIGTERM),
        ("save", 4, signal.SIGINT),
    ],
)
def test_told_to_stop(place, whole, where, step, number):
    """Fault 6: a complete checkpoint of the last finished step, the exit code, and how to go on."""
    words = place.training("run", "--save-steps", "none" if where != "save" else 2)
    if where == "answers":
        words += ANSWERS
        place.ok(*place.training("whole", *ANSWERS))
        whole = place / "whole"
    code, said = place.run(
        *words,
        plant=planted.signal_in,
        planted_with=(where, number),
        environment={"XDG_CACHE_HOME": str(place / "other-cache")},
    )
    assert code == CODES[number], said
    assert f"interrupted after {step} steps" in said and "smoldpo resume run" in said
    assert saved_steps(place / "run" / "checkpoints")[-1] == step
    assert verify(place / "run" / "checkpoints" / f"step-{step}")
    said = place.ok("resume", "run", environment={"XDG_CACHE_HOME": str(place / "other-cache")})
    assert f"goes on after step {step} of 12" in said
    assert "are there from earlier runs" in said, "the first pass goes on where it stopped"
    assert differences(whole, place / "run") == []


@pytest.mark.parametrize("number", CODES)
def test_an_export_that_is_stopped_leaves_nothing(place, number):
    code, said = place.run(
        *("export", place.model, "--to", "gguf", "--data", place.pairs),
        *("--output", "mine.gguf"),
        plant=planted.signal_in,
        planted_with=("proof of an export", number),
    )
    assert code == CODES[number] and "Traceback" not in said, said
    assert not list(place.folder.glob("*.gguf")) and not list(place.folder.glob(".mine*"))


def test_a_second_ctrl_c_stops_at_once(place):
    code, said = place.run(
        *place.training("run", "--save-steps", "none"),
        plant=planted.signal_in,
        planted_with=("step", signal.SIGINT, signal.SIGINT),
    )
    assert (
        code == 130 and "stopped at once" in said and not (place / "run" / "checkpoints").exists()
    )


def test_ctrl_c_while_loading(place):
    code, said = place.run(
        *place.training("run"), plant=planted.signal_in, planted_with=("loading", signal.SIGTERM)
    )
    assert code == 143 and "interrupted" in said and not (place / "run").exists()


def test_no_space_left_during_a_save(place, whole):
    """Fault 5: a limit on file sizes strikes in the second save's largest file, as a full disk
    would.
    """
    code, said = place.run(
        *place.training("run"), plant=planted.disk_fills_after_saves, planted_with=(1,)
    )
    assert code == 1 and "disk is full" in said and "bytes needed" in said and "step-4" in said
    kept = place / "run" / "checkpoints"
    assert saved_steps(kept) == [2] and verify(kept / "step-2")
    assert not list(kept.glob(".*"))
    place.ok("resume", "run")
    assert differences(whole, place / "run") == []


def test_a_run_that_cannot_fit_is_refused_before_it_starts(place):
    code, said = place.run(*place.training("run"), plant=planted.small_disk, planted_with=(50_000,))
    assert (
        code == 1 and "50,000 free" in said and "3 checkpoints" in said and "frozen layers" in said
    )
    assert not (place / "run").exists()


def test_a_loss_that_is_not_finite(place):
    """Fault 8: no step, the pairs kept for a look, an exit that says what to try."""
    code, said = place.run(
        *place.training("run", "--learning-rate", "1e30", "--max-grad-norm", "none")
    )
    assert (
        code == 1
        and "not finite" in said
        and "--learning-rate" in said
        and "not_finite.json" in said
    )
    kept = json.loads((place / "run" / "not_finite.json").read_text())
    steps = [row for row in metrics(place / "run") if "loss" in row]
    assert kept["step"] == steps[-1]["step"] + 1, "no step was taken on it"
    assert len(kept["pairs"]) in (3, 4) and "number" in kept["pairs"][0]["prompt"]
    assert kept["pairs"][0]["id"] in said and kept["pairs"][0]["chosen_ids"]


@pytest.mark.parametrize(
    "threads, spare, less",
    [
        (1, 5 << 20, "4,000 at once instead of 8,000 tokens"),
        (2, 40 << 20, "streams at once: 1 instead of 2"),
    ],
)
def test_out_of_memory(place, write_rows, threads, spare, less):
    """Fault 10: the address space is limited for real; the step keeps its pairs, and its
    gradients.
    """
    items = [row | {"prompt": row["prompt"] * 12} for row in rows(40)]
    write_rows(items)
    words = ["--stream-tokens", 8000, "--max-steps", 3, "--dtype", "float64"]
    words += ["--eval-steps", "none"]
    words += ["--per-device-train-batch-size", 16, "--gradient-accumulation-steps", 1]
    place.ok(*place.training("whole", *words))
    said = place.ok(
        *place.training("starved", *words),
        plant=planted.memory_runs_out_in_steps,
        planted_with=(spare,),
        environment={"OMP_NUM_THREADS": str(threads)},
    )
    # In which step is the allocator's luck: what it holds for itself serves some of them.
    assert "out of memory in step " in said and "same pairs" in said and less in said
    first, second = metrics(place / "whole"), metrics(place / "starved")
    budget = load_checkpoint(place / "starved" / "checkpoints" / "step-3").state["budget"]
    cut = [row.pop("stream_tokens", 8000) for row in second if "loss" in row]
    assert cut == sorted(cut, reverse=True) and cut[-1] == budget, "the metrics say it"
    assert threads == 2 or budget <= 4000
    for ours, theirs in zip(first, second, strict=True):
        for key, value in ours.items():
            assert theirs[key] == pytest.approx(value, rel=1e-10, abs=1e-10), key


def test_memory_is_counted_before_it_is_taken(place, write_rows):
    """Fault 10 on a CPU: with little left the step is cut before it is tried, and is the same
    step.
    """
    write_rows([row | {"prompt": row["prompt"] * 12} for row in rows(40)])
    words = [
        "--stream-tokens",
        8000,
        "--max-steps",
        3,
        "--dtype",
        "float64",
        "--eval-steps",
        "none",
    ]
    words += ["--per-device-train-batch-size", 16, "--gradient-accumulation-steps", 1]
    whole = place.ok(*place.training("whole", *words))
    assert "memory:" not in whole
    short = {"plant": planted.memory_is_short_before_training}
    said = place.ok(*place.training("short", *words), **short, planted_with=(124 << 20,))
    assert "memory: " in said and "streams at once: 1 instead of 2" in said
    assert "instead of 8,000 tokens at once" in said
    assert "out of memory" not in said
    for ours, theirs in zip(metrics(place / "whole"), metrics(place / "short"), strict=True):
        for key, value in ours.items():
            assert theirs[key] == pytest.approx(value, rel=1e-10, abs=1e-10), key
    code, said = place.run(*place.training("none", *words), **short, planted_with=(100 << 20,))
    assert code == 1 and "not enough memory to train" in said and "--freeze-layers" in said
    assert not (place / "none" / "metrics.jsonl").exists(), "no step was tried"


def test_out_of_memory_with_one_pair(place, wide_model):
    place.model = wide_model
    words = place.training("run", "--freeze-layers", 0, "--max-steps", 2)
    code, said = place.run(*words, plant=planted.memory_runs_out_in_steps, planted_with=(0,))
    assert code == 1 and "with one pair at once" in said and "--max-length" in said


@pytest.fixture(scope="module")
def changing(server, tmp_path_factory, tiny_folder):
    """A place whose model, pairs and stopped run are changed and put back."""
    folder = tmp_path_factory.mktemp("changing")
    place = workplace(folder, Path(shutil.copytree(tiny_folder, folder / "model")))
    place.killed(*place.training("stopped"), at=6)
    return place


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


CHANGES = {
    "weights": ("model.safetensors", None, None, "the model's weights"),
    "config": ("config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05', "config.json"),
    "tokenizer": (
        "tokenizer.json",
        '"ignore_merges": false',
        '"ignore_merges": true',
        "the tokenizer",
    ),
    "template": ("chat_template.jinja", "{% for", "{# another #}{% for", "the chat template"),
    "data": ("pairs.jsonl", "Question 7", "Question 77", "the preference pairs"),
    "setting": ("config.yaml", "beta: 0.1", "beta: 0.2", "beta"),
    "dtype": ("config.yaml", "dtype: float32", "dtype: bfloat16", "dtype"),
    "epochs": ("config.yaml", "num_train_epochs: 3.0", "num_train_epochs: 9.0", "--extend"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_resume_refuses_what_is_not_what_it_was(changing, what):
    """Fault 12: naming what changed; nothing is touched, and it goes on when all is put back."""
    file, old, new, words = CHANGES[what]
    run = Path(shutil.copytree(changing / "stopped", changing / what))
    there = contents(run)
    folders = (changing.model, changing.folder, run)
    path = next(folder / file for folder in folders if (folder / file).exists())
    before = path.read_bytes()
    if old is None:
        raw = bytearray(before)
        raw[-2] ^= 64
        path.write_bytes(raw)
    else:
        edit(path, old, new)
    code, said = changing.run("resume", what)
    path.write_bytes(before)
    assert code == 2 and "cannot be resumed" in said and words in said, said
    if path.is_relative_to(run):
        path.write_bytes(before)
    assert contents(run) == there == contents(changing / "stopped")
    if what == "weights":
        assert "goes on after step 6" in changing.ok("resume", what)


def test_the_reference_stays_what_it_was(place, tmp_path, other_model):
    """Fault 12: with a reference of its own, of which nothing is kept on disk; and one that
    changed.
    """
    reference = tmp_path / "reference"
    shutil.copytree(other_model, reference)
    words = ["--reference", reference, "--cache", "memory"]
    place.ok(*place.training("whole", *words))
    place.killed(*place.training("run", *words), at=6)
    kept = [load_checkpoint(place / "run" / "checkpoints" / "step-6").state["reference_sha256"]]
    edited = (reference / "model.safetensors").read_bytes()
    (reference / "model.safetensors").write_bytes(
        edited[:-2] + bytes([edited[-2] ^ 64, edited[-1]])
    )
    code, said = place.run("resume", "run")
    assert code == 2 and "the reference's weights" in said and "the model's" not in said
    (reference / "model.safetensors").write_bytes(edited)
    place.ok("resume", "run")
    kept += [
        load_checkpoint(place / run / "checkpoints" / "step-12").state["reference_sha256"]
        for run in ("run", "whole")
    ]
    assert len(set(kept)) == 1 and kept[0]
    assert differences(place / "whole", place / "run") == []


@pytest.mark.parametrize(
    "cache, engine, dtype",
    [
        ("off", "fast", "float32"),
        ("memory", "fast", "bfloat16"),
        ("cleared", "fast", "bfloat16"),
        ("off", "plain", "bfloat16"),
    ],
)
def test_exact_whatever_is_kept_between_runs(place, cache, engine, dtype):
    words = ["--engine", engine, "--cache", "disk" if cache == "cleared" else cache]
    words += ["--dtype", dtype, "--max-steps", 6]  # into the second epoch
    place.ok(*place.training("whole", *words))
    place.killed(*place.training("run", *words), plant=planted.kill_after_step, at=5)
    if cache == "cleared":
        shutil.rmtree(place / "cache")
    place.ok("resume", "run")
    assert differences(place / "whole", place / "run") == []


def test_nothing_to_resume(place):
    (place / "empty").mkdir()
    assert "no run that can be resumed" in place.run("resume", "empty")[1]
    assert place.run("resume", "nowhere")[0] == 2
    assert place.run("resume", "empty", "--extend", -1)[0] == 2
