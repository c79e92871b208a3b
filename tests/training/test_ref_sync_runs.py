"""Runs with a moving reference: what is said, what is compared with what, and what cannot work."""

import json

import pytest

from smoldpo.config.load import build_config
from smoldpo.utils.errors import ConfigError

SYNC = ["--sync-ref-model", "--ref-model-sync-steps", 2]


@pytest.fixture
def train(cli, tiny_folder, pairs_file, tmp_path):
    def run(name, *more):
        result = cli(
            "train", "--model", tiny_folder, "--data", pairs_file, "--output-dir", name,
            "--learning-rate", "3e-3", "--max-steps", 4, "--dtype", "float32", "--device", "cpu",
            "--freeze-layers", 2, "--sample-prompt", "none", "--generate-prompts", 0,
            "--warmup-ratio", 0, "--eval-steps", 3, *more,
        )  # fmt: skip
        return result, tmp_path / name

    return run


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("engine", ["fast", "plain"])
def test_steps_compare_with_the_moved_reference_and_evaluations_with_its_start(train, engine):
    _, still = train("still", "--engine", engine)
    words = [*SYNC, "--ref-model-mixup-alpha", 1.0]
    result, moving = train("moving", "--engine", engine, *words)
    assert result.code == 0, result.err
    assert result.err.count("reference: moved after") == 1
    assert "moved after step 2, 1 of the way" in result.err
    one, two = ([row for row in rows(run) if "loss" in row] for run in (still, moving))
    assert [row["loss"] for row in one[:2]] == [row["loss"] for row in two[:2]]
    # α 1 after step 2: the third step finds policy and reference equal, as the first did.
    assert two[2]["loss"] == pytest.approx(0.6931471805599453, abs=1e-6)
    assert one[2]["loss"] < 0.6
    assert abs(two[2]["rewards/margins"]) < 1e-5 < abs(one[2]["rewards/margins"])
    before, middle, _ = (row for row in rows(moving) if "eval_loss" in row)
    assert middle["eval_rewards/margins"] > 1e-3 and before["eval_rewards/margins"] == 0
    for run in (still, moving):
        for pair in json.loads((run / "evaluation.json").read_text())["pairs"]:
            for side in ("reference_chosen_logp", "reference_rejected_logp"):
                assert pair["after"][side] == pair["before"][side]
    card = (moving / "model" / "README.md").read_text()
    assert "the reference moved 1 of the way to the policy every 2 steps" in card


def test_a_reference_of_its_own_moves_too(train, tiny_folder):
    result, run = train("run", *SYNC, "--reference", tiny_folder)
    assert result.code == 0 and "moved after step 2" in result.err
    result, twin = train("twin", *SYNC)
    losses = [[row["loss"] for row in rows(each) if "loss" in row] for each in (run, twin)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4), "it begins as the same model"


def test_a_reference_that_would_not_move_is_refused_before_models_load(train):
    result, run = train("run", "--sync-ref-model")
    assert result.code == 2 and "set it to 1, say" in result.err and not run.exists()
    assert "precision" not in result.err
    result, _ = train("run", "--sync-ref-model", "--ref-model-sync-steps", 4)
    assert result.code == 2 and "has 4 steps" in result.err
    result, _ = train("run", "--sync-ref-model", "--ref-model-sync-steps", 3)
    assert result.code == 0


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"sync_ref_model": True, "loss_type": "simpo"}, "simpo compares with none"),
        ({"ref_model_sync_steps": 4}, "ref_model_sync_steps is read with sync_ref_model alone"),
        ({"ref_model_mixup_alpha": 0.5}, "ref_model_mixup_alpha is read with"),
        ({"sync_ref_model": True, "ref_model_mixup_alpha": 0}, "ref_model_mixup_alpha is 0"),
        ({"sync_ref_model": True, "ref_model_mixup_alpha": 1.1}, "ref_model_mixup_alpha is 1.1"),
    ],
)
def test_what_cannot_work(settings, says):
    with pytest.raises(ConfigError, match=says):
        build_config(settings)
