"""`--freeze-layers auto`: the run that it picks, within the time that it is given."""

import json
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from conftest import rows
from planning import QUICK, plan
from smoldpo.cli import main


@pytest.fixture
def data(write_rows):
    return write_rows(rows(45))


def test_auto_picks_what_the_table_says(cli, planted, tiny_folder, data):
    told = ["--model", tiny_folder, "--data", data, "--learning-rate", "1e-2"]
    table = {row["freeze_layers"]: row["seconds"] for row in plan(cli, *told)["depths"]}
    assert table[0] > table[1] > table[2] > table[3] + 100
    budget = f"{(table[1] + table[2]) / 2:.0f}s"  # 2 fits, 1 does not
    asked = cli("plan", *told, *QUICK, "--freeze-layers", "auto", "--budget", budget, "--json")
    assert json.loads(asked.out)["run"]["freeze_layers"] == 2 and "fewest that fit" in asked.err
    result = cli(
        "train", *told, *QUICK, "--freeze-layers", "auto", "--budget", budget, "--output-dir", "run"
    )
    assert result.code == 0, result.err
    assert "2 of 4 layers frozen, the fewest that fit" in result.err
    written = yaml.safe_load(Path("run/config.yaml").read_text())
    assert written["freeze_layers"] == 2 and written["budget"] is None
    how = json.loads(Path("run/environment.json").read_text())["freeze_layers_auto"]
    assert how["budget"] == budget and how["freeze_layers"] == 2
    began = json.loads(Path("run/resume.json").read_text())["began"]
    assert began["computing"]["frozen_layers"] == 2 and began["settings"]["budget"] is None
    plain = cli("train", *told, *QUICK, "--freeze-layers", 2, "--output-dir", "plain")
    assert plain.code == 0, plain.err
    first, second = (load_file(f"{r}/model/model.safetensors") for r in ("run", "plain"))
    assert all((first[name] == second[name]).all() for name in first)


def test_a_run_that_auto_began_can_be_resumed(cli, planted, tiny_folder, data, monkeypatch):
    from smoldpo.training.run import Run
    from smoldpo.utils.signals import InterruptedRunError

    after_step = Run._after_step

    def stopped(self, steps):
        after_step(self, steps)
        if steps == 2:
            raise InterruptedRunError(2, "")

    told = ["--model", tiny_folder, "--data", data, *QUICK, "--output-dir", "run"]
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_after_step", stopped)
        result = cli("train", *told, "--freeze-layers", "auto", "--budget", "9999h")
        assert result.code == 130, result.err
    resumed = cli("resume", "run")
    assert resumed.code == 0, resumed.err
    assert cli("train", *told[:-1], "whole", "--freeze-layers", 0).code == 0
    first, second = (load_file(f"{r}/model/model.safetensors") for r in ("run", "whole"))
    assert all((first[name] == second[name]).all() for name in first)


def test_a_budget_too_small_says_what_the_least_is(cli, planted, tiny_folder, data):
    told = ["--model", tiny_folder, "--data", data, *QUICK, "--output-dir", "run"]
    result = cli("train", *told, "--freeze-layers", "auto", "--budget", "3s")
    assert result.code == 2 and "shortest forecast is" in result.err and "3 layers" in result.err
    assert not Path("run").exists()


def test_auto_counts_the_programs_start_as_plan_does(cli, planted, tiny_folder, data, monkeypatch):
    """Where it took 1,000 s, a budget 500 s short fits nothing; the error says what planning
    took.
    """
    monkeypatch.setattr(main, "seconds_since_start", lambda: 1000.0)
    told = ["--model", tiny_folder, "--data", data, "--max-steps", 1, "--freeze-layers", "auto"]
    depths = plan(cli, *told, "--budget", "9999h")["depths"]
    budget = f"{min(row['seconds'] for row in depths) - 500:.0f}s"
    for verb in ("plan", "train"):
        result = cli(verb, *told, *QUICK, "--budget", budget)
        assert result.code == 2 and "no depth fits the budget" in result.err
        assert "s of planning" in result.err and "the shortest forecast is" in result.err
