"""Master weights beside a model that computes in bfloat16: what they gather, and where gradients
are.
"""

import weakref

import pytest
import torch
from test_fast_engine import LOSS, PAIRS, build

from smoldpo.config.layer_spec import LayerSelection
from smoldpo.engine.base import EngineSettings
from smoldpo.engine.fast import FastEngine
from smoldpo.engine.precision import MasterWeights
from smoldpo.models.freeze import freeze


def test_bfloat16_first_loss_is_ln2_whatever_the_batching():
    """The reference comes from other batches than the policy, and must be equal to the last bit."""
    model = build("llama").float()
    for module in model.modules():
        module.__dict__.pop("forward", None)
    freeze(model, LayerSelection(2))
    fast = FastEngine(
        model, MasterWeights(model, torch.bfloat16), settings=EngineSettings(stream_tokens=10_000)
    )
    fast.prepare(PAIRS)
    fast.budget = 30
    losses, policy, reference = fast.accumulate_gradients(PAIRS, LOSS)
    assert torch.equal(policy.chosen, reference.chosen)
    assert losses.tolist() == pytest.approx([0.69314718] * len(PAIRS), abs=1e-7)


def bfloat16_engine(stream_tokens):
    model = build("llama").float()
    for module in model.modules():
        module.__dict__.pop("forward", None)
    freeze(model, LayerSelection(2))
    return FastEngine(
        model,
        MasterWeights(model, torch.bfloat16),
        settings=EngineSettings(stream_tokens=stream_tokens),
    )


def test_gradients_of_several_streams_add_up_in_the_masters():
    whole, cut = bfloat16_engine(10_000), bfloat16_engine(30)
    for engine in (whole, cut):
        engine.accumulate_gradients(PAIRS, LOSS)
    for (name, one), (_, other) in zip(
        whole.trainable_parameters(), cut.trainable_parameters(), strict=True
    ):
        assert one.grad.dtype == other.grad.dtype == torch.float32
        error = (one.grad - other.grad).norm() / one.grad.norm()
        assert error < 0.05, (name, error)


def test_states_between_layers_are_float32_where_products_are_bfloat16():
    engine, seen = bfloat16_engine(10_000), []
    for layer in engine.policy.model.layers:
        layer.register_forward_pre_hook(lambda _, states: seen.append(states[0].dtype))
    engine.prepare(PAIRS)
    engine.accumulate_gradients(PAIRS, LOSS)
    assert len(seen) == 4 + 2  # all layers once, the two that train once more
    assert set(seen) == {torch.float32}


def test_an_update_of_the_masters_reaches_the_policy():
    engine = bfloat16_engine(10_000)
    before = engine.policy_logps(PAIRS).chosen
    with torch.no_grad():
        for _, parameter in engine.trainable_parameters():
            parameter.mul_(1.5)
    assert torch.equal(engine.policy_logps(PAIRS).chosen, before)
    engine.updated()
    assert not torch.equal(engine.policy_logps(PAIRS).chosen, before)


def test_master_weights_gather_small_steps():
    """Steps too small for bfloat16 must add up in float32."""
    model = build("llama").float()
    freeze(model, LayerSelection(3))
    masters = MasterWeights(model, torch.bfloat16)
    name, wide = masters.named()[0]
    narrow = dict(model.named_parameters())[name]
    start = narrow.detach().clone()
    for _ in range(64):
        with torch.no_grad():
            wide.mul_(1.0005)
        masters.copy_to_model()
    assert narrow.dtype == torch.bfloat16 and wide.dtype == torch.float32
    moved = (narrow.float() / start.float()).nanmedian().item()
    assert moved == pytest.approx(1.0005**64, rel=5e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients_stay_in_one_place_until_they_are_dropped(dtype):
    """Made anew in each step they would lie among what a backward pass keeps, and leave holes."""
    model = build("llama").to(torch.promote_types(dtype, torch.float32))
    freeze(model, LayerSelection(2))
    fast = FastEngine(model, MasterWeights(model, dtype), settings=EngineSettings(stream_tokens=30))
    optimizer = torch.optim.SGD([p for _, p in fast.trainable_parameters()], lr=0.0)

    def one_step():
        fast.accumulate_gradients(PAIRS, LOSS)
        return {name: parameter.grad for name, parameter in fast.trainable_parameters()}

    first = one_step()
    values = {name: gradient.clone() for name, gradient in first.items()}
    added = one_step()  # nobody has set them to zero
    for name, gradient in added.items():
        assert gradient is first[name]
        torch.testing.assert_close(gradient, 2 * values[name])
    optimizer.zero_grad(set_to_none=True)
    again = one_step()
    for name, gradient in again.items():
        assert gradient is first[name]
        torch.testing.assert_close(gradient, values[name])
    if dtype == torch.bfloat16:  # the model's own were moved to the masters
        assert all(parameter.grad is None for parameter in model.parameters())
    gone = [weakref.ref(gradient) for gradient in first.values()]
    del first, added, again, gradient
    fast.drop_gradients()
    assert all(reference() is None for reference in gone)
