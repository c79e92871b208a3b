"""The real SmolLM2-135M on real pairs: what bfloat16 costs, and that the store changes no bit.

A CPU without bfloat16 computes in it some ten times slower: but for the first test all run in the
dtype that this machine's own runs take, and the pairs are short.
"""

import pytest
import torch

from smoldpo.config.layer_spec import LayerSelection
from smoldpo.data.load import load_pairs
from smoldpo.data.tokenize import PairTokenizer
from smoldpo.engine.autotune import KernelChoice, compute_dtype
from smoldpo.engine.batching import STREAM_MULTIPLE
from smoldpo.engine.cache.trunk_states import MemoryStore, TrunkStore
from smoldpo.engine.fast import FastEngine
from smoldpo.engine.kernels.native.library import supported
from smoldpo.engine.logprobs import LogprobModel
from smoldpo.engine.packing import pack
from smoldpo.engine.plain import pad_batch, token_logps
from smoldpo.engine.precision import MasterWeights, cast
from smoldpo.losses import Objective
from smoldpo.models.freeze import freeze
from smoldpo.models.load import load_model, load_tokenizer
from smoldpo.utils.threads import torch_threads

pytestmark = [pytest.mark.real, pytest.mark.usefixtures("small_blocks")]
LOSS = Objective.of(beta=0.1)


@pytest.fixture(scope="module")
def pairs(real, shared):
    tokenizer = PairTokenizer(load_tokenizer(real), 40)
    return tokenizer.tokenize_all(load_pairs(str(shared / "hh_helpful_dev.jsonl")).pairs[:4])


def plain_logps(model, pairs):
    """Of every completion token, pair by pair, chosen before rejected."""
    found = []
    for pair in pairs:
        batch = pad_batch([pair])
        logps = token_logps(model, batch)[0]
        found += [row[scored] for row, scored in zip(logps, batch.scored[:, 1:], strict=True)]
    return torch.cat(found)


def fast_engine(source, frozen, dtype, trunk_store):
    model = load_model(source, torch.float32)
    freeze(model, LayerSelection(frozen))
    return FastEngine(model, MasterWeights(model, dtype), trunk_store=trunk_store)


@torch.no_grad()
def test_bfloat16_is_as_near_to_float64_as_the_plain_engines(real, pairs, monkeypatch):
    """Token by token: the errors of a few pairs' sums are few numbers, and luck decides between
    them.
    """
    pairs = pairs[:2]
    exact = plain_logps(load_model(real, torch.float64), pairs)
    model = load_model(real, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        plain = plain_logps(model, pairs)
    cast(model.requires_grad_(False), torch.bfloat16)
    batch, found = pack(pairs, model.device, STREAM_MULTIPLE), [plain]
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)  # where they are compiled once
    for kernels in (KernelChoice(), *(KernelChoice(native=name) for name in supported()[:1])):
        scorer = LogprobModel(model, 25, kernels)
        found.append(scorer.token_logps(batch, scorer.trunk_states(batch)))
    errors = [(each - exact).square().mean().sqrt().item() for each in found]
    print("root mean square error in nats: plain, fast, native", errors)
    assert 0 < max(errors[1:]) < errors[0]


def test_a_stored_trunk_changes_no_bit_and_the_first_loss_is_ln2(real, pairs):
    dtype, _ = compute_dtype("auto", "cpu")
    gradients = []
    for store in (MemoryStore(1e9), TrunkStore()):
        engine = fast_engine(real, 27, dtype, trunk_store=store)
        engine.prepare(pairs)
        engine.budget = 130  # other streams than those that the reference was computed in
        losses, policy, reference = engine.accumulate_gradients(pairs[1:], LOSS)
        assert torch.equal(policy.chosen, reference.chosen)
        assert torch.equal(policy.rejected, reference.rejected)
        assert losses.tolist() == pytest.approx([0.69314718] * 3, abs=1e-7)
        gradients.append([parameter.grad for _, parameter in engine.trainable_parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_threads_gives_the_same_bits(real, pairs, dtype):
    found = []
    for threads in (1, 2, 4):
        with torch_threads(threads):
            engine = fast_engine(real, 28, dtype, trunk_store=TrunkStore())
        engine.budget = 130  # a pair a stream, or two
        losses, policy, reference = engine.accumulate_gradients(pairs, LOSS)
        gradients = [parameter.grad for _, parameter in engine.trainable_parameters()]
        found.append([losses, policy.chosen, policy.rejected, reference.chosen, *gradients])
    for other in found[1:]:
        assert all(torch.equal(*both) for both in zip(found[0], other, strict=True))
