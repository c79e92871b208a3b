"""The real SmolLM2-135M on real pairs: what bfloat16 costs, and that the store changes no bit.

A CPU without bfloat16 computes in it some ten times slower: but for the first test all run in the dtype that
this machine's own runs take.
"""

import pytest
import torch

from smoldpo.data.load import load_pairs
from smoldpo.data.tokenize import PairTokenizer
from smoldpo.engine.fast import FastEngine
from smoldpo.engine.plain import PlainEngine
from smoldpo.engine.precision import MasterWeights, compute_dtype
from smoldpo.engine.trunk_store import MemoryStore, NoStore
from smoldpo.losses import Objective
from smoldpo.models.freeze import freeze
from smoldpo.models.load import load_model, load_tokenizer

pytestmark = pytest.mark.real
LOSS = Objective.of(beta=0.1)


@pytest.fixture(scope="module")
def pairs(real, shared):
    tokenizer = PairTokenizer(load_tokenizer(real), 200)
    return tokenizer.tokenize_all(load_pairs(str(shared / "hh_helpful_dev.jsonl")).pairs[:8])


def plain_logps(source, pairs, weights, compute):
    engine = PlainEngine(
        load_model(source, weights),
        None,
        compute_dtype=compute,
        train_batch_size=4,
        eval_batch_size=4,
    )
    return sides(engine.policy_logps(pairs))


def sides(logps):
    return torch.cat([logps.chosen, logps.rejected])


def fast_engine(source, frozen, dtype, **settings):
    model = load_model(source, torch.float32)
    freeze(model, frozen)
    return FastEngine(model, MasterWeights(model, dtype), **settings)


def test_bfloat16_is_as_near_to_float64_as_the_plain_engines(real, pairs):
    exact = plain_logps(real, pairs, torch.float64, torch.float64)
    plain = plain_logps(real, pairs, torch.float32, torch.bfloat16)
    fast = sides(fast_engine(real, 25, torch.bfloat16).policy_logps(pairs))
    errors = [(found - exact).square().mean().sqrt().item() for found in (plain, fast)]
    print(f"root mean square error in nats: plain {errors[0]:.3f}, fast {errors[1]:.3f}")
    assert 0 < errors[1] < 1.25 * errors[0]


@pytest.mark.parametrize("max_tokens", [4096, 700])
def test_a_stored_trunk_changes_no_bit_and_the_first_loss_is_ln2(real, pairs, max_tokens):
    dtype, _ = compute_dtype("auto", "cpu")
    gradients = []
    for store in (MemoryStore(1e9), NoStore()):
        engine = fast_engine(real, 27, dtype, trunk_store=store)
        engine.prepare(pairs)
        engine.max_tokens = (
            max_tokens  # other streams than those that the reference was computed in
        )
        losses, policy, reference = engine.accumulate_gradients(pairs[1:6], LOSS)
        assert torch.equal(policy.chosen, reference.chosen)
        assert torch.equal(policy.rejected, reference.rejected)
        assert losses.tolist() == pytest.approx([0.69314718] * 5, abs=1e-7)
        gradients.append([parameter.grad for _, parameter in engine.trainable_parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
