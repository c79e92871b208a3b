"""Rates by pattern: who gets which, how they follow the schedule, and patterns that fit nothing."""

import copy
import json

import pytest
import torch

from smoldpo.config.layer_spec import LayerSelection
from smoldpo.config.load import build_config
from smoldpo.engine.base import EngineSettings
from smoldpo.engine.plain import PlainEngine
from smoldpo.models.freeze import freeze
from smoldpo.training.loop import train
from smoldpo.training.metrics_file import MetricsFile
from smoldpo.training.optim import learning_rate, make_optimizer
from smoldpo.training.setup import rates_of
from smoldpo.training.state import TrainingState
from smoldpo.types import TokenizedPair, no_progress
from smoldpo.utils.errors import ConfigError, UsageError

PAIRS = [TokenizedPair(f"p{n}", (5, n + 10), (n + 20, 2), (n + 40, 41, 2)) for n in range(8)]


def test_who_gets_which_rate(tiny_model):
    freeze(tiny_model, LayerSelection(2))
    found = rates_of(tiny_model, ["norms=1e-3", "*.layers.3.*=2e-3"])
    trains = {name for name, p in tiny_model.named_parameters() if p.requires_grad}
    assert found.keys() < trains
    for name in trains:
        expected = 1e-3 if "norm" in name else 2e-3 if ".3." in name else None
        assert found.get(name) == expected, name
    assert rates_of(tiny_model, []) == {}


def test_embeddings_of_a_tied_model(tiny_model):
    assert rates_of(tiny_model, ["embeddings=1e-6"]) == {"model.embed_tokens.weight": 1e-6}


@pytest.mark.parametrize(
    "items, says",
    [
        (["norm=1e-3"], "'norm' fits no parameter.*did you mean norms"),
        (["*.layers.0.*=1e-3"], "fits only what is frozen"),
        (["embeddings=1e-3"], "fits only what is frozen"),
        (["*=1e-3", "norms=1e-4"], "patterns before 'norms' have taken all"),
    ],
)
def test_a_pattern_that_fits_nothing(tiny_model, items, says):
    freeze(tiny_model, LayerSelection(2))
    with pytest.raises(UsageError, match=says):
        rates_of(tiny_model, items)


@pytest.mark.parametrize(
    "text, says",
    [
        ("norms", "'norms' is not pattern=rate"),
        ("norms=0", "is not pattern=rate"),
        ("norms=x2", "is not pattern=rate"),
        ("=1e-3", "is not pattern=rate"),
        ("norms=nan", "is not pattern=rate"),
        ("norms=1e-3,norms=1e-4", "stands there twice"),
    ],
)
def test_what_is_no_pattern_and_rate(text, says):
    with pytest.raises(ConfigError, match=says):
        build_config({"learning_rates": text})


def test_rates_follow_the_schedule_and_the_metrics_keep_the_base(tiny_model, tmp_path):
    """SGD moves each parameter by rate times gradient, so every rate can be read off the
    weights.
    """
    freeze(tiny_model, LayerSelection(2))
    config = build_config(
        {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": None, "max_steps": 4}
        | {
            "learning_rates": "norms=0.1,*.mlp.*=2",
            "lr_scheduler_type": "linear",
            "warmup_steps": 1,
        }
    )
    engine = PlainEngine(
        tiny_model,
        copy.deepcopy(tiny_model),
        EngineSettings(compute_dtype=torch.float64, train_batch_size=4, eval_batch_size=4),
    )
    rates = rates_of(tiny_model, config.learning_rates)
    state = TrainingState(engine, config, rates)
    before, gradients = {}, {}
    step = state.optimizer.step

    def noted():
        for name, parameter in state.parameters.items():
            before[name], gradients[name] = parameter.detach().clone(), parameter.grad.clone()
        step()

    state.optimizer.step = noted

    def look(done):
        share = learning_rate(config, done - 1, 4) / 0.5
        for name, parameter in state.parameters.items():
            rate = share * rates.get(name, 0.5)
            torch.testing.assert_close(parameter, before[name] - rate * gradients[name])
        return None

    train(
        engine, PAIRS, config, MetricsFile(tmp_path / "m.jsonl"), starts_at_reference=True,
        after_step=look, watch=no_progress_note, state=state, advance=no_progress,
    )  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    expected = [learning_rate(config, step, 4) for step in range(4)]
    assert [row["learning_rate"] for row in rows] == expected
    assert {0.1, 2.0} == set(rates.values()) and len(state.optimizer.param_groups) == 3


def no_progress_note(_, note=""):
    pass


def test_groups_of_one_rate_stay_together():
    parameters = {n: torch.nn.Parameter(torch.ones(2, 2)) for n in "abc"}
    config = build_config({"learning_rate": 1e-3})
    groups = make_optimizer(parameters.items(), config, {"b": 1e-3, "c": 1e-4}).param_groups
    assert [(len(g["params"]), g["rate_factor"]) for g in groups] == [(2, 1.0), (1, 0.1)]


def test_in_a_run(cli, tiny_folder, pairs_file):
    words = ["train", "--model", tiny_folder, "--data", pairs_file, "--output-dir", "run"]
    words += ["--max-steps", 2, "--sample-prompt", "none", "--generate-prompts", 0]
    result = cli(*words, "--learning-rates", "*.layers.0.*=1e-3")
    assert result.code == 2 and "fits only what is frozen" in result.err
    result = cli(*words, "--learning-rates", "norms=1e-3")
    assert result.code == 0, result.err
