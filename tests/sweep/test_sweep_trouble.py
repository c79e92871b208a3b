"""Sweeps that fail, are refused, or take another's place."""

import importlib.util
import json
import shutil
import sys

import pytest
import yaml

from smoldpo.sweep import run as sweep_run
from smoldpo.sweep import splits, trials
from smoldpo.training import run_folder
from smoldpo.utils.errors import SmoldpoError
from sweeping import results


def test_a_failed_trial_is_recorded_and_the_rest_go_on(sweep, cli, out):
    said = sweep({"learning_rate": [1e-3, 1e30], "beta": [0.1, 0.2]}, code=1)
    found = results(out)
    assert found["failed"] == [3, 4] and found["done"] == 2 and found["winner"] in (1, 2)
    assert "2 of 4 trials failed" in said.err and "not finite" in said.err
    assert (out / "trials/003/not_finite.json").exists()
    assert "not finite" in found["trials"][2]["error"] and found["trials"][2]["accuracy"] is None
    assert "not finite" in (out / "report.html").read_text()
    assert found["comparisons"] == 1, "of the two that are done"
    again = cli("resume", "out")
    assert again.code == 1 and results(out) == found, "a failed trial is not made again"


def test_where_every_trial_fails(sweep, out):
    said = sweep({"learning_rate": [1e30]}, code=1)
    found = results(out)
    assert found["winner"] is None and found["final"] is None
    assert "None of 1 trials came to its end" in said.out and (out / "report.html").exists()


def test_too_deep_a_freeze_fails_that_trial_alone(sweep, out):
    sweep({"freeze_layers": [2, 9]}, code=1)
    assert "freeze_layers is 9, but the model has 4 layers" in results(out)["trials"][1]["error"]


def test_a_full_disk_stops_the_sweep_and_fails_no_trial(sweep, cli, out, monkeypatch):
    from smoldpo.utils.errors import DiskError

    def full(*_):
        raise DiskError("not enough disk space")

    with monkeypatch.context() as patch:
        patch.setattr(trials, "require_disk", full)
        said = sweep({"beta": [0.1, 0.5]}, code=1)
        assert "not enough disk space" in said.err
    assert json.loads((out / "trials/001/trial.json").read_text())["status"] == "running"
    assert cli("resume", "out").code == 0
    assert results(out)["done"] == 2


def test_a_changed_sweep_is_refused_by_name(swept, sweep, out):
    swept({"beta": [0.1, 0.5]})
    before = results(out)
    said = sweep({"beta": [0.1, 0.6]}, "--max-steps", 3, code=2)
    assert "beta" in said.err and "0.6" in said.err and "max_steps is 3, and was 5" in said.err
    assert "--overwrite" in said.err
    assert results(out) == before
    sweep({"beta": [0.1, 0.5]}, "--cache", "memory", "--logging-steps", 2)
    sweep({"beta": [0.1, 0.6]}, "--overwrite")
    assert results(out)["trials"][1]["settings"] == {"beta": 0.6}


def test_changed_pairs_or_models_are_refused(swept, cli, out):
    swept({"beta": [0.1, 0.5]})
    shutil.rmtree(out / "trials/002")
    path = splits.split_file(out, "final")
    text = path.read_text()
    path.write_text(text.replace("Yes", "Yep"))
    result = cli("resume", "out")
    assert result.code == 2 and "final.jsonl: is not what the sweep began with" in result.err
    path.write_text(text)
    computing = json.loads((out / "computing.json").read_text())
    (known,) = computing["models"].values()
    known["model"] = "0" * 64
    (out / "computing.json").write_text(json.dumps(computing))
    result = cli("resume", "out")
    assert result.code == 2 and "has changed since the sweep's first trials (model)" in result.err
    assert trials.read_record(out, 2).status == "running", "which is no failure of the trial's"
    (out / "computing.json").write_text('{"computing": null}')
    result = cli("resume", "out")
    assert result.code == 1 and "computing.json: cannot be read" in result.err


def test_the_folder_is_not_taken_from_others(sweep, out, cli, tmp_path):
    out.mkdir()
    (out / "letter.txt").write_text("dear")
    said = sweep({"beta": [0.1]}, code=2)
    assert "holds something else" in said.err and (out / "letter.txt").exists()
    said = sweep({"beta": [0.1]}, "--output-dir", tmp_path, "--overwrite", code=2)
    assert cli("sweep", out).code == 2


def test_missing_models_are_found_before_anything_runs(sweep, out):
    said = sweep({"reference": ["none", "nowhere/at/all", "neither/here/nor"]}, code=2)
    assert "nowhere/at/all" in said.err and "neither/here/nor" in said.err
    assert not out.exists()


def test_a_missed_gate_is_said_also_where_a_trial_failed(sweep):
    said = sweep({"learning_rate": [1e-3, 1e30]}, "--fail-under", "reward=0.999", code=1)
    assert "1 of 2 trials failed" in said.err and "fail_under: reward is" in said.err


@pytest.mark.parametrize(
    "settings, said",
    [
        (["--fail-under", "rewards=0.6"], "no metric 'rewards'"),
        (["--judges", "size", "--generate-prompts", 1], "judge size"),
        (["--report-to", "wandb"], "the package wandb is not installed"),
        (["--optim", "adamw_8bit"], "needs the package bitsandbytes"),
    ],
)
def test_what_cannot_be_is_refused_before_a_trial(sweep, out, monkeypatch, settings, said):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "wandb" else there(n))
    assert said in sweep({"beta": [0.1, 0.5]}, *settings, code=2).err
    assert not out.exists()


def test_what_trials_found_outlasts_a_failure_on_the_final_pairs(sweep, cli, out, monkeypatch):
    def failing(*_):
        raise SmoldpoError("no final pairs today")

    with monkeypatch.context() as patch:
        patch.setattr(sweep_run, "measure_winner", failing)
        sweep({"beta": [0.1, 0.5]}, code=1)
    found = results(out)
    assert found["winner"] and found["done"] == 2 and found["final"] is None
    assert (out / "results.csv").exists()
    assert cli("resume", "out").code == 0
    assert results(out)["final"] is not None


def test_overwrite_spares_models_that_are_tried(sweep, cli, out, tiny_folder):
    sweep({"beta": [0.1]})
    best = out / "best/model"
    said = sweep({"model": [str(tiny_folder), str(best)]}, "--overwrite", code=2)
    assert "lies in output_dir" in said.err and best.is_dir()


def test_a_replacement_stopped_half_way_can_be_done_again(sweep, out, monkeypatch):
    sweep({"beta": [0.1]})

    def stopped(path):
        raise OSError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(run_folder.shutil, "rmtree", stopped)
        sweep({"beta": [0.5]}, "--overwrite", code=1)
    assert sweep_run.is_sweep(out)
    sweep({"beta": [0.5]}, "--overwrite")
    assert results(out)["trials"][0]["settings"] == {"beta": 0.5}


@pytest.mark.parametrize("writes", ["write_json", "write_text"])
def test_a_sweep_stopped_while_it_begins_goes_on(sweep, out, monkeypatch, writes):
    def stopped(path, what):
        raise OSError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(sweep_run, writes, stopped)
        sweep({"beta": [0.5]}, code=1)
    sweep({"beta": [0.5]})
    assert yaml.safe_load((out / "sweep.yaml").read_text())["sweep"] == {"beta": [0.5]}
