"""The loop: which pairs make up a step, the schedule, and what is refused."""

import copy
import json

import pytest
import torch
import transformers

from smoldpo.config.layer_spec import LayerSelection
from smoldpo.config.load import build_config
from smoldpo.config.losses import FACTS
from smoldpo.engine.base import EngineSettings
from smoldpo.engine.plain import PlainEngine
from smoldpo.training.loop import beta_at, train
from smoldpo.training.metrics_file import MetricsFile
from smoldpo.training.sampler import Schedule, epoch_order
from smoldpo.types import TokenizedPair, no_progress
from smoldpo.utils.errors import SmoldpoError

PAIRS = [TokenizedPair(f"p{n}", (5, n + 10), (n + 20, 2), (n + 40, 41, 2)) for n in range(7)]


def config(**settings):
    base = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "warmup_ratio": 0}
    base |= {"num_train_epochs": 1}
    return build_config(base | {"learning_rate": 1e-3} | settings)


def run(model, tmp_path, settings, pairs=PAIRS, after_step=no_progress, reference=None):
    engine = PlainEngine(
        model,
        reference or copy.deepcopy(model),
        EngineSettings(
            compute_dtype=torch.float64,
            train_batch_size=settings.per_device_train_batch_size,
            eval_batch_size=4,
        ),
    )
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    train(
        engine,
        pairs,
        settings,
        metrics,
        starts_at_reference=reference is None,
        after_step=after_step,
        watch=lambda _, note="": None,
    )
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def test_each_epoch_holds_every_pair_once_in_its_own_order():
    schedule = Schedule.of(config(num_train_epochs=2), 7)
    assert schedule.total_steps == 4
    steps = [schedule.indices(step) for step in range(4)]
    assert [len(step) for step in steps] == [4, 3, 4, 3]
    first, second = steps[0] + steps[1], steps[2] + steps[3]
    assert sorted(first) == sorted(second) == list(range(7))
    assert first != second


def test_order_depends_on_seed_and_epoch_alone():
    assert epoch_order(50, 1, 0) == epoch_order(50, 1, 0)
    assert len({epoch_order(50, 1, 0), epoch_order(50, 1, 1), epoch_order(50, 2, 0)}) == 3


@pytest.mark.parametrize(
    "settings, steps",
    [({}, 2), ({"num_train_epochs": 0.5}, 1), ({"max_steps": 9}, 9), ({"num_train_epochs": 3}, 6)],
)
def test_number_of_steps(settings, steps):
    assert Schedule.of(config(**settings), 7).total_steps == steps


def test_training_lowers_the_loss_from_ln2_and_logs_trls_names(tiny_model, tmp_path):
    rows = run(tiny_model, tmp_path, config(num_train_epochs=20))
    assert rows[0]["loss"] == pytest.approx(0.6931471805599453, abs=1e-12)
    assert rows[0]["rewards/accuracies"] == 0.5
    assert rows[0]["rewards/margins"] == 0.0
    assert rows[-1]["loss"] < 0.6 and rows[-1]["rewards/accuracies"] == 1.0
    names = {"loss", "grad_norm", "learning_rate", "epoch", "step", "pairs"}
    for of in ("chosen", "rejected"):
        names |= {f"rewards/{of}", f"logps/{of}"}
    assert names | {"rewards/accuracies", "rewards/margins"} <= set(rows[0])
    assert [row["pairs"] for row in rows[:2]] == [4, 3]


@pytest.mark.parametrize("cut", [(4, 1), (2, 2), (1, 4)])
def test_training_does_not_depend_on_the_micro_batch(tiny_model, tmp_path, cut):
    size, accumulation = cut
    settings = config(
        per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, max_steps=6
    )
    losses = [row["loss"] for row in run(tiny_model, tmp_path, settings)]
    other = tmp_path / "other"
    other.mkdir()
    torch.manual_seed(0)
    fresh = transformers.LlamaForCausalLM(tiny_model.config).double().eval()
    whole = config(per_device_train_batch_size=4, gradient_accumulation_steps=1, max_steps=6)
    assert losses == pytest.approx([row["loss"] for row in run(fresh, other, whole)], rel=1e-9)


def test_frozen_parameters_stay(tiny_model, tmp_path):
    from smoldpo.models.freeze import freeze

    freeze(tiny_model, LayerSelection(2))
    start = {name: p.detach().clone() for name, p in tiny_model.named_parameters()}
    run(tiny_model, tmp_path, config(max_steps=3))
    for name, parameter in tiny_model.named_parameters():
        assert torch.equal(parameter, start[name]) == (not parameter.requires_grad)


@pytest.mark.parametrize("most", [0.001, None])
def test_a_gradient_is_clipped_to_its_largest_norm(tiny_model, tmp_path, most):
    start = {name: p.detach().clone() for name, p in tiny_model.named_parameters()}
    told = {"optim": "sgd", "lr_scheduler_type": "constant", "max_steps": 1, "max_grad_norm": most}
    (row,) = run(tiny_model, tmp_path, config(**told))
    moved = [p.detach() - start[name] for name, p in tiny_model.named_parameters()]
    norm = torch.nn.utils.get_total_norm(moved).item() / row["learning_rate"]
    assert row["grad_norm"] > 0.01, "what is logged is not clipped"
    assert norm == pytest.approx(most or row["grad_norm"], rel=1e-5)


def test_no_step_is_taken_on_a_gradient_that_is_not_finite(tiny_model, tmp_path):
    start = tiny_model.model.layers[0].mlp.up_proj.weight.detach().clone()
    reference = copy.deepcopy(tiny_model)
    with torch.no_grad():
        tiny_model.model.norm.weight.fill_(float("inf"))
    with pytest.raises(SmoldpoError, match=r"step 1: .*not finite.*p\d, p\d"):
        run(tiny_model, tmp_path, config(), reference=reference)
    assert torch.equal(tiny_model.model.layers[0].mlp.up_proj.weight, start)


def test_a_first_loss_that_is_not_ln2_is_refused(tiny_model, tmp_path, monkeypatch):
    changed = copy.deepcopy(tiny_model)
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    monkeypatch.setattr(copy, "deepcopy", lambda _: changed)
    with pytest.raises(SmoldpoError, match="not ln 2"):
        run(tiny_model, tmp_path, config())


def test_bfloat16_training_moves_the_policy_that_computes(tiny_model, tmp_path):
    """The optimizer moves float32 masters; each update must reach the bfloat16 model."""
    from smoldpo.engine.fast import FastEngine
    from smoldpo.engine.precision import MasterWeights

    model = tiny_model.float()
    engine = FastEngine(model, MasterWeights(model, torch.bfloat16))
    engine.prepare(PAIRS)
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    train(
        engine,
        PAIRS,
        config(num_train_epochs=20),
        metrics,
        starts_at_reference=True,
        after_step=no_progress,
        watch=lambda _, note="": None,
    )
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses[0] == pytest.approx(0.69314718, abs=1e-6) and losses[-1] < 0.65
    assert all(parameter.grad is None for _, parameter in engine.trainable_parameters())


REFERENCE_LOSSES = [name for name, facts in FACTS.items() if facts.needs_reference]


@pytest.mark.parametrize("name", [*REFERENCE_LOSSES, "sigmoid,sft", "apo_zero,sft"])
def test_the_first_loss_of_every_loss_is_checked(name, tiny_model, tmp_path, monkeypatch):
    """Equal weights pass; a reference that is not the policy's start does not, whatever the
    loss.
    """
    smoothing = {"label_smoothing": 0.01} if name == "exo_pair" else {}
    settings = config(loss_type=name, max_steps=1, **smoothing)
    assert len(run(tiny_model, tmp_path, settings)) == 1
    changed = copy.deepcopy(tiny_model)
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight.mul_(3.0)
    monkeypatch.setattr(copy, "deepcopy", lambda _: changed)
    with pytest.raises(SmoldpoError, match=r"loss before the first update is \S+, not "):
        run(tiny_model, tmp_path, settings)


def test_beta_goes_to_its_end_in_equal_steps(tiny_model, tmp_path):
    settings = config(beta=0.1, beta_end=0.5, max_steps=5)
    assert [beta_at(settings, step, 5) for step in range(5)] == pytest.approx(
        [0.1, 0.2, 0.3, 0.4, 0.5]
    )
    assert beta_at(settings, 0, 1) == 0.1
    assert [beta_at(config(), step, 5) for step in (0, 4)] == [0.1, 0.1]
    rows = run(tiny_model, tmp_path, settings)
    assert [row["beta"] for row in rows] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    # Rewards are in units of the step's own beta.
    assert all(row["loss"] != rows[0]["loss"] for row in rows[1:])
    assert "beta" not in run(tiny_model, tmp_path / "..", config(max_steps=1))[-1]


@pytest.mark.parametrize("name", ["simpo", "cpo", "orpo", "sft"])
def test_without_a_reference_there_is_no_implicit_reward(name, tiny_model, tmp_path):
    engine = PlainEngine(
        tiny_model,
        None,
        EngineSettings(compute_dtype=torch.float64, train_batch_size=2, eval_batch_size=4),
    )
    notes = []
    train(
        engine,
        PAIRS,
        config(loss_type=name, num_train_epochs=10),
        MetricsFile(tmp_path / "metrics.jsonl"),
        starts_at_reference=True,
        after_step=no_progress,
        watch=lambda _, note="": notes.append(note),
    )
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"] and "accuracy" in notes[0]
    assert not [key for key in rows[0] if key.startswith("rewards/")]
    chosen, rejected = rows[0]["logps/chosen"], rows[0]["logps/rejected"]
    assert rows[0]["logps/margins"] == pytest.approx(chosen - rejected)
    assert 0 <= rows[0]["logps/accuracies"] <= 1


@pytest.mark.parametrize("name", ["aot", "sft", "bco_pair"])
def test_training_with_any_loss_does_not_depend_on_the_micro_batch(name, tiny_model, tmp_path):
    found = []
    for size, accumulation in ((4, 1), (1, 4)):
        cut = config(
            loss_type=name,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=4,
        )
        rows = run(copy.deepcopy(tiny_model), tmp_path, cut)[-4:]
        found.append([row["loss"] for row in rows])
    assert len(set(found[0])) == 4
    assert found[0] == pytest.approx(found[1], rel=1e-9)
