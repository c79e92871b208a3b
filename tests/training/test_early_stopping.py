"""The best evaluation, patience, and which policy model/ holds."""

import json

import pytest
import torch
from safetensors.torch import load_file

from conftest import rows
from smoldpo.training.checkpoint import saved_steps
from smoldpo.training.state import BestSoFar


@pytest.mark.parametrize(
    "metric, values, best, since",
    [
        ("eval_loss", [0.7, 0.5, 0.6, 0.5], 1, 2),
        ("eval_loss", [float("nan"), 0.7, float("nan")], 1, 1),
        ("eval_rewards/accuracies", [0.5, 0.9, 0.7, 1.0], 3, 0),
        ("eval_rewards/margins", [-1.0, -2.0], 0, 1),
    ],
)
def test_the_best_is_followed(metric, values, best, since):
    found = BestSoFar(metric)
    for step, value in enumerate(values):
        found.update(step, {metric: value, "other": 0.0})
    assert (found.step, found.since) == (best, since)
    assert BestSoFar(**json.loads(json.dumps(found.as_dict()))) == found
    assert not found.exhausted(None) and found.exhausted(since) and not found.exhausted(since + 1)


@pytest.fixture
def train(cli, tiny_folder, write_rows, tmp_path):
    """Rates so high that the held-out pairs, whose labels are turned round, only get worse."""
    items = rows(40)
    write_rows(items[:32], "train.jsonl")
    held = [{**r, "chosen": r["rejected"], "rejected": r["chosen"]} for r in items[32:]]
    write_rows(held, "held.jsonl")

    def run(name, *more):
        result = cli(
            "train", "--model", tiny_folder, "--data", "train.jsonl", "--eval-data", "held.jsonl",
            "--output-dir", name, "--learning-rate", "1e-3", "--num-train-epochs", 4, "--dtype",
            "float32", "--freeze-layers", 2, "--sample-prompt", "none", "--warmup-ratio", 0,
            "--generate-prompts", 0, "--device", "cpu", *more,
        )  # fmt: skip
        return result, tmp_path / name

    return run


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_patience_ends_the_run(train):
    result, run = train("run", "--eval-steps", 2, "--early-stopping-patience", 3)
    assert result.code == 0 and "stopped early: 3 evaluations" in result.err
    steps = [row["step"] for row in metrics(run) if "loss" in row]
    # The first evaluation is the best, and three more are waited for.
    assert steps[-1] == 2 + 3 * 2 < 16
    assert (run / "model" / "model.safetensors").exists()


def test_the_best_policy_is_what_model_holds(train):
    words = ["--eval-steps", 2, "--load-best-model-at-end", "--save-steps", 4]
    result, run = train("run", *words)
    assert result.code == 0 and "best: the policy of step 2" in result.err
    assert saved_steps(run / "checkpoints") == [2, 12, 16], "the best one, and the newest two"
    best = load_file(run / "checkpoints" / "step-2" / "weights.safetensors")
    last = load_file(run / "checkpoints" / "step-16" / "weights.safetensors")
    saved = load_file(run / "model" / "model.safetensors")
    assert all(torch.equal(saved[name], best[name]) for name in best)
    assert not any(torch.equal(saved[name], last[name]) for name in best)
    found = metrics(run)
    evaluated = {row["step"]: row["eval_loss"] for row in found[:-1] if "eval_loss" in row}
    assert found[-1]["eval_loss"] == evaluated[2] == min(v for s, v in evaluated.items() if s)
    assert list(evaluated) == [0, *range(2, 17, 2)], "the last step is compared too"


def test_another_metric_is_followed_by_its_own_sign(train):
    words = ["--eval-steps", 4, "--metric-for-best-model", "eval_rewards/margins"]
    result, _ = train("run", *words, "--load-best-model-at-end")
    assert result.code == 0 and "best: the policy of step 4, eval_rewards/margins" in result.err


@pytest.mark.parametrize("words", [["--early-stopping-patience", 2], ["--load-best-model-at-end"]])
def test_what_cannot_work_is_refused(train, words):
    result, run = train("run", *words)
    assert result.code == 2 and "eval_steps" in result.err and not run.exists()


def test_a_metric_that_is_not_known(train):
    result, _ = train("run", "--eval-steps", 2, "--metric-for-best-model", "accuracy")
    assert result.code == 2 and "metric_for_best_model" in result.err
