"""Tails and squares: what the engines give beside the sums, and the losses of it, in float64."""

import copy
import functools
from dataclasses import replace

import pytest
import torch
from test_adapters import KINDS, adapted
from test_adapters import engines as adapted_engines
from test_fast_engine import SHARING, build
from test_fast_engine import engines as engines_of
from test_moving_reference import engines as moving_engines
from test_moving_reference import move
from test_steps import PAIRS, assert_same, step, whole_graph

from smoldpo.api.logps import sequence_logps
from smoldpo.config.layer_spec import LayerSelection
from smoldpo.engine import plain as plain_engine
from smoldpo.engine.autotune import KernelChoice
from smoldpo.engine.base import EngineSettings
from smoldpo.engine.build import build_engine
from smoldpo.engine.cache import reference_logps, trunk_states
from smoldpo.engine.cache.reference_logps import ReferenceStore
from smoldpo.engine.cache.trunk_states import MemoryStore, TrunkStore
from smoldpo.engine.fast import FastEngine
from smoldpo.engine.kernels.lm_head import completion_logps, completion_scores
from smoldpo.engine.logprobs import LogprobModel, score
from smoldpo.engine.packing import pack
from smoldpo.engine.plain import PlainEngine, pad_batch
from smoldpo.engine.precision import MasterWeights
from smoldpo.losses import Objective
from smoldpo.models.freeze import freeze


def of(*names, **settings):
    return Objective.of(names, beta=0.3, options={"simpo_gamma": 0.3}, **settings)


LENGTHS = {
    "sigmoid": of("sigmoid", ld_alpha=0.3),
    "nothing of the tails": of("sigmoid", ld_alpha=0.0),
    "all of them": of("sigmoid", ld_alpha=1.0),
    "ipo": of("ipo", ld_alpha=0.3),
    "apo_zero": of("apo_zero", ld_alpha=0.3),
    "cpo": of("cpo", ld_alpha=0.3),
    "sigmoid + sft": of("sigmoid", "sft", ld_alpha=0.3),
    "rpo": of("sigmoid", ld_alpha=0.3, rpo_alpha=0.5),
    "aot": of("aot", ld_alpha=0.3),
    "aot_unpaired": of("aot_unpaired", ld_alpha=0.3),
}
WEIGHTED = {
    "weighted": of("sigmoid", use_weighting=True),
    "weighted ipo": of("ipo", use_weighting=True),
    "weighted simpo": of("simpo", use_weighting=True),
    "weighted sigmoid + sft": of("sigmoid", "sft", use_weighting=True),
    "both": of("sigmoid", use_weighting=True, ld_alpha=0.3),
}
OBJECTIVES = LENGTHS | WEIGHTED
FIELDS = (
    "chosen",
    "rejected",
    "chosen_tail",
    "rejected_tail",
    "chosen_squares",
    "rejected_squares",
)


def engines(model, pairs=PAIRS, **settings):
    return engines_of(model, pairs=pairs, **settings)


def frozen_model(frozen=2, **settings):
    model = build("llama", **settings)
    freeze(model, LayerSelection(frozen))
    return model


@torch.no_grad()
def by_hand(model, pair):
    """The six numbers of a pair, from unpadded sequences one at a time."""
    found = {}
    shorter = min(len(pair.chosen_ids), len(pair.rejected_ids))
    for side, ids in (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids)):
        logits = model(torch.tensor([pair.prompt_ids + ids])).logits[0]
        probs = torch.softmax(logits[len(pair.prompt_ids) - 1 : -1], -1)
        logps = probs.gather(1, torch.tensor(ids)[:, None])[:, 0].log()
        found |= {side: logps.sum(), f"{side}_tail": logps[shorter:].sum()}
        found[f"{side}_squares"] = (probs**2).sum(-1).log().sum()
    return found


def test_both_engines_against_single_sequences():
    model = frozen_model()
    plain, fast = engines(model, use_weighting=True)
    expected = [by_hand(plain.policy, pair) for pair in PAIRS]
    assert any(each["chosen_tail"] for each in expected) and any(
        each["rejected_tail"] for each in expected
    )
    for engine in (plain, fast):
        logps = engine.policy_logps(PAIRS)
        for name in FIELDS:
            wanted = torch.stack([each[name] for each in expected])
            torch.testing.assert_close(vars(logps)[name], wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("stream_tokens", [1, 40, 10_000])
@pytest.mark.parametrize("pairs", [PAIRS, SHARING], ids=["alone", "sharing"])
def test_policy_reference_and_scoring_agree(pairs, stream_tokens):
    plain, fast = engines(frozen_model(), pairs, stream_tokens=stream_tokens)
    expected = plain.policy_logps(pairs)
    against = plain.reference_logps(pairs)
    assert expected.chosen_squares is None
    for found, wanted in (
        (fast.policy_logps(pairs), expected),
        (score(copy.deepcopy(plain.policy), pairs, KernelChoice()), expected),
        (fast.reference_logps(pairs), against),
    ):
        assert found.sums.keys() == wanted.sums.keys() == set(FIELDS[:4])
        for name, each in wanted.sums.items():
            torch.testing.assert_close(found.sums[name], each, rtol=1e-10, atol=1e-12)


@functools.cache
def both_engines(use_weighting):
    """Which a step leaves as they are but for gradients."""
    return engines(frozen_model(), use_weighting=use_weighting)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_engines_agree_and_are_the_gradient_of_the_whole_step(name):
    loss = OBJECTIVES[name]
    plain, fast = both_engines(loss.use_weighting)
    expected = step(plain, loss)
    assert_same(step(fast, loss), expected)
    for key, gradient in whole_graph(plain, loss).items():
        torch.testing.assert_close(expected[1][key], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "name, pairs_at_once, stream_tokens",
    [
        *((name, 3, 30) for name in ("sigmoid", "sigmoid + sft", "aot", "both")),
        ("aot", 1, 1),
        ("both", 1, 1),
        ("both", 5, 10_000),
    ],
)
def test_any_cut_into_micro_batches(name, pairs_at_once, stream_tokens):
    loss = OBJECTIVES[name]
    plain, fast = engines(
        frozen_model(), stream_tokens=stream_tokens, use_weighting=loss.use_weighting
    )
    expected = step(plain, loss)
    plain.budget = pairs_at_once
    for engine in (plain, fast):
        assert_same(step(engine, loss), expected)


@pytest.mark.parametrize("store", [TrunkStore, lambda: MemoryStore(1e9)], ids=["off", "memory"])
@pytest.mark.parametrize("frozen, tied", [(0, True), (2, False), (4, True)])
def test_any_cache_any_depth_and_a_head_that_trains(frozen, tied, store):
    for name in ("sigmoid", "both"):
        loss = OBJECTIVES[name]
        plain, fast = engines(
            frozen_model(frozen, tied=tied),
            trunk_store=store(),
            stream_tokens=30,
            use_weighting=loss.use_weighting,
        )
        assert_same(step(fast, loss), step(plain, loss))


@pytest.mark.parametrize("head", [True, False])
def test_either_kernel(head):
    """Asked for squares the head goes by products whatever the kernel; asked for tails by
    either.
    """
    for loss in (LENGTHS["sigmoid"], WEIGHTED["both"]):
        plain, fast = engines(
            frozen_model(), kernels=KernelChoice(True, head), use_weighting=loss.use_weighting
        )
        assert_same(step(fast, loss), step(plain, loss))


def test_tails_and_weights_matter_here():
    plain, _ = engines(frozen_model(), use_weighting=True)
    found = {name: step(plain, OBJECTIVES[name])[0].losses for name in OBJECTIVES}
    usual = step(plain, of("sigmoid"))[0].losses
    assert torch.equal(found["all of them"], usual)
    for name in ("sigmoid", "nothing of the tails", "weighted", "both"):
        assert not torch.allclose(found[name], usual, rtol=1e-3), name


def test_a_reference_of_its_own():
    model, other = frozen_model(), build("llama", seed=5)
    for name in ("sigmoid", "both"):
        loss = OBJECTIVES[name]
        plain, fast = engines(
            model, reference=copy.deepcopy(other), use_weighting=loss.use_weighting
        )
        assert_same(step(fast, loss), step(plain, loss))


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("name", ["sigmoid", "aot", "both"])
def test_adapters(name, kind):
    """The policy with its adapters off is the reference: of it nothing is weighed."""
    loss = OBJECTIVES[name]
    model = adapted(build("llama"), freeze_layers=2, **KINDS[kind])
    plain, fast = adapted_engines(model, pairs=PAIRS, use_weighting=loss.use_weighting)
    assert_same(step(fast, loss), step(plain, loss))


@pytest.mark.parametrize("name", ["sigmoid", "aot", "both"])
def test_a_moving_reference(name):
    """Once it has moved, its tails come from where its sums do."""
    loss = OBJECTIVES[name]
    told = {"use_weighting": loss.use_weighting, "kernels": KernelChoice()}
    plain, fast = moving_engines(frozen_model(), pairs=PAIRS, **told)
    found = []
    for number in range(2):
        for engine in (plain, fast):
            move(engine, number)
            engine.synced_reference.sync(0.4)
        expected = step(plain, loss)
        assert_same(step(fast, loss), expected)
        found.append(expected[0].reference.chosen_tail)
    assert not torch.equal(*found)


# The head


@pytest.mark.parametrize("rows, words", [(1, 5), (63, 97), (300, 5000)])
@pytest.mark.parametrize("trains", [True, False])
def test_the_heads_squares(rows, words, trains):
    """Over several chunks and slices, and the log-probabilities with their gradients are the
    same.
    """
    torch.manual_seed(0)
    states = (3 * torch.randn(rows, 16).double()).requires_grad_()
    weight = torch.randn(words, 16).double().requires_grad_(trains)
    targets, slopes = torch.randint(0, words, (rows,)), torch.randn(rows).double()
    inputs = [states, weight] if trains else [states]
    probs = torch.softmax(states @ weight.T, -1).detach()
    logps, squares = completion_scores(states, weight, targets, fused=True, squares=True)
    torch.testing.assert_close(squares, (probs**2).sum(-1).log(), rtol=1e-11, atol=1e-12)
    assert not squares.requires_grad and logps.requires_grad
    bare = completion_logps(states, weight, targets)
    torch.testing.assert_close(logps, bare, rtol=1e-11, atol=1e-12)
    gradients = [torch.autograd.grad(each, inputs, slopes) for each in (logps, bare)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-11)
    assert completion_scores(states, weight, targets)[1] is None


def test_no_second_product(monkeypatch):
    """Squares cost no product more, and no tensor of all rows by all words is made."""
    states, weight = torch.randn(256, 16), torch.randn(1000, 16)
    targets = torch.zeros(256, dtype=torch.long)
    sizes = {}
    for squares in (False, True):
        with torch.profiler.profile(record_shapes=True) as profile:
            completion_scores(states, weight, targets, squares=squares)
        events = [e for e in profile.events() if e.name in ("aten::mm", "aten::bmm", "aten::addmm")]
        sizes[squares] = [e.input_shapes[0] for e in events]
        shapes = [shape for e in profile.events() for shape in e.input_shapes if shape]
        assert [256, 1000] not in shapes and [128, 1000] in shapes
    assert sizes[True] == sizes[False] == [[128, 16]] * 2


@torch.no_grad()
def test_squares_of_the_sure_and_of_the_even():
    """Σ p² is 1 where one word has all, 1 / V where all have the same; nothing overflows."""
    weight = torch.eye(50)
    sure, even = 1e4 * torch.eye(50)[:1], torch.zeros(1, 50)
    targets = torch.tensor([7, 7])
    found = completion_scores(torch.cat([sure, even]), weight, targets, squares=True)
    expected = -torch.tensor(50.0).log()
    torch.testing.assert_close(found[1], torch.stack([torch.tensor(0.0), expected]))
    assert found[0][0] == -1e4


# Bits and stores


def bfloat16_model():
    model = build("llama").float()
    for module in model.modules():
        module.__dict__.pop("forward", None)
    freeze(model, LayerSelection(2))
    return model


@pytest.mark.parametrize("use_weighting", [True, False])
def test_first_sums_are_the_references_to_the_bit(use_weighting):
    """With weights the head goes by products, and so it must for the reference."""
    model = bfloat16_model()
    fast = FastEngine(
        model,
        MasterWeights(model, torch.bfloat16),
        settings=EngineSettings(use_weighting=use_weighting, stream_tokens=10_000),
    )
    fast.prepare(PAIRS)
    fast.budget = 30
    loss = OBJECTIVES["both" if use_weighting else "sigmoid"]
    _, policy, reference = fast.accumulate_gradients(PAIRS, loss)
    for name, each in reference.sums.items():
        assert torch.equal(policy.sums[name], each), name


def settings_of(**more):
    return EngineSettings(torch.float64, 2, 2, 100, "disk", 1e9, False, **more)


def count_head(monkeypatch):
    runs = []
    logps = LogprobModel.logps

    def counted(self, batch, states):
        runs.append(len(batch.segments))
        return logps(self, batch, states)

    monkeypatch.setattr(LogprobModel, "logps", counted)
    return runs


def test_one_store_serves_every_ld_alpha(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    start = frozen_model()
    found = []
    runs = count_head(monkeypatch)
    for kernels in (KernelChoice(), KernelChoice()):
        built = build_engine(copy.deepcopy(start), None, settings_of(kernels=kernels), "hash")
        engine, folders = built.engine, built.folders
        engine.prepare(PAIRS)
        found.append((engine.reference_logps(PAIRS), folders, sum(runs)))
    (first, folders, computed), (again, same, still) = found
    assert folders == same and computed == still == len(PAIRS), "the second run scores no reference"
    for ld_alpha in (0.0, 0.4, 1.0):
        loss = of("sigmoid", ld_alpha=ld_alpha)
        assert torch.equal(loss.logps_for_loss(first).chosen, loss.logps_for_loss(again).chosen)
    assert again.chosen_tail.abs().sum() > 0


def test_a_weighted_run_keeps_its_reference_by_products(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    start, folders = frozen_model(), []
    for use_weighting in (False, True):
        settings = settings_of(kernels=KernelChoice(True, True), use_weighting=use_weighting)
        built = build_engine(copy.deepcopy(start), None, settings, "hash")
        assert built.kernels == built.engine.kernels == KernelChoice(True, not use_weighting)
        folders.append({folder for folder in built.folders if folder.parent.name == "reference"})
    assert folders[0] != folders[1]


@pytest.mark.parametrize("store, kind", [(trunk_states, "trunk"), (reference_logps, "reference")])
def test_the_format_of_a_store_is_part_of_its_key(tmp_path, monkeypatch, store, kind):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    start, folders = frozen_model(), []
    for number in (1, 2):
        monkeypatch.setattr(store, "FORMAT", number)
        settings = settings_of(kernels=KernelChoice())
        kept = build_engine(copy.deepcopy(start), None, settings, "hash").folders
        folders.append({folder.parent.name: folder for folder in kept})
    assert {name for name in folders[0] if folders[0][name] != folders[1][name]} == {kind}


def test_stored_tails_are_of_the_right_side():
    store = ReferenceStore()
    plain, fast = engines(frozen_model(), reference_store=store)
    del plain
    for pair in PAIRS:
        chosen, rejected, chosen_tail, rejected_tail = store[fast.batching.key(pair)]
        longer = len(pair.chosen_ids) - len(pair.rejected_ids)
        assert (chosen_tail < 0) == (longer > 0) and (rejected_tail < 0) == (longer < 0)
        assert chosen_tail > chosen and rejected_tail > rejected


def test_sequence_logps_gives_tails_with_gradients(tiny_model):
    """To the float32 in which transformers' own norms compute."""
    plain = PlainEngine(
        tiny_model,
        None,
        EngineSettings(compute_dtype=torch.float64, train_batch_size=4, eval_batch_size=4),
    )
    expected = plain._forward(tiny_model, PAIRS)
    found = sequence_logps(copy.deepcopy(tiny_model), PAIRS, stream_tokens=40)
    assert found.sums.keys() == expected.sums.keys()
    for name, each in expected.sums.items():
        torch.testing.assert_close(found.sums[name], each, rtol=1e-5, atol=1e-5)
        assert found.sums[name].requires_grad


def test_the_tail_written_out():
    pair = replace(PAIRS[0], prompt_ids=(1,), chosen_ids=(2, 3, 4), rejected_ids=(5,))
    other = replace(pair, chosen_ids=(6,), rejected_ids=(7, 8))
    assert pack([pair, other]).tail.int().tolist() == [0, 1, 1, 0, 0, 0, 1]
    assert pad_batch([pair, other]).tail.int().tolist() == [
        [0, 0, 1, 1],
        [0, 0, 0, 0],
        [0, 0, 0, 0],
        [0, 0, 1, 0],
    ]


def test_an_engine_that_was_not_told_to_weigh_says_so():
    plain, fast = engines(frozen_model())
    for engine in (plain, fast):
        with pytest.raises(ValueError, match="with use_weighting"):
            step(engine, WEIGHTED["weighted"])


def test_the_plain_engine_weighs_by_the_policy_alone(monkeypatch):
    asked = []
    original = plain_engine.token_logps

    def watched(model, batch, squares=False):
        asked.append((model, squares))
        return original(model, batch, squares)

    monkeypatch.setattr(plain_engine, "token_logps", watched)
    model = frozen_model()
    engine = PlainEngine(
        model,
        copy.deepcopy(model),
        EngineSettings(
            compute_dtype=torch.float64, train_batch_size=4, eval_batch_size=4, use_weighting=True
        ),
    )
    step(engine, WEIGHTED["weighted"])
    assert {(who is model, squares) for who, squares in asked} == {(True, True), (False, False)}
