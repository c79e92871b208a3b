"""Averaged weights: the formula, what sees them and what does not, and the best of them."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import rows
from smoldpo.config.layer_spec import LayerSelection
from smoldpo.config.load import build_config
from smoldpo.data.load import load_pairs
from smoldpo.data.tokenize import PairTokenizer
from smoldpo.engine.autotune import KernelChoice
from smoldpo.engine.fast import FastEngine
from smoldpo.engine.logprobs import score
from smoldpo.engine.precision import MasterWeights
from smoldpo.models.freeze import freeze
from smoldpo.training.optim import AveragedWeights
from smoldpo.training.policy_and_reference import PolicyAndReference
from smoldpo.training.state import TrainingState
from smoldpo.types import TokenizedPair

PAIRS = [TokenizedPair(f"p{n}", (5, n + 10), (n + 20, 2), (n + 40, 41, 2)) for n in range(4)]


def test_the_average_by_hand():
    parameter = torch.nn.Parameter(torch.tensor([8.0, 0.0], dtype=torch.float64))
    average = AveragedWeights({"p": parameter}, 0.75)
    for value in (4.0, 0.0):
        with torch.no_grad():
            parameter.fill_(value)
        average.update()
    # 0.75 (0.75 · 8 + 0.25 · 4) + 0.25 · 0, and the same from 0.
    assert average.tensors["p"].tolist() == [5.25, 0.75]
    assert parameter.tolist() == [0.0, 0.0]
    average.exchange()
    assert parameter.tolist() == [5.25, 0.75] and average.tensors["p"].tolist() == [0.0, 0.0]
    average.exchange()
    assert parameter.tolist() == [0.0, 0.0] and average.tensors["p"].tolist() == [5.25, 0.75]


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_the_engine_computes_with_the_average_inside_the_block_alone(tiny_model, compute):
    model = tiny_model.float()
    freeze(model, LayerSelection(2))
    engine = FastEngine(model, MasterWeights(model, compute))
    engine.prepare(PAIRS)
    state = TrainingState(engine, build_config({"ema_decay": 0.5}))
    start = engine.policy_logps(PAIRS).chosen
    with state.averaged():
        assert torch.equal(engine.policy_logps(PAIRS).chosen, start), (
            "before a step it is the start"
        )
    with torch.no_grad():
        for parameter in state.parameters.values():
            parameter.mul_(1.5)
    state.finish_step()
    moved = engine.policy_logps(PAIRS).chosen
    weights = {name: p.detach().clone() for name, p in state.parameters.items()}
    with pytest.raises(KeyboardInterrupt), state.averaged():
        halfway = engine.policy_logps(PAIRS).chosen
        for name, parameter in state.parameters.items():
            torch.testing.assert_close(parameter, weights[name] / 1.5 * 1.25)
        raise KeyboardInterrupt
    assert torch.equal(engine.policy_logps(PAIRS).chosen, moved)
    assert all(torch.equal(p, weights[name]) for name, p in state.parameters.items())
    assert not torch.equal(halfway, moved) and not torch.equal(halfway, start)


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
            "--output-dir", name, "--learning-rate", "1e-3", "--max-steps", 4, "--dtype", "float32",
            "--freeze-layers", 2, "--sample-prompt", "none", "--warmup-ratio", 0, "--device", "cpu",
            "--generate-prompts", 0, "--save-steps", 1, "--keep-checkpoints", 9, "--eval-steps", 2,
            *more,
        )  # fmt: skip
        assert result.code == 0, result.err
        return tmp_path / name

    return run


def tensors(run, step, part):
    return load_file(run / "checkpoints" / f"step-{step}" / f"{part}.safetensors")


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_trains_as_without_and_evaluates_and_saves_the_average(train, tiny_folder):
    plain, averaged = train("plain"), train("averaged", "--ema-decay", 0.8)
    keys = ("loss", "grad_norm", "rewards/margins")
    both = [metrics(plain), metrics(averaged)]
    found = [[[row[key] for key in keys] for row in each if "loss" in row] for each in both]
    assert found[0] == found[1], "training is the same"
    expected = load_file(tiny_folder / "model.safetensors")
    for step in range(1, 5):
        weights = tensors(averaged, step, "weights")
        assert all(torch.equal(weights[n], t) for n, t in tensors(plain, step, "weights").items())
        expected = {n: 0.8 * expected[n] + 0.2 * weights[n] for n in weights}
        for name, tensor in tensors(averaged, step, "averaged").items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-8)
    saved = load_file(averaged / "model" / "model.safetensors")
    last = tensors(averaged, 4, "averaged")
    assert all(torch.equal(saved[name], last[name]) for name in last)
    losses = [
        {row["step"]: row["eval_loss"] for row in each if "eval_loss" in row} for each in both
    ]
    assert losses[0][0] == losses[1][0] and losses[0][4] > losses[1][4] > losses[0][0]
    card = (averaged / "model" / "README.md").read_text()
    assert "moving average of the weights (0.8 a step)" in card
    assert "moving average" not in (plain / "model" / "README.md").read_text()


def test_the_evaluation_is_that_of_the_model_that_is_saved(train):
    run = train("run", "--ema-decay", 0.8)
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = PairTokenizer(AutoTokenizer.from_pretrained(run / "model"), 1024)
    pairs = tokenizer.tokenize_all(load_pairs("held.jsonl").pairs)
    found = score(model, pairs, KernelChoice())
    rows = json.loads((run / "evaluation.json").read_text())["pairs"]
    assert [row["id"] for row in rows] == [pair.id for pair in pairs]
    after = [row["after"]["chosen_logp"] for row in rows]
    before = [row["before"]["chosen_logp"] for row in rows]
    assert found.chosen.tolist() == pytest.approx(after, rel=1e-5)
    assert found.chosen.tolist() != pytest.approx(before, rel=1e-3)


def test_the_best_average_is_what_model_holds(train):
    run = train("run", "--ema-decay", 0.8, "--load-best-model-at-end")
    best = tensors(run, 2, "averaged")
    saved = load_file(run / "model" / "model.safetensors")
    assert all(torch.equal(saved[name], best[name]) for name in best)
    found = {row["step"]: row["eval_loss"] for row in metrics(run)[:-1] if "eval_loss" in row}
    assert metrics(run)[-1]["eval_loss"] == found[2] < found[4]


def test_answers_are_the_averages(train, monkeypatch):
    seen, trained = [], PolicyAndReference.trained

    def noted(self):
        model = trained(self)
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return model

    monkeypatch.setattr(PolicyAndReference, "trained", noted)
    run = train("run", "--ema-decay", 0.8, "--generate-prompts", 1, "--max-new-tokens", 2)
    last = tensors(run, 4, "averaged")
    assert seen and all(torch.equal(seen[-1][name], last[name]) for name in last)


@pytest.mark.parametrize("value", [0, 1, -0.5, 1.5])
def test_decays_that_are_none(value):
    from smoldpo.utils.errors import ConfigError

    with pytest.raises(ConfigError, match="ema_decay"):
        build_config({"ema_decay": value})


def test_none_is_kept_unless_asked_for(tiny_model):
    freeze(tiny_model, LayerSelection(2))
    engine = FastEngine(copy.deepcopy(tiny_model), MasterWeights(tiny_model, torch.float64))
    assert "averaged" not in TrainingState(engine, build_config({})).capture().tensors
