"""A run in which no weight moved is a failure: it says why, and saves no model."""

import pytest
import torch

from smoldpo.training.moved import StartingWeights
from smoldpo.utils.errors import SmoldpoError


def run(cli, tiny_folder, pairs_file, folder, *more):
    return cli(
        "train", "--model", tiny_folder, "--data", pairs_file, "--output-dir", folder, "--dtype",
        "float32", "--generate-prompts", 0, "--sample-prompt", "none", "--freeze-layers", 3, *more,
    )  # fmt: skip


@pytest.mark.parametrize(
    "more, reason",
    [
        (
            ["--max-steps", 1, "--warmup-steps", 1],
            "the rate of every step was 0, as in the first step of a warm-up",
        ),
        (["--max-steps", 2, "--learning-rate", "1e-30"], "lost in the rounding of the weights"),
        (["--max-steps", 1, "--warmup-steps", 1, "--use-peft"], "the rate of every step was 0"),
    ],
    ids=["warm-up", "rounding", "adapters"],
)
def test_a_run_in_which_no_weight_moved_fails(cli, tiny_folder, pairs_file, tmp_path, more, reason):
    folder = tmp_path / "run"
    result = run(cli, tiny_folder, pairs_file, folder, *more)
    said = " ".join(result.err.split())
    assert result.code == 1 and "no weight moved: after" in said and reason in said
    assert not (folder / "model").exists() and not (folder / "evaluation.json").exists()
    assert (folder / "metrics.jsonl").exists()


def weights():
    return {"a": torch.zeros(3), "b": torch.ones(2, 2)}


def test_one_weight_is_enough(tmp_path):
    named = weights()
    start = StartingWeights(named.items())
    named["b"][1, 1] = torch.nextafter(named["b"][1, 1], torch.tensor(9.0))
    start.require_moved(named.items(), tmp_path / "metrics.jsonl")


def test_the_reason_is_read_from_the_metrics(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    start = StartingWeights(weights().items())
    for norm, reason in ((0.0, "every gradient was 0: the two answers"), (0.5, "norm 0.5 at most")):
        metrics.write_text(
            '{"step": 0, "eval_loss": 1}\n'
            f'{{"step": 4, "learning_rate": 1e-6, "grad_norm": {norm}}}\n'
        )
        with pytest.raises(SmoldpoError, match="after 4 steps") as error:
            start.require_moved(weights().items(), metrics)
        assert reason in str(error.value)
