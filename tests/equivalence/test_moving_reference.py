"""TR-DPO's moving reference: fast = plain = by hand in float64, whatever is frozen and however it
is kept.
"""

import copy

import pytest
import torch
from test_fast_engine import LOSS, PAIRS, SHARING, assert_equal, build

from smoldpo.config.layer_spec import LayerSelection
from smoldpo.config.load import build_config
from smoldpo.engine.base import EngineSettings
from smoldpo.engine.build import build_engine
from smoldpo.engine.plain import pad_batch, sequence_logps
from smoldpo.losses import Objective
from smoldpo.models.freeze import freeze
from smoldpo.training.state import TrainingState, checkpoint_bytes
from smoldpo.types import TokenizedPair
from smoldpo.utils.errors import UsageError

ALPHA = 0.3


def about(**settings):
    base = {"compute_dtype": torch.float64, "train_batch_size": 2, "eval_batch_size": 2}
    base |= {"stream_tokens": 40, "cache": "memory", "cache_bytes": 0.0, "compiled": False}
    return EngineSettings(**base | {"sync_ref_model": True} | settings)


def built(model, reference=None, **settings):
    return build_engine(model, reference, about(**settings)).engine


def engines(model, reference=None, pairs=PAIRS, **settings):
    """Both engines as a run builds them, on copies of the same models."""
    plain, fast = (
        built(copy.deepcopy(model), copy.deepcopy(reference), engine=engine, **settings)
        for engine in ("plain", "fast")
    )
    fast.prepare(pairs)
    return plain, fast


def move(engine, number):
    """A step of the policy that depends on the parameter and the number alone."""
    with torch.no_grad():
        for _, parameter in engine.trainable_parameters():
            wave = torch.sin(torch.arange(parameter.numel(), dtype=torch.float64) + number)
            parameter.add_(0.05 * wave.view_as(parameter).to(parameter.dtype))
    engine.updated()


def reference_logps(engine, pairs=PAIRS):
    for _, parameter in engine.trainable_parameters():
        parameter.grad = None
    found = engine.accumulate_gradients(pairs, LOSS).reference
    return torch.stack([found.chosen, found.rejected])


def by_hand(model, pairs=PAIRS):
    with torch.no_grad():
        return torch.stack(sequence_logps(model, pad_batch(pairs)).chunk(2))


def mixed(model, policy_weights, alpha=ALPHA):
    """A reference's next weights by the paper's formula; all weights, frozen ones too."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(alpha * policy_weights[name] + (1 - alpha) * parameter)


WAYS = [
    (0, []),
    (0, ["embeddings"]),
    (2, []),
    (2, ["norms"]),
    (3, ["*.mlp.*"]),
    (4, []),
    (0, ["*.layers.0.*", "*.layers.2.*"]),
]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("frozen, names", WAYS)
def test_three_moves_by_hand(tied, frozen, names):
    model = build("llama", tied)
    freeze(model, LayerSelection(frozen, freeze=names))
    plain, fast = engines(model)
    policy, reference = copy.deepcopy(model), copy.deepcopy(model)
    start = by_hand(reference)
    for number in range(3):
        for engine in (plain, fast):
            move(engine, number)
        weights = dict(fast.trainable_parameters())
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                if name in weights:
                    parameter.copy_(weights[name])
        before = reference_logps(fast)
        torch.testing.assert_close(before, by_hand(reference), rtol=1e-10, atol=1e-12)
        for engine in (plain, fast):
            engine.synced_reference.sync(ALPHA)
        mixed(reference, dict(policy.named_parameters()))
        expected = by_hand(reference)
        assert (expected - before).abs().max() > 1e-3, "it moved"
        for engine in (plain, fast):
            torch.testing.assert_close(reference_logps(engine), expected, rtol=1e-10, atol=1e-12)
        assert_equal(plain, fast)
    found = fast.reference_logps(PAIRS)
    torch.testing.assert_close(
        torch.stack([found.chosen, found.rejected]), start, rtol=1e-10, atol=1e-12
    )
    with pytest.raises(RuntimeError, match="has moved"):
        plain.reference_logps(PAIRS)


@pytest.mark.parametrize("family", ["smollm3", "qwen2-sliding", "qwen3", "mistral"])
def test_families(family):
    model = build(family)
    freeze(model, LayerSelection(2))
    plain, fast = engines(model)
    for engine in (plain, fast):
        move(engine, 1)
        engine.synced_reference.sync(ALPHA)
        move(engine, 2)
    assert_equal(plain, fast)


@pytest.mark.parametrize("cache", ["off", "memory"])
@pytest.mark.parametrize("stream_tokens", [1, 40, 10_000])
def test_any_cut_and_kept_states(cache, stream_tokens):
    model = build("llama")
    freeze(model, LayerSelection(2))
    plain, fast = engines(model, pairs=SHARING, cache=cache, stream_tokens=stream_tokens)
    for engine in (plain, fast):
        move(engine, 1)
        engine.synced_reference.sync(ALPHA)
        move(engine, 2)
    assert_equal(plain, fast, SHARING)


def test_a_loss_in_two_passes():
    model = build("llama")
    freeze(model, LayerSelection(2))
    plain, fast = engines(model)
    found = []
    for engine in (plain, fast):
        move(engine, 1)
        engine.synced_reference.sync(ALPHA)
        move(engine, 2)
        loss = Objective.of(["aot"], beta=0.3)
        losses = engine.accumulate_gradients(PAIRS, loss).losses
        gradients = [p.grad for _, p in engine.trainable_parameters()]
        found.append([losses, *gradients])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("frozen", [0, 2])
def test_a_reference_that_is_another_model(frozen):
    model, other = build("llama"), build("llama", seed=5)
    freeze(model, LayerSelection(frozen))
    plain, fast = engines(model, other)
    expected = copy.deepcopy(other)
    for number in range(2):
        for engine in (plain, fast):
            move(engine, number)
            engine.synced_reference.sync(ALPHA)
        weights = dict(model.named_parameters()) | dict(fast.trainable_parameters())
        mixed(expected, weights)
        for engine in (plain, fast):
            torch.testing.assert_close(
                reference_logps(engine), by_hand(expected), rtol=1e-10, atol=1e-12
            )
        assert_equal(plain, fast)


@pytest.mark.parametrize("kind", ["plain", "fast"])
def test_a_reference_of_another_shape_is_refused(kind):
    model = build("llama")
    freeze(model, LayerSelection(2))
    other = build("llama", tied=False)
    with pytest.raises(UsageError, match=r"other names or shapes: lm_head.weight"):
        built(model, other, engine=kind)


def test_alpha_1_copies_the_policy():
    model = build("llama")
    freeze(model, LayerSelection(2))
    for engine in engines(model):
        move(engine, 1)
        engine.synced_reference.sync(1.0)
        for _, parameter in engine.trainable_parameters():
            parameter.grad = None
        losses, policy, reference = engine.accumulate_gradients(PAIRS, LOSS)
        assert torch.equal(policy.chosen, reference.chosen)
        assert losses.tolist() == pytest.approx([0.6931471805599453] * len(PAIRS), abs=1e-12)


def test_bfloat16_moves_add_up_in_float32():
    """Moves too small for bfloat16 must not be lost, and alpha 1 must give the policy's own
    bits.
    """
    model = build("llama").float()
    for module in model.modules():
        module.__dict__.pop("forward", None)
    freeze(model, LayerSelection(2))
    fast = built(model, compute_dtype=torch.bfloat16)
    fast.prepare(PAIRS)
    start = {w.name: w.master.clone() for w in fast.synced_reference._weights}
    with torch.no_grad():
        for _, parameter in fast.trainable_parameters():
            parameter.add_(1.0)
    fast.updated()
    for _ in range(8):
        fast.synced_reference.sync(1e-4)
    for weight in fast.synced_reference._weights:
        assert weight.master.dtype == torch.float32 and weight.compute.dtype == torch.bfloat16
        gone = (weight.master - start[weight.name]).mean().item()
        assert gone == pytest.approx(1 - (1 - 1e-4) ** 8, rel=1e-2)
        assert torch.equal(weight.compute, weight.master.bfloat16())
    fast.synced_reference.sync(1.0)
    _, policy, reference = fast.accumulate_gradients(PAIRS, LOSS)
    assert torch.equal(policy.chosen, reference.chosen)


def test_only_what_trains_is_kept_twice():
    model = build("llama").float()
    freeze(model, LayerSelection(3))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    fast = built(model, compute_dtype=torch.bfloat16)
    assert fast.synced_reference.bytes == 4 * trained
    ours = {p.data_ptr() for p in fast.policy.parameters()}
    copied = [p for p in fast.synced_reference.model.parameters() if p.data_ptr() not in ours]
    assert sum(p.numel() for p in copied) == trained
    assert not any(p.requires_grad for p in fast.synced_reference.model.parameters())
    assert fast.synced_reference.capture() == {}, (
        "before the first move a checkpoint needs none of it"
    )


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("compute", [torch.float64, torch.bfloat16])
def test_captured_and_restored(own, compute):
    def fresh():
        model = build("llama") if compute == torch.float64 else build("llama").float()
        freeze(model, LayerSelection(2))
        other = build("llama", seed=5).to(model.dtype) if own else None
        if compute != torch.float64:
            for one in (model, other):
                for module in one.modules() if one is not None else ():
                    module.__dict__.pop("forward", None)
        engine = built(model, other, compute_dtype=compute)
        engine.prepare(PAIRS)
        return engine

    engine, again = fresh(), fresh()
    for number in range(2):
        move(engine, number)
        engine.synced_reference.sync(ALPHA)
        move(again, number)
    again.synced_reference.restore(engine.synced_reference.capture(), 2)
    assert torch.equal(reference_logps(engine), reference_logps(again))
    for one in (engine, again):
        one.synced_reference.sync(ALPHA)
    kept = engine.synced_reference.capture(), again.synced_reference.capture()
    assert kept[0] and all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])


def test_pairs_of_before_serve_until_it_moves(monkeypatch):
    """The reference is not run before the first move; then once a micro-batch."""
    model = build("llama")
    freeze(model, LayerSelection(2))
    _, fast = engines(model, stream_tokens=10_000)
    runs = []
    synced = fast._models[0].synced
    logps = synced.logps
    monkeypatch.setattr(synced, "logps", lambda *args: runs.append(1) or logps(*args))
    fast.accumulate_gradients(PAIRS, LOSS)
    assert runs == []
    fast.synced_reference.sync(ALPHA)
    fast.accumulate_gradients(PAIRS, LOSS)
    assert runs == [1]
    new = TokenizedPair("new", (1,), (2,), (3,))
    with pytest.raises(RuntimeError, match="before training"):
        move(fast, 1)
        fast.accumulate_gradients([new], LOSS)


def test_new_pairs_are_refused_once_a_reference_of_its_own_has_moved(tmp_path):
    """Else the moved reference's log-probabilities would be kept as its start's, on disk too."""
    model, other = build("llama"), build("llama", seed=5)
    freeze(model, LayerSelection(2))
    _, fast = engines(model, other, pairs=PAIRS[:-1])
    move(fast, 1)
    fast.prepare(PAIRS)  # the policy's steps leave such a reference what it was
    fast.synced_reference.sync(ALPHA)
    new = TokenizedPair("new", (1,), (2,), (3,))
    for ask in (fast.prepare, fast.reference_logps):
        with pytest.raises(RuntimeError, match="before training"):
            ask([*PAIRS, new])
    fast.prepare(PAIRS)
    assert fast.reference_logps(PAIRS).chosen.shape == (len(PAIRS),)


@pytest.mark.parametrize("own", [False, True])
def test_the_checkpoint_and_its_count_hold_the_reference(own):
    model = build("llama").float()
    for module in model.modules():
        module.__dict__.pop("forward", None)
    freeze(model, LayerSelection(3))
    other = copy.deepcopy(model) if own else None
    engine = built(model, other, compute_dtype=torch.bfloat16)
    engine.prepare(PAIRS)
    config = build_config({"sync_ref_model": True, "ref_model_sync_steps": 1, "ema_decay": 0.9})
    state = TrainingState(engine, config)
    engine.accumulate_gradients(PAIRS, LOSS)
    state.optimizer.step()
    state.finish_step()
    captured = state.capture()
    assert captured.state["reference_syncs"] == 1
    every = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in state.parameters.values())
    assert engine.synced_reference.bytes == 4 * (every if own else trained)
    captured.tensors.pop("rng")
    assert captured.bytes == checkpoint_bytes(engine, config)
