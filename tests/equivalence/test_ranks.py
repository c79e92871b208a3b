"""Steps on one to four ranks: losses, log-probabilities and gradients of every kind of loss.

Ranks start once for each world size, and go through all cases.
"""

import pytest
import torch
from test_adapters import KINDS, SETTINGS
from test_fast_engine import build
from test_steps import OBJECTIVES, PAIRS

from rank_processes import computed
from smoldpo.config.layer_spec import LayerSelection
from smoldpo.engine.autotune import KernelChoice
from smoldpo.engine.base import EngineSettings
from smoldpo.engine.build import build_engine
from smoldpo.losses import Objective
from smoldpo.models.adapters import add_adapters
from smoldpo.models.freeze import freeze
from smoldpo.utils.shares import whole

LOSS = Objective.of(beta=0.3)


def model_of(kind, dtype=torch.float64):
    model = build("llama").to(dtype)
    if kind in KINDS:
        adapters = SETTINGS.__class__(**vars(SETTINGS) | KINDS[kind])
        add_adapters(model, adapters, dtype)
        return model
    freeze(model, LayerSelection(int(kind)))
    return model


def engine_of(kind, engine, dtype=torch.float64, moved=True, **settings):
    told = EngineSettings(
        dtype, 2, 2, 40, engine=engine, kernels=KernelChoice(), cache="memory", **settings
    )
    built = build_engine(model_of(kind, dtype), None, told).engine
    built.prepare(PAIRS)
    with torch.no_grad():
        for _, parameter in built.trainable_parameters() if moved else ():
            parameter.add_(0.03 * torch.randn_like(parameter))
    built.updated()
    return built


def step(engine, loss, pairs):
    for _, parameter in engine.trainable_parameters():
        parameter.grad = None
    found = engine.accumulate_gradients(pairs, loss)
    logps = {f"policy {name}": each for name, each in vars(found.policy).items()}
    columns = {"losses": found.losses, **logps, "evaluated": engine.policy_logps(pairs).chosen}
    columns |= {f"grad {name}": p.grad for name, p in engine.trainable_parameters()}
    return {name: each.clone() for name, each in columns.items() if each is not None}


def cases():
    """Losses of all kinds; adapters, frozen depths, engines, ragged steps, dtypes: names, and the
    engine, loss and pairs of each.
    """
    f64 = torch.float64
    same = ("2", "fast", f64, {})
    yield from ((name, same, loss, PAIRS) for name, loss in OBJECTIVES.items())
    yield from ((f"{count} pairs", same, LOSS, PAIRS[:count]) for count in (1, 2, 9))
    yield "use_weighting", ("2", "fast", f64, {"use_weighting": True}), LOSS, PAIRS
    for kind in ("0", "3", *KINDS):
        yield f"fast {kind}", (kind, "fast", f64, {}), LOSS, PAIRS
    for kind in ("0", "lora"):
        yield f"plain {kind}", (kind, "plain", f64, {}), LOSS, PAIRS
    yield "plain, whole step", ("2", "plain", f64, {}), OBJECTIVES["aot"], PAIRS
    yield "float32", ("1", "fast", torch.float32, {}), LOSS, PAIRS
    yield "bfloat16", ("1", "fast", torch.bfloat16, {}), LOSS, PAIRS
    for name in ("sigmoid", "aot"):
        told = ("1", "fast", f64, {"ordered_sum": False})
        yield f"unordered {name}", told, OBJECTIVES[name], PAIRS[:9]


def steps(part=0, of=1):
    """What the steps give of every so many cases, from one on."""
    found, known, engine = {}, None, None
    for name, (kind, which, dtype, more), loss, pairs in list(cases())[part::of]:
        if (kind, which, dtype, more) != known:
            torch.manual_seed(1)
            known, engine = (kind, which, dtype, more), engine_of(kind, which, dtype, **more)
        found |= {f"{name}: {k}": each for k, each in step(engine, loss, pairs).items()}
    return found


@pytest.fixture(scope="module")
def alone():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield steps()
    torch.set_num_threads(threads)


@pytest.mark.parametrize("count, part, of", [(2, 0, 1), (3, 0, 2), (4, 1, 2)])
def test_every_kind_of_step(count, part, of, alone, tmp_path):
    """The same bits on any number of ranks; where sums may be in any order, up to rounding."""
    found = computed(steps, count, tmp_path, part, of)
    assert len(found) > 300 / of
    for name, each in found.items():
        if name.startswith("unordered"):
            torch.testing.assert_close(each, alone[name], rtol=1e-10, atol=1e-12)
        else:
            assert torch.equal(each, alone[name]), name


def sharded(fsdp):
    """Steps of the plain engine, with whole models or with shares of them."""
    found = {}
    for kind, name, dtype in [
        ("0", "sigmoid", torch.float64),
        ("2", "aot", torch.float64),
        ("lora", "sigmoid", torch.float64),
        ("1", "sigmoid", torch.float32),
    ]:
        torch.manual_seed(1)
        engine = engine_of(kind, "plain", dtype, fsdp=fsdp, moved=False)
        for count in (1, 5):
            columns = step(engine, OBJECTIVES[name], PAIRS[:count])
            found |= {f"{kind} {dtype} {count}: {k}": whole(each) for k, each in columns.items()}
    return found


@pytest.mark.parametrize("count", [2, 3])
def test_shared_out_weights(count, tmp_path):
    """FSDP2: losses and gradients are those of whole models, up to rounding; a rank without pairs
    of its own takes part, and does not count.
    """
    expected, found = sharded(False), computed(sharded, count, tmp_path, True)
    assert found.keys() == expected.keys() and len(found) > 200
    for name, each in expected.items():
        bound = {} if each.dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-12}
        torch.testing.assert_close(found[name], each, **bound)
