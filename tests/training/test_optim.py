"""Each optimizer is the library's own; its state is what is counted, and goes through a file
unchanged.
"""

import copy
import importlib.util
import sys
import types

import pytest
import torch
from safetensors.torch import load, save
from transformers.optimization import Adafactor

from smoldpo.config.load import build_config
from smoldpo.config.optimizers import OPTIMIZERS
from smoldpo.engine.base import EngineSettings
from smoldpo.engine.plain import PlainEngine
from smoldpo.training.optim import (
    capture_optimizer,
    make_optimizer,
    optimizer_bytes,
    require_optimizer,
    restore_optimizer,
)
from smoldpo.training.state import TrainingState, checkpoint_bytes
from smoldpo.utils.errors import ConfigError, UsageError

eight_bit = pytest.param(
    {"optim": "adamw_8bit"},
    marks=pytest.mark.skipif(
        importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
    ),
    id="adamw_8bit",
)
EVERY = [
    pytest.param({}, id="adamw"),
    pytest.param({"optim": "adafactor"}, id="adafactor"),
    pytest.param({"optim": "sgd"}, id="sgd"),
    pytest.param({"optim": "sgd", "sgd_momentum": 0.9}, id="momentum"),
    eight_bit,
]


def config(**settings):
    return build_config({"learning_rate": 1e-2, "weight_decay": 0.1} | settings)


def named(dtype=torch.float32):
    """A matrix with 8-bit moments, one that is too small for them, and a vector."""
    torch.manual_seed(0)
    shapes = {"big": (96, 70), "small": (5, 7), "norm": (9,)}
    return {n: torch.nn.Parameter(torch.randn(s, dtype=dtype)) for n, s in shapes.items()}


def step(optimizer, parameters, seed):
    torch.manual_seed(seed)
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def theirs(settings, parameters):
    """The library's optimizer, made as its documentation says; decay on matrices only."""
    matrices = [p for p in parameters.values() if p.ndim >= 2]
    vectors = [p for p in parameters.values() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    kind = settings.get("optim")
    if kind == "adafactor":
        return Adafactor(groups, lr=1e-2, scale_parameter=False, relative_step=False)
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=1e-2, momentum=settings.get("sgd_momentum", 0.0))
    if kind == "adamw_8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(groups, lr=1e-2)
    return torch.optim.AdamW(groups, lr=1e-2, fused=True)


@pytest.mark.parametrize("settings", EVERY)
def test_three_steps_are_the_librarys_own(settings):
    ours, others = named(), named()
    pair = make_optimizer(ours.items(), config(**settings)), theirs(settings, others)
    for seed in range(3):
        step(pair[0], ours, seed)
        step(pair[1], others, seed)
        assert all(torch.equal(ours[name], others[name]) for name in ours)
    start = named()
    assert not any(torch.equal(ours[name], start[name]) for name in ours)


def test_optimizers_differ():
    found = []
    for settings in (
        {},
        {"optim": "adafactor"},
        {"optim": "sgd"},
        {"optim": "sgd", "sgd_momentum": 0.9},
    ):
        parameters = named()
        optimizer = make_optimizer(parameters.items(), config(**settings))
        for seed in range(2):
            step(optimizer, parameters, seed)
        found.append(parameters["big"])
    assert not any(torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])


@pytest.mark.parametrize("settings", EVERY)
def test_the_state_is_as_large_as_is_counted(settings):
    for dtype in (torch.float32, torch.float64):
        if settings.get("optim") == "adamw_8bit" and dtype == torch.float64:
            continue
        parameters, about = named(dtype), config(**settings)
        optimizer = make_optimizer(parameters.items(), about)
        assert capture_optimizer(optimizer, parameters) == {}
        step(optimizer, parameters, 0)
        held = capture_optimizer(optimizer, parameters).values()
        real = sum(tensor.numel() * tensor.element_size() for tensor in held)
        assert real == optimizer_bytes(parameters.values(), about)


@pytest.mark.parametrize("settings", EVERY)
def test_the_state_goes_through_a_file_to_the_same_bits(settings):
    parameters = named()
    optimizer = make_optimizer(parameters.items(), config(**settings))
    for seed in range(2):
        step(optimizer, parameters, seed)
    again = {name: torch.nn.Parameter(p.detach().clone()) for name, p in parameters.items()}
    other = make_optimizer(again.items(), config(**settings))
    restore_optimizer(other, again, load(save(capture_optimizer(optimizer, parameters))))
    for seed in (2, 3):
        step(optimizer, parameters, seed)
        step(other, again, seed)
        assert all(torch.equal(parameters[name], again[name]) for name in again)
    kept = capture_optimizer(optimizer, parameters), capture_optimizer(other, again)
    assert kept[0].keys() == kept[1].keys()
    assert all(torch.equal(kept[0][key], kept[1][key]) for key in kept[0])


def test_a_state_of_a_kind_that_is_not_saved_is_no_secret():
    parameters = named()
    optimizer = make_optimizer(parameters.items(), config())
    step(optimizer, parameters, 0)
    optimizer.state[parameters["big"]]["later"] = [1]
    with pytest.raises(TypeError, match="later of big is list"):
        capture_optimizer(optimizer, parameters)


def test_decay_is_for_matrices(tiny_model):
    optimizer = make_optimizer(tiny_model.named_parameters(), config(weight_decay=0.1))
    for group in optimizer.param_groups:
        assert {p.ndim >= 2 for p in group["params"]} == {group["weight_decay"] > 0}


@pytest.mark.parametrize("settings", EVERY[:4])
@pytest.mark.parametrize("more", [{}, {"ema_decay": 0.9}])
def test_a_checkpoint_is_as_large_as_is_counted(tiny_model, settings, more):
    engine = PlainEngine(
        tiny_model.float(),
        copy.deepcopy(tiny_model),
        EngineSettings(compute_dtype=torch.float32, train_batch_size=2, eval_batch_size=2),
    )
    about = config(**settings, **more)
    state = TrainingState(engine, about)
    step(state.optimizer, state.parameters, 0)
    state.finish_step()
    captured = state.capture()
    generators = captured.tensors.pop("rng")
    assert generators and captured.bytes == checkpoint_bytes(engine, about)
    weights = sum(p.numel() * 4 for p in state.parameters.values())
    held = optimizer_bytes(state.parameters.values(), about)
    largest = max(p.numel() * 4 for p in state.parameters.values())
    assert state.step_bytes == weights + held + OPTIMIZERS[about.optim].temporaries * largest


@pytest.mark.parametrize(
    "settings, says",
    [
        (
            {"optim": "sgd", "adam_beta1": 0.8},
            "adam_beta1 is read by adamw_torch_fused and adamw_8bit",
        ),
        ({"optim": "adafactor", "adam_epsilon": 1e-6}, "adam_epsilon is read by"),
        ({"sgd_momentum": 0.9}, "sgd_momentum is read by sgd, not by adamw_torch_fused"),
        ({"optim": "adamw_8bit", "dtype": "float64"}, "8 bits of a float32"),
        ({"optim": "lion"}, "optim is 'lion'"),
    ],
)
def test_what_an_optimizer_does_not_read_is_refused(settings, says):
    with pytest.raises(ConfigError, match=says):
        build_config(settings)


def test_without_bitsandbytes_nothing_is_loaded(cli, pairs_file, monkeypatch):
    for name in ("bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, name, None)
    result = cli("train", "--model", "nowhere", "--data", pairs_file, "--optim", "adamw_8bit")
    assert result.code == 2 and "needs the package bitsandbytes" in result.err
    assert "nowhere" not in result.err and "data:" not in result.err


def test_a_bitsandbytes_that_cannot_run_here_is_refused(monkeypatch):
    class Broken(torch.optim.SGD):
        def __init__(self, groups, lr, **_):
            super().__init__(groups, lr=lr)

        def step(self):
            raise RuntimeError("CUDA Setup failed:\n\nno kernel for this device")

    class Idle(Broken):
        def step(self):
            pass

    failed = "CUDA Setup failed: no kernel for this device"
    for kind, says in ((Broken, failed), (Idle, "changes nothing")):
        package, module = types.ModuleType("bitsandbytes"), types.ModuleType("bitsandbytes.optim")
        module.AdamW, package.optim = kind, module
        monkeypatch.setitem(sys.modules, "bitsandbytes", package)
        monkeypatch.setitem(sys.modules, "bitsandbytes.optim", module)
        with pytest.raises(UsageError, match=says):
            require_optimizer(config(optim="adamw_8bit", device="cpu"))
