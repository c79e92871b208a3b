"""The fast engine against the plain one in float64: log-probabilities, loss, and every gradient.

transformers' norms compute in float32 whatever the model's dtype, which would hide algebra behind
rounding; here they are made to compute in float64, in both engines alike.
"""

import copy
import functools
import types

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smoldpo.config.layer_spec import LayerSelection
from smoldpo.engine.autotune import KernelChoice
from smoldpo.engine.base import EngineSettings
from smoldpo.engine.build import choose_engine
from smoldpo.engine.cache.trunk_states import DiskStore, MemoryStore, TrunkStore
from smoldpo.engine.compile import set_up_compiling
from smoldpo.engine.fast import FastEngine
from smoldpo.engine.kernels.attention import pair_attention
from smoldpo.engine.kernels.elementwise import set_compiled
from smoldpo.engine.kernels.flex_attention import stream_attention
from smoldpo.engine.logprobs import score
from smoldpo.engine.packing import common_prefix, has_prefix, pack
from smoldpo.engine.plain import PlainEngine
from smoldpo.engine.precision import MasterWeights
from smoldpo.engine.trunk import boundary
from smoldpo.losses import Objective
from smoldpo.models.freeze import freeze
from smoldpo.types import TokenizedPair
from smoldpo.utils.errors import UsageError

VOCABULARY = 97
LOSS = Objective.of(beta=0.3)
PAIRS = [
    TokenizedPair("plain", (5, 6, 7), (8, 9, 2), (10, 2)),
    TokenizedPair("short", (5,), (2,), (11,)),
    TokenizedPair("ends", (20, 21, 22, 23, 2, 2), (2, 2), (2,)),
    TokenizedPair("prefix", (30, 31), (32, 33), (32, 33, 34, 35)),
    TokenizedPair("long", tuple(range(40, 60)), (61, 62, 63, 64, 2), tuple(range(70, 85))),
]
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": (transformers.LlamaConfig, {}),
    # Every other layer is without rotary embedding, as SmolLM3 has every fourth.
    "smollm3": (transformers.SmolLM3Config, {"no_rope_layer_interval": 2}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen2-sliding": (
        transformers.Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    ),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 8}),
    "mistral": (transformers.MistralConfig, {"sliding_window": None}),
    "mistral-sliding": (transformers.MistralConfig, {"sliding_window": 5}),
}


def build(family, tied=True, seed=0):
    model = copy.deepcopy(_built(family, tied, seed))
    torch.manual_seed(seed)
    return model


@functools.cache
def _built(family, tied, seed):
    config_class, extra = FAMILIES[family]
    torch.manual_seed(seed)
    config = config_class(**SHAPE | extra, tie_word_embeddings=tied)
    model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(exact_norm, module)
            # Away from all ones, so that a forgotten norm shows.
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
        if isinstance(module, torch.nn.Linear) and module.bias is not None:
            torch.nn.init.uniform_(module.bias, -0.5, 0.5)  # away from all zeros, likewise
    return model


def exact_norm(self, states):
    scale = torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    return self.weight * states * scale


def engines(
    model,
    reference=None,
    stream_tokens=40,
    pairs=PAIRS,
    trunk_store=None,
    reference_store=None,
    **settings,
):
    """Both engines on copies of one model, moved a little so that policy and reference differ."""
    told = EngineSettings(torch.float64, 2, 2, stream_tokens, **settings)
    plain = PlainEngine(
        copy.deepcopy(model),
        copy.deepcopy(model if reference is None else reference),
        told,
    )
    policy = copy.deepcopy(model)
    masters = MasterWeights(policy, torch.float64)
    fast = FastEngine(
        policy,
        masters,
        reference,
        told,
        trunk_store,
        reference_store,
    )
    fast.prepare(pairs)
    with torch.no_grad():
        for engine in (plain, fast):
            for _, parameter in engine.trainable_parameters():
                wave = torch.sin(torch.arange(parameter.numel(), dtype=torch.float64))
                parameter.add_(0.05 * wave.view_as(parameter))
            engine.updated()
    return plain, fast


def assert_equal(plain, fast, pairs=PAIRS):
    results = []
    for engine in (plain, fast):
        for _, parameter in engine.trainable_parameters():
            parameter.grad = None
        losses, policy, reference = engine.accumulate_gradients(pairs, LOSS)
        gradients = {name: p.grad for name, p in engine.trainable_parameters()}
        results.append((losses, policy, reference, gradients))
    (losses, policy, reference, gradients), found = results
    close = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)
    close(found[0], losses)
    for ours, theirs in ((found[1], policy), (found[2], reference)):
        close(ours.chosen, theirs.chosen)
        close(ours.rejected, theirs.rejected)
    assert found[3].keys() == gradients.keys() and gradients
    for name, gradient in gradients.items():
        # Where both answers are equal the gradient is nothing but rounding: there, absolute.
        error = (found[3][name] - gradient).norm() / gradient.norm().clamp(min=1e-3)
        assert error < 1e-10, (name, error)


@pytest.mark.parametrize("frozen", [0, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, frozen):
    model = build(family)
    freeze(model, LayerSelection(frozen))
    assert_equal(*engines(model))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "frozen, names",
    [
        (0, []),
        (0, ["embeddings"]),
        (0, ["norms"]),
        (2, []),
        (2, ["norms"]),
        (3, ["*.mlp.*"]),
        (4, []),
        (0, ["*.layers.0.*", "*.layers.2.*"]),
        (0, ["embeddings", "*.layers.0.*", "*.layers.1.*"]),
    ],
)
def test_every_way_to_freeze(tied, frozen, names):
    model = build("llama", tied)
    freeze(model, LayerSelection(frozen, freeze=names))
    assert_equal(*engines(model))


@pytest.mark.parametrize(
    "choice, at",
    [
        ({"train_layers": ["last:1"]}, 3),
        ({"train_layers": ["every:2"]}, 1),
        ({"train_layers": ["0", "2"]}, 0),
        ({"train": ["norms"]}, 0),
        ({"train": ["*.mlp.*"], "train_layers": ["1", "3"]}, 1),
        ({"train": ["model.norm.weight"]}, 4),
        ({"train": ["embeddings"]}, 0),
        ({"train": ["biases"], "train_layers": ["last:2"]}, 2),
    ],
)
def test_every_choice_of_what_trains(choice, at):
    """The trunk ends below the lowest layer in which anything trains, and no sooner."""
    model = build("qwen2")
    freeze(model, LayerSelection(**choice))
    assert boundary(model) == at
    assert_equal(*engines(model))


@pytest.mark.parametrize("stream_tokens", [1, 12, 30, 10_000])
def test_any_cut_into_streams(stream_tokens):
    model = build("llama")
    freeze(model, LayerSelection(2))
    assert_equal(*engines(model, stream_tokens=stream_tokens))


def test_a_reference_of_its_own():
    model = build("llama")
    freeze(model, LayerSelection(2))
    assert_equal(*engines(model, reference=build("llama", seed=5)))


def disk_store(folder, warn=print, room=1e9):
    return DiskStore(folder / "trunk" / "key", 32, torch.float64, room, {"model": "tiny"}, warn)


@pytest.mark.parametrize("mode, frozen", [("off", 2), ("memory", 4), ("disk", 2), ("disk", 4)])
def test_every_cache_mode(mode, frozen, tmp_path):
    model = build("llama")
    freeze(model, LayerSelection(frozen))
    store = {
        "off": TrunkStore,
        "memory": lambda: MemoryStore(1e9),
        "disk": lambda: disk_store(tmp_path),
    }[mode]()
    plain, fast = engines(model, trunk_store=store)
    assert (fast.batching.key(PAIRS[0]) in store) == (mode != "off")
    assert_equal(plain, fast)


@pytest.mark.parametrize(
    "attention, head, family, frozen",  # each two of them in every combination
    [
        (True, True, "llama", 0),
        (True, False, "mistral-sliding", 2),
        (False, True, "mistral-sliding", 0),
        (False, False, "llama", 2),
        (True, True, "mistral-sliding", 2),
        (False, False, "mistral-sliding", 0),
    ],
)
def test_every_kernel(attention, head, family, frozen):
    model = build(family)
    freeze(model, LayerSelection(frozen))
    assert_equal(*engines(model, kernels=KernelChoice(attention, head)))


@pytest.mark.parametrize("pairs", ["PAIRS", "SHARING"])
@pytest.mark.parametrize("window", [None, 4])
def test_flex_attention_sees_what_the_slots_see(pairs, window):
    """FlexAttention has no backward on a CPU; its forward holds the rule that CUDA uses."""
    some = globals()[pairs]
    batch = pack(some, multiple_of=128, prefix=common_prefix(some))
    tokens = batch.input_ids.shape[1]
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, h, tokens, 16).double() for h in (4, 2, 2))
    expected = pair_attention(query, key, value, 0.3, batch.layout, window, False, True)
    found = stream_attention(query, key, value, 0.3, batch.layout.stream, window)
    real = batch.layout.row_of_token
    assert len(real) < tokens
    torch.testing.assert_close(
        found[0, : len(real)], expected[0, : len(real)], rtol=1e-10, atol=1e-12
    )
    assert found.isfinite().all()


@pytest.mark.parametrize("frozen", [0, 2])
def test_compiled_regions(frozen):
    """Compiled, the engine still equals the plain one; shapes are dynamic, so nothing is compiled
    twice.
    """
    model = build("llama")
    freeze(model, LayerSelection(frozen))
    choice = set_up_compiling("on", 0.0, torch.float64, "cpu")
    if not choice.compiled:
        pytest.skip(choice.why)
    try:
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert_equal(*engines(model, stream_tokens=60, pairs=SHARING), SHARING)
            plain, fast = engines(model, stream_tokens=30)
            assert_equal(plain, fast)
            fast.policy_logps(PAIRS[1:2])
            score(plain.policy.requires_grad_(False), PAIRS, KernelChoice())  # as answers are
    finally:
        set_compiled(False)


def test_compiling_is_for_long_runs_and_needs_a_compiler(monkeypatch):
    short = set_up_compiling("auto", 1e9, torch.float32, "cpu")
    assert not short.compiled and "compiling takes" in short.why
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert "no C++ compiler" in set_up_compiling("on", 0.0, torch.float32, "cpu").why
    assert "no C++ compiler" in set_up_compiling("auto", 1e20, torch.float32, "cpu").why


def test_without_room_to_keep_states():
    model = build("llama")
    freeze(model, LayerSelection(2))
    plain, fast = engines(model, trunk_store=MemoryStore(room=0))
    assert_equal(plain, fast)
    assert fast.batching.key(PAIRS[0]) not in fast._states


def test_scoring_and_evaluation_agree():
    model = build("smollm3")
    freeze(model, LayerSelection(3))
    plain, fast = engines(model)
    expected = plain.policy_logps(PAIRS)
    for found in (fast.policy_logps(PAIRS), score(plain.policy, PAIRS, KernelChoice())):
        torch.testing.assert_close(found.chosen, expected.chosen, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found.rejected, expected.rejected, rtol=1e-10, atol=1e-12)


SYSTEM = tuple(range(50, 61))
SHARING = [
    TokenizedPair("goes on", (*SYSTEM, 5, 6, 7), (8, 9, 2), (10, 2)),
    TokenizedPair("long", (*SYSTEM, *range(10, 50)), (61, 62, 63, 64, 2), tuple(range(70, 85))),
    TokenizedPair("one more", (*SYSTEM, 5), (2,), (11,)),
    TokenizedPair("is it", SYSTEM, (8, 2), (9, 9, 2)),
    TokenizedPair("differs", (*SYSTEM[:5], 1, 2, 3), (8, 2), (9, 2)),
    TokenizedPair("goes on too", (*SYSTEM, 20, 21), (2, 2), (2,)),
]


def test_what_most_prompts_begin_with():
    assert common_prefix(SHARING) == SYSTEM
    assert [has_prefix(pair, SYSTEM) for pair in SHARING] == [True, True, True, False, False, True]
    assert common_prefix(PAIRS) == ()
    assert common_prefix(SHARING[:1]) == ()
    assert common_prefix([]) == ()


@pytest.mark.parametrize(
    "family, frozen, stream_tokens",
    [
        *((family, 2, 60) for family in FAMILIES),
        *((family, 0, 10_000) for family in FAMILIES),
        *((family, frozen, n) for family in ("llama", "mistral-sliding")
          for frozen, n in ((4, 10_000), (2, 1))),
    ],
)  # fmt: skip
def test_a_beginning_in_common_is_computed_once(family, frozen, stream_tokens):
    model = build(family)
    freeze(model, LayerSelection(frozen))
    plain, fast = engines(model, stream_tokens=stream_tokens, pairs=SHARING)
    assert fast.batching.prefix == SYSTEM
    assert fast._pack(SHARING).input_ids[0, : len(SYSTEM)].tolist() == list(SYSTEM)
    assert_equal(plain, fast, SHARING)
    expected, found = plain.policy_logps(SHARING), fast.policy_logps(SHARING)
    torch.testing.assert_close(found.chosen, expected.chosen, rtol=1e-10, atol=1e-12)


tokens = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=9).map(tuple)
pairs_of_any_shape = st.lists(
    st.builds(TokenizedPair, st.just("x"), tokens, tokens, tokens), min_size=1, max_size=5
)


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(pairs_of_any_shape, st.sampled_from([0, 3]), st.integers(1, 60))
def test_pairs_of_any_shape(pairs, frozen, stream_tokens):
    model = build("llama")
    freeze(model, LayerSelection(frozen))
    plain, fast = engines(model, stream_tokens=stream_tokens)
    # Pairs that come up only now: the reference must still be the policy's start.
    fresh = FastEngine(
        fast.policy, fast._masters, plain.reference, EngineSettings(stream_tokens=stream_tokens)
    )
    assert_equal(plain, fresh, pairs)


def test_the_reference_must_be_taken_before_training():
    model = build("llama")
    _, fast = engines(model)
    with pytest.raises(RuntimeError, match="before training"):
        fast.reference_logps([TokenizedPair("new", (1,), (2,), (3,))])


def test_a_family_that_is_not_proven_gets_the_plain_engine_with_a_reason():
    config = transformers.GemmaConfig(**SHAPE, head_dim=8)
    gemma = transformers.AutoModelForCausalLM.from_config(config)
    choice = choose_engine("auto", gemma)
    assert choice.name == "plain" and "gemma" in choice.reason
    with pytest.raises(UsageError, match="--engine plain"):
        choose_engine("fast", gemma)
    assert choose_engine("auto", build("llama")).name == "fast"
