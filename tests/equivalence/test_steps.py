"""One optimizer step of every kind of loss: both engines, any cut into micro-batches, in
float64.
"""

import copy
from dataclasses import replace

import pytest
import torch
from test_fast_engine import PAIRS as SHAPES
from test_fast_engine import build
from test_fast_engine import engines as engines_of

from smoldpo.config.layer_spec import LayerSelection
from smoldpo.config.losses import FACTS
from smoldpo.engine.base import EngineSettings, join
from smoldpo.engine.build import build_engine
from smoldpo.engine.cache.trunk_states import MemoryStore, TrunkStore
from smoldpo.engine.fast import FastEngine
from smoldpo.engine.logprobs import LogprobModel
from smoldpo.engine.plain import PlainEngine
from smoldpo.engine.precision import MasterWeights
from smoldpo.losses import LOSSES, Objective
from smoldpo.models.freeze import freeze
from smoldpo.types import PairNumbers, TokenizedPair

# Answers of one length, between which the policy and the reference disagree about the order.
ALIKE = [
    TokenizedPair(f"alike {n}", (5 + n, 6), (10 + n, 11 + 5 * n, 2), (20 + n, 30 - n, 2))
    for n in range(6)
]
PAIRS = [*SHAPES, *ALIKE]

OPTIONS = {"label_smoothing": 0.1, "simpo_gamma": 0.3, "dpop_lambda": 2.0}
MIXED = {
    "sigmoid + sft": (["sigmoid", "sft"], [1.0, 0.3]),
    "aot + ipo": (["aot", "ipo"], [1.0, 0.01]),
}
OBJECTIVES = {name: Objective.of([name], beta=0.3, options=OPTIONS) for name in LOSSES}
OBJECTIVES |= {k: Objective.of(*v, beta=0.3, options=OPTIONS) for k, v in MIXED.items()}
OBJECTIVES["rpo"] = Objective.of(beta=0.3, rpo_alpha=0.5)
OBJECTIVES["js"] = Objective.of(beta=0.3, f_divergence_type="js_divergence")
WHOLE = [name for name, objective in OBJECTIVES.items() if objective.whole_step]
FREE = [name for name, objective in OBJECTIVES.items() if not objective.needs_reference]


def engines(model, **settings):
    return engines_of(model, pairs=PAIRS, **settings)


def step(engine, loss, pairs=PAIRS):
    for _, parameter in engine.trainable_parameters():
        parameter.grad = None
    found = engine.accumulate_gradients(pairs, loss)
    return found, {name: p.grad.clone() for name, p in engine.trainable_parameters()}


def assert_same(one, other):
    (found, gradients), (expected, expected_gradients) = one, other
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-10, atol=1e-12)
    assert (found.reference is None) == (expected.reference is None)
    assert gradients.keys() == expected_gradients.keys() and gradients
    for name, gradient in expected_gradients.items():
        error = (gradients[name] - gradient).norm() / gradient.norm().clamp(min=1e-3)
        assert error < 1e-10, (name, error)


def whole_graph(engine, loss):
    """The definition: all pairs through one graph, one backward pass from the mean."""
    policy = join([engine._forward_policy([pair]) for pair in PAIRS])
    reference = None
    if loss.needs_reference:
        reference = engine.reference_logps(PAIRS)
    for _, parameter in engine.trainable_parameters():
        parameter.grad = None
    loss(policy, reference, PAIRS, PAIRS).mean().backward()
    return {name: p.grad.clone() for name, p in engine.trainable_parameters()}


@pytest.fixture(scope="module")
def both():
    """Both engines, which a step leaves as they are but for gradients."""
    model = build("llama")
    freeze(model, LayerSelection(2))
    return engines(model)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_engines_agree_and_are_the_gradient_of_the_whole_step(both, name):
    plain, fast = both
    loss = OBJECTIVES[name]
    expected = step(plain, loss)
    assert_same(step(fast, loss), expected)
    for key, gradient in whole_graph(plain, loss).items():
        torch.testing.assert_close(expected[1][key], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [name for name, facts in FACTS.items() if facts.unpaired])
def test_single_answers_in_any_cut(name):
    """As above, where rows are answers that people liked or not, beside other prompts' answers."""
    model = build("llama")
    freeze(model, LayerSelection(2))
    labelled = [
        replace(pair, numbers=PairNumbers(liked=number % 3 != 0))
        for number, pair in enumerate(PAIRS)
    ]
    plain, fast = engines(model, stream_tokens=30)
    loss = Objective.of([name], beta=0.3, options={"undesirable_weight": 2.0})
    expected = step(plain, loss, labelled)
    assert_same(step(fast, loss, labelled), expected)
    policy = join([plain._forward_policy([pair]) for pair in labelled])
    reference = plain.reference_logps(labelled)
    assert (policy.rejected - reference.rejected).mean() != 0
    parameters = dict(plain.trainable_parameters())
    loss_of_step = loss(policy, reference, labelled, labelled).mean()
    whole = torch.autograd.grad(loss_of_step, list(parameters.values()))
    for key, gradient in zip(parameters, whole, strict=True):
        torch.testing.assert_close(expected[1][key], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "name, pairs_at_once, stream_tokens",
    [
        *((name, 3, 30) for name in ("sigmoid", "sft", "cpo", *WHOLE)),
        *((name, 1, 1) for name in ("cpo", *WHOLE[:1])),
        *((name, 5, 10_000) for name in ("sft", *WHOLE[-1:])),
    ],
)
def test_any_cut_into_micro_batches(name, pairs_at_once, stream_tokens):
    model = build("llama")
    freeze(model, LayerSelection(2))
    plain, fast = engines(model, stream_tokens=stream_tokens)
    expected = step(plain, OBJECTIVES[name])
    plain.budget = pairs_at_once
    for engine in (plain, fast):
        assert_same(step(engine, OBJECTIVES[name]), expected)


@pytest.mark.parametrize("store", [TrunkStore, lambda: MemoryStore(1e9)])
def test_two_passes_with_and_without_kept_states(store):
    model = build("llama")
    freeze(model, LayerSelection(2))
    plain, fast = engines(model, stream_tokens=30, trunk_store=store())
    assert_same(step(fast, OBJECTIVES["aot_unpaired"]), step(plain, OBJECTIVES["aot_unpaired"]))


def test_sorting_matters_here():
    """Otherwise the tests above would pass with a loss that is cut like a sum."""
    plain, _ = engines(build("llama"))
    whole = step(plain, OBJECTIVES["aot"])[0].losses.sort().values
    apart = step(plain, OBJECTIVES["sigmoid"])[0].losses.sort().values
    assert not torch.allclose(whole, apart, rtol=1e-3)


def count_forwards(monkeypatch):
    """How often each model is run: by the plain engine, and by the fast one with its head."""
    runs = []
    forward, logps = PlainEngine._forward, LogprobModel.logps

    def plain(self, model, pairs, *squares):
        runs.append(model)
        return forward(self, model, pairs, *squares)

    def fast(self, batch, states):
        runs.append(self.model)
        return logps(self, batch, states)

    monkeypatch.setattr(PlainEngine, "_forward", plain)
    monkeypatch.setattr(LogprobModel, "logps", fast)
    return runs


@pytest.mark.parametrize("name", FREE)
def test_without_a_reference_none_is_run(name, monkeypatch):
    model = build("llama")
    freeze(model, LayerSelection(2))
    runs = count_forwards(monkeypatch)
    plain = PlainEngine(
        copy.deepcopy(model),
        None,
        EngineSettings(compute_dtype=torch.float64, train_batch_size=2, eval_batch_size=2),
    )
    fast = FastEngine(
        model,
        MasterWeights(model, torch.float64),
        settings=EngineSettings(stream_tokens=10_000, needs_reference=False),
    )
    for engine in (plain, fast):
        engine.prepare(PAIRS)
        assert runs == [], "what is prepared is the trunk alone"
        found, _ = step(engine, OBJECTIVES[name])
        assert found.reference is None
        assert len(runs) == (6 if engine is plain else 1), "once a micro-batch, the policy"
        with pytest.raises(RuntimeError, match="without a reference"):
            engine.reference_logps(PAIRS)
        runs.clear()
    assert len(fast._reference_logps) == 0


def test_an_engine_that_has_a_reference_does_not_run_it_for_a_loss_without(monkeypatch):
    plain, _ = engines(build("llama"))
    runs = count_forwards(monkeypatch)
    step(plain, OBJECTIVES["orpo"])
    assert runs and all(model is plain.policy for model in runs)


def test_a_loss_that_needs_a_reference_is_refused_by_an_engine_without():
    model = build("llama")
    plain = PlainEngine(
        model,
        None,
        EngineSettings(compute_dtype=torch.float64, train_batch_size=2, eval_batch_size=2),
    )
    fast = FastEngine(
        model, MasterWeights(model, torch.float64), settings=EngineSettings(needs_reference=False)
    )
    for engine in (plain, fast):
        with pytest.raises(RuntimeError, match="without a reference"):
            engine.accumulate_gradients(PAIRS, OBJECTIVES["sigmoid"])


def test_a_loss_of_one_side_alone_in_two_passes():
    """A side that a whole-step loss does not read has a slope of zero."""

    class LastOfChosen:
        needs_reference, whole_step = False, True

        def __call__(self, policy, reference, pairs, step):
            assert len(pairs) == len(PAIRS)
            return policy.chosen.sort().values * torch.arange(len(pairs))

    plain, fast = engines(build("llama"), stream_tokens=30)
    assert_same(step(fast, LastOfChosen()), step(plain, LastOfChosen()))


def test_every_kind_of_loss_is_here():
    assert set(WHOLE) >= {"aot", "aot_unpaired"} and set(FREE) == {"sft", "simpo", "cpo", "orpo"}
    assert set(FACTS) <= set(OBJECTIVES)


def test_the_plain_engine_is_built_without_a_copy_where_no_reference_is_needed():
    about = EngineSettings(torch.float64, 2, 2, 100, "off", engine="plain")
    model = build("llama")
    assert build_engine(model, None, about).engine.reference is not None
    about = replace(about, needs_reference=False)
    assert build_engine(model, None, about).engine.reference is None
