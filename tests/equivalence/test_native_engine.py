"""The fast engine with native kernels against itself with torch's, by both one's error in float32.

Where the kernels do not know what a layer does (a sliding window, an adapter, a width), torch's
functions take its part; each family is here for that.
"""

import copy
from dataclasses import replace

import pytest
import torch
import transformers

from smoldpo.config.layer_spec import LayerSelection
from smoldpo.engine.autotune import KernelChoice
from smoldpo.engine.base import EngineSettings
from smoldpo.engine.fast import FastEngine
from smoldpo.engine.kernels.native.library import load, supported
from smoldpo.engine.packing import pack
from smoldpo.engine.precision import MasterWeights
from smoldpo.losses import Objective
from smoldpo.models.freeze import freeze
from smoldpo.types import TokenizedPair
from smoldpo.utils.threads import torch_threads

pytestmark = pytest.mark.skipif(not supported(), reason="no AVX-512 with bfloat16 here")
LOSS = Objective.of(beta=0.1)
SHAPE = {
    "vocab_size": 200, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 4,
    "num_attention_heads": 3, "num_key_value_heads": 3, "max_position_embeddings": 512,
    "head_dim": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "llama": (transformers.LlamaConfig, {}),
    "llama, groups": (transformers.LlamaConfig, {"num_key_value_heads": 1}),
    "llama, odd widths": (transformers.LlamaConfig, {"intermediate_size": 100, "head_dim": 24}),
    "smollm3": (transformers.SmolLM3Config, {"no_rope_layer_interval": 2}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen3": (transformers.Qwen3Config, {}),
    "mistral-sliding": (transformers.MistralConfig, {"sliding_window": 20}),
}
SYSTEM = tuple(range(150, 175))


def pair(prompt, chosen, rejected, seed):
    draw = torch.Generator().manual_seed(seed)
    parts = (torch.randint(3, 150, (n,), generator=draw) for n in (prompt, chosen, rejected))
    prompt_ids, *answers = [tuple(part.tolist()) for part in parts]
    return TokenizedPair(str(seed), SYSTEM + prompt_ids, *answers)


PAIRS = [pair(30, 12, 20, 0), pair(3, 1, 40, 1), pair(70, 33, 2, 2), pair(1, 8, 8, 3)]


@pytest.fixture(scope="module", autouse=True)
def native():
    """Compiled once on a machine, in the cache folder of its user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("XDG_CACHE_HOME", raising=False)
        return KernelChoice(native=load(supported()[0]).instructions)


def build(family):
    kind, extra = FAMILIES[family]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(kind(**SHAPE | extra)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.08)
    return model.bfloat16().float()  # so that nothing is rounded on the way in


def engine_of(model, kernels, dtype=torch.bfloat16, **more):
    model = copy.deepcopy(model)
    settings = EngineSettings(dtype, stream_tokens=150, kernels=kernels)
    masters = MasterWeights(model, dtype)
    return FastEngine(model, masters, None, replace(settings, **more))


def results(model, kernels, dtype=torch.bfloat16, **more):
    engine = engine_of(model, kernels, dtype, **more)
    engine.prepare(PAIRS)
    losses, policy, reference = engine.accumulate_gradients(PAIRS, LOSS)
    logps = torch.cat([policy.chosen, policy.rejected, reference.chosen, reference.rejected])
    return losses, logps, {n: p.grad.clone() for n, p in engine.trainable_parameters()}


@torch.no_grad()
def token_logps(model, kernels, dtype=torch.bfloat16):
    """Token by token: sums of a few pairs are few numbers, and luck decides between them."""
    policy = engine_of(model, kernels, dtype)._models[0].policy
    return {0: policy.token_logps(pack(PAIRS, multiple_of=128, prefix=SYSTEM), None)}


def norm_of_error(found, exact):
    return sum(float((found[name] - exact[name]).square().sum()) for name in exact) ** 0.5


@pytest.mark.parametrize("frozen, names", [(0, []), (2, []), (3, ["norms"]), (0, ["embeddings"])])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, frozen, names, native):
    if names and family not in ("llama", "qwen2"):
        pytest.skip("how it freezes has no say in the others")
    model = build(family)
    freeze(model, LayerSelection(frozen, freeze=names))
    exact = results(model, KernelChoice(), torch.float32)
    ours, torchs = results(model, native), results(model, KernelChoice())
    assert ours[0].tolist() == pytest.approx([0.69314718] * 4, abs=1e-7)
    tokens = [token_logps(model, native), token_logps(model, KernelChoice())]
    true = token_logps(model, KernelChoice(), torch.float32)
    assert norm_of_error(tokens[0], true) < 1.15 * norm_of_error(tokens[1], true)
    assert norm_of_error(ours[2], exact[2]) < 1.1 * norm_of_error(torchs[2], exact[2])
    assert ours[2].keys() == exact[2].keys() and not torch.equal(ours[1], torchs[1])


def test_a_pairs_bits_depend_on_it_alone(native):
    model = build("llama, groups")
    freeze(model, LayerSelection(1))
    found = []
    for tokens, threads, pairs in ((150, 1, PAIRS), (1000, 2, PAIRS), (60, 4, PAIRS[::-1])):
        with torch_threads(threads):
            engine = engine_of(model, native, stream_tokens=tokens)
        engine.prepare(PAIRS)
        engine.updated()
        logps = engine.policy_logps(pairs)
        order = slice(None) if pairs is PAIRS else [3, 2, 1, 0]
        found.append(torch.stack([logps.chosen[order], logps.rejected[order]]))
        assert torch.equal(found[-1][0], engine.reference_logps(PAIRS).chosen)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_any_number_of_threads_gives_the_same_gradients(native):
    model, found = build("llama"), []
    freeze(model, LayerSelection(1))
    for threads in (1, 3):
        with torch_threads(threads):
            found.append(results(model, native, stream_tokens=60))
    (losses, logps, gradients), other = found
    matrix = gradients["model.layers.2.mlp.down_proj.weight"]
    assert not torch.equal(matrix, matrix.bfloat16().float()), "added up in float32, never rounded"
    assert torch.equal(losses, other[0]) and torch.equal(logps, other[1])
    assert all(torch.equal(each, other[2][name]) for name, each in gradients.items())
