"""What the trials of a sweep share, and what they must not."""

import gc
import json
import shutil
import types
import weakref

import pytest
import yaml

from smoldpo.config.load import build_config
from smoldpo.engine import build
from smoldpo.engine.autotune import KernelChoice
from smoldpo.engine.cache import folder as cache
from smoldpo.engine.cache.reference_logps import ReferenceStore
from smoldpo.engine.logprobs import LogprobModel
from smoldpo.sweep import run as sweep_run
from smoldpo.sweep import shared, trials
from sweeping import results


@pytest.fixture
def work(monkeypatch):
    """What each trial computes: [streams through the trunk, pairs of the reference]; the last is
    best/.
    """
    counts: list[list[int]] = []

    def counting(owner, name, place):
        original = getattr(owner, name)

        def counted(*given, **options):
            counts[-1][place] += 1
            return original(*given, **options)

        monkeypatch.setattr(owner, name, counted)

    counting(LogprobModel, "trunk_states", 0)
    counting(ReferenceStore, "put", 1)
    for owner, name in ((sweep_run, "run_trial"), (sweep_run, "measure_winner")):
        original = getattr(owner, name)

        def marked(*given, original=original, **options):
            counts.append([0, 0])
            return original(*given, **options)

        monkeypatch.setattr(owner, name, marked)
    return counts


@pytest.mark.parametrize("cache", ["disk", "memory"])
def test_a_trial_costs_its_top_layers_only(sweep, work, cache, monkeypatch):
    read = []
    original = shared.load_data
    monkeypatch.setattr(shared, "load_data", lambda config: read.append(1) or original(config))
    cut = []
    tokenize = shared.tokenize
    monkeypatch.setattr(shared, "tokenize", lambda *given: cut.append(1) or tokenize(*given))
    sweep({"beta": [0.1, 0.5], "seed": [1, 2]}, cache=cache)
    first, *others, last = work
    assert first[0] > 0 and first[1] > 0
    assert others == [[0, 0]] * 3, "no trunk and no reference pass after the first trial"
    assert last[0] > 0 and last[1] > 0, "the final pairs were not there before"
    assert len(read) == len(cut) == 2, "once for the trials, once for the final pairs"


def test_tokens_are_shared_where_they_would_be_the_same(tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(shared, "tokenize", lambda *given: object())
    inputs = shared.SharedInputs(tmp_path)

    def tokens(positions=512, rows=300, **settings):
        facts = types.SimpleNamespace(positions=positions, rows=rows)
        models = types.SimpleNamespace(tokenizer=tiny_tokenizer, facts=facts)
        return inputs._encode(build_config(settings), models, None)

    first = tokens(beta=0.1)
    assert tokens(beta=0.5) is first
    for other in (
        tokens(max_length=64),
        tokens(positions=64),
        tokens(rows=299),
        tokens(max_train_samples=3),
    ):
        assert other is not first


DEPTHS, BETAS = {"freeze_layers": [2, 3]}, {"beta": [0.1, 0.5]}


@pytest.mark.parametrize(
    "cache, grid, trunks, references",
    [
        ("disk", BETAS | DEPTHS, "1100", "1100"),
        ("memory", DEPTHS | BETAS, "1010", "1010"),
        ("memory", BETAS | DEPTHS, "1111", "1100"),  # it holds one depth's states at a time
    ],
)
def test_another_depth_computes_once_more(sweep, work, cache, grid, trunks, references):
    sweep(grid, cache=cache)
    assert "".join("01"[bool(trunk)] for trunk, _ in work[:4]) == trunks
    assert "".join("01"[bool(pairs)] for _, pairs in work[:4]) == references


def test_without_a_cache_the_reference_is_still_computed_once(sweep, work):
    sweep({"beta": [0.1, 0.5]}, cache="off")
    assert work[0][1] > 0 and work[1][1] == 0
    assert work[1][0] > 0, "the trunk is computed anew, as was asked"


def test_every_trial_computes_as_the_first_one_did(sweep, cli, out, monkeypatch):
    """Which kernel is faster is measured once: another answer would round otherwise, and miss the
    cache.
    """
    asked = []
    monkeypatch.setattr(
        build, "choose_kernels", lambda *_: asked.append(1) or KernelChoice(len(asked) % 2 == 1)
    )
    sweep({"beta": [0.1, 0.5]}, dtype="auto", compile="auto", device="auto")
    assert len(asked) == 1
    machines = [
        json.loads((out / name / "environment.json").read_text())
        for name in ("trials/001", "trials/002", "best")
    ]
    assert all(m["kernels"] == machines[0]["kernels"] for m in machines)
    shutil.rmtree(out / "trials/002")
    assert cli("resume", "out").code == 0 and len(asked) == 1, "nor by a sweep that goes on"
    dtypes = {
        yaml.safe_load((out / n / "config.yaml").read_text())["dtype"]
        for n in ("trials/002", "best")
    }
    assert len(dtypes) == 1 and dtypes != {"auto"}


def test_nothing_is_shared_after_a_sweep(sweep):
    sweep({"beta": [0.1]}, cache="memory")
    assert cache._shared is None


def test_no_trial_keeps_its_model_in_memory(sweep, monkeypatch):
    models, alive = [], []
    original = trials._make

    def made(*given):
        alive.append(sum(model() is not None for model in models))
        trial = original(*given)
        policy = trial.models.engine.policy
        models.append(weakref.ref(policy.model.layers[3].self_attn.q_proj))
        return trial

    monkeypatch.setattr(trials, "_make", made)
    gc.disable()
    try:
        sweep({"learning_rate": [1e-3, 1e30, 1e-2]}, code=1)
    finally:
        gc.enable()
    assert alive == [0, 0, 0] and models[-1]() is None


def test_a_sweep_over_precisions(sweep, out):
    """In float64 the weights are loaded in float64, and hash otherwise."""
    sweep({"dtype": ["float32", "float64"]})
    assert results(out)["done"] == 2


def test_the_first_trial_of_the_fast_engine_decides_its_kernels(sweep, out, monkeypatch):
    asked = []
    monkeypatch.setattr(
        build, "choose_kernels", lambda *_: asked.append(1) or KernelChoice(len(asked) % 2 == 1)
    )
    sweep({"engine": ["plain", "fast"], "beta": [0.1, 0.5]}, compile="auto")
    assert len(asked) == 1
    machines = [
        json.loads((out / f"trials/00{n}/environment.json").read_text()) for n in (1, 2, 3, 4)
    ]
    assert [m["engine"] for m in machines] == ["plain", "plain", "fast", "fast"]
    assert machines[2]["kernels"] == machines[3]["kernels"] != {}


def test_the_final_pairs_are_measured_once(swept, cli, monkeypatch):
    swept({"beta": [0.1]})
    monkeypatch.setattr(sweep_run, "measure_winner", None)
    monkeypatch.setattr(sweep_run, "run_trial", None)
    assert cli("resume", "out").code == 0
