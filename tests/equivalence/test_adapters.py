"""Adapters: the fast engine against the plain one, which runs peft's own modules, in float64.

The plain engine has one model too: its reference is the policy with the adapters off.
"""

import copy
import dataclasses
import functools
import types

import pytest
import torch
import transformers
from test_fast_engine import (
    FAMILIES,
    LOSS,
    PAIRS,
    SHARING,
    SYSTEM,
    assert_equal,
    build,
    disk_store,
)

from smoldpo.config.layer_spec import LayerSelection
from smoldpo.engine.autotune import KernelChoice
from smoldpo.engine.base import EngineSettings
from smoldpo.engine.batching import saved_for_backward
from smoldpo.engine.cache.trunk_states import MemoryStore, TrunkStore
from smoldpo.engine.compile import set_up_compiling
from smoldpo.engine.fast import FastEngine
from smoldpo.engine.kernels.elementwise import set_compiled
from smoldpo.engine.kernels.layers import own_modules
from smoldpo.engine.kernels.lora import kind_of, row_lengths
from smoldpo.engine.logprobs import score
from smoldpo.engine.plain import PlainEngine
from smoldpo.engine.precision import MasterWeights
from smoldpo.engine.trunk import boundary
from smoldpo.models.adapters import AdapterSettings, adapted_modules, add_adapters
from smoldpo.models.freeze import freeze
from smoldpo.models.weights import weights_sha256
from smoldpo.utils.errors import UsageError

SETTINGS = AdapterSettings(
    lora_r=3,
    lora_alpha=12.0,
    lora_target_modules=(),
    use_dora=False,
    use_rslora=False,
    layers=LayerSelection(0),
    seed=0,
)
KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora-rslora": {"use_dora": True, "use_rslora": True},
}


def adapted(model, **settings):
    full = torch.promote_types(model.dtype, torch.float32)
    layers = LayerSelection(settings.pop("freeze_layers", 0), settings.pop("train_layers", ()))
    add_adapters(model, dataclasses.replace(SETTINGS, layers=layers, **settings), full)
    return model


def engines(
    model,
    reference=None,
    stream_tokens=40,
    pairs=PAIRS,
    trunk_store=None,
    reference_store=None,
    **settings,
):
    """Both engines on copies of one adapted model, moved well away from B = 0."""
    policy = copy.deepcopy(model)
    told = EngineSettings(torch.float64, 2, 2, stream_tokens, **settings)
    plain = PlainEngine(
        policy,
        policy if reference is None else copy.deepcopy(reference),
        told,
    )
    other = copy.deepcopy(model)
    fast = FastEngine(
        other,
        MasterWeights(other, torch.float64),
        reference,
        told,
        trunk_store,
        reference_store,
    )
    fast.prepare(pairs)
    move(plain, fast)
    return plain, fast


@torch.no_grad()
def move(*engines):
    for engine in engines:
        for number, (_, parameter) in enumerate(engine.trainable_parameters()):
            steps = torch.arange(parameter.numel(), dtype=torch.float64) + number
            parameter.add_(0.1 * torch.sin(steps).view_as(parameter))
        engine.updated()


def reference_logps_are_the_bases(plain, base, pairs=PAIRS):
    """The oracle's own reference: the model as it was before it had adapters."""
    found, expected = plain.reference_logps(pairs), score(base, pairs, KernelChoice())
    torch.testing.assert_close(found.chosen, expected.chosen, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "family, kind, freeze_layers",
    [
        *((family, "lora", 0) for family in FAMILIES),
        *((family, "dora", 2) for family in FAMILIES),
        ("llama", "lora", 2),
        ("llama", "dora", 0),
    ],
)
def test_every_family(family, kind, freeze_layers):
    base = build(family)
    model = adapted(copy.deepcopy(base), freeze_layers=freeze_layers, **KINDS[kind])
    assert boundary(model) == freeze_layers
    plain, fast = engines(model)
    assert_equal(plain, fast)
    reference_logps_are_the_bases(plain, base)
    assert {"lora" in name for name, _ in fast.trainable_parameters()} == {True}


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize(
    "targets, train_layers, at, tied",
    [
        (("q_proj",), (), 0, True),
        (("q_proj", "v_proj"), ("last:2",), 2, False),
        (("gate_proj",), ("every:2",), 1, True),
        (("up_proj", "o_proj"), ("0", "3"), 0, False),
        (("down_proj",), ("last:1",), 3, True),
        (("gate_proj", "down_proj"), ("last:1",), 3, False),
        (("up_proj", "down_proj"), ("last:1",), 3, True),
        (("*.mlp.*",), ("2",), 2, False),
        (("model.layers.1.self_attn.q_proj", "*.3.mlp.up_proj"), (), 1, True),
        (("all-linear",), ("last:3",), 1, False),
    ],
)
def test_every_target(targets, train_layers, at, kind, tied):
    model = build("llama", tied)
    adapted(model, lora_target_modules=targets, train_layers=train_layers, **KINDS[kind])
    assert boundary(model) == at
    assert_equal(*engines(model))


@pytest.mark.parametrize(
    "stream_tokens, kind", [(1, "lora"), *((30, kind) for kind in KINDS), (10_000, "dora")]
)
def test_any_cut_into_streams(stream_tokens, kind):
    model = adapted(build("qwen2"), freeze_layers=1, **KINDS[kind])
    assert_equal(*engines(model, stream_tokens=stream_tokens))


@pytest.mark.parametrize(
    "mode, kind, frozen",  # each two of them in every combination
    [
        ("off", "lora", 0),
        ("off", "dora", 2),
        ("memory", "lora", 2),
        ("memory", "dora", 0),
        ("disk", "lora", 0),
        ("disk", "dora", 2),
    ],
)
def test_every_cache_mode(mode, kind, frozen, tmp_path):
    model = adapted(build("llama"), freeze_layers=frozen, **KINDS[kind])
    store = {
        "off": TrunkStore,
        "memory": lambda: MemoryStore(1e9),
        "disk": lambda: disk_store(tmp_path),
    }[mode]()
    plain, fast = engines(model, trunk_store=store)
    assert (fast.batching.key(PAIRS[0]) in store) == (mode != "off" and frozen > 0)
    assert_equal(plain, fast)


@pytest.mark.parametrize(
    "attention, head, kind",  # each two of them in every combination
    [(True, True, "lora"), (True, False, "dora"), (False, True, "dora"), (False, False, "lora")],
)
def test_every_kernel(attention, head, kind):
    model = adapted(build("mistral-sliding"), freeze_layers=1, **KINDS[kind])
    assert_equal(*engines(model, kernels=KernelChoice(attention, head)))


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("stream_tokens", [1, 60, 10_000])
def test_a_beginning_in_common_is_computed_once(kind, stream_tokens):
    model = adapted(build("smollm3"), freeze_layers=2, **KINDS[kind])
    plain, fast = engines(model, stream_tokens=stream_tokens, pairs=SHARING)
    assert fast.batching.prefix == SYSTEM
    assert_equal(plain, fast, SHARING)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_compiled_regions(kind):
    model = adapted(build("llama"), freeze_layers=2, **KINDS[kind])
    choice = set_up_compiling("on", 0.0, torch.float64, "cpu")
    if not choice.compiled:
        pytest.skip(choice.why)
    try:
        assert_equal(*engines(model, stream_tokens=30))
    finally:
        set_compiled(False)


def test_a_reference_of_its_own():
    model = adapted(build("llama"), freeze_layers=2, use_dora=True)
    assert_equal(*engines(model, reference=build("llama", seed=5)))


def test_more_rows_than_a_block():
    """Blocks of 512 rows, the last one filled up."""
    model = adapted(build("qwen2"), freeze_layers=1, use_dora=True)
    many = [dataclasses.replace(pair, prompt_ids=pair.prompt_ids * 12) for pair in PAIRS]
    assert_equal(*engines(model, stream_tokens=10_000, pairs=many), many)


@pytest.mark.parametrize(
    "kind, dtype, frozen",
    [
        *((kind, torch.float32, 2 * (number % 2)) for number, kind in enumerate(KINDS)),
        *((kind, torch.bfloat16, 2 - 2 * (number % 2)) for number, kind in enumerate(KINDS)),
    ],
)
def test_before_the_first_update_it_is_the_base_to_the_last_bit(kind, dtype, frozen):
    """So stored log-probabilities serve runs of any rank, and runs without adapters."""
    model = build("qwen2").float()
    for module in model.modules():
        module.__dict__.pop("forward", None)
    base = copy.deepcopy(model)
    freeze(base, LayerSelection(frozen))
    adapted(model, freeze_layers=frozen, **KINDS[kind])
    sides = []
    for policy in (base, model):
        engine = FastEngine(
            policy, MasterWeights(policy, dtype), settings=EngineSettings(stream_tokens=10_000)
        )
        logps = engine.policy_logps(PAIRS)
        sides.append(torch.cat([logps.chosen, logps.rejected]))
    assert torch.equal(*sides)


def test_lengths_with_b_at_0_are_those_measured_whatever_they_are():
    """torch's vectorised root of a rounded square is not the number again in one case of some
    100,000.
    """
    lengths = torch.linspace(1, 4, 1 << 20)

    def part(*shape):
        return {"default": types.SimpleNamespace(weight=torch.zeros(shape))}

    module = types.SimpleNamespace(
        smoldpo_lengths=lengths,
        scaling={"default": 2.0},
        lora_A=part(1, 1),
        lora_B=part(len(lengths), 1),
        base_layer=types.SimpleNamespace(weight=lengths[:, None]),
    )
    assert torch.equal(row_lengths(module, module.base_layer.weight), lengths)


def half_engine(stream_tokens=10_000, **settings):
    model = build("qwen2").float()
    for module in model.modules():
        module.__dict__.pop("forward", None)
    adapted(model, freeze_layers=2, **settings)
    return model, FastEngine(
        model,
        MasterWeights(model, torch.bfloat16),
        settings=EngineSettings(stream_tokens=stream_tokens),
    )


def test_bfloat16_first_loss_is_ln2_whatever_the_batching():
    _, fast = half_engine(use_dora=True)
    fast.prepare(PAIRS)
    fast.budget = 30
    losses, policy, reference = fast.accumulate_gradients(PAIRS, LOSS)
    assert torch.equal(policy.chosen, reference.chosen)
    assert losses.tolist() == pytest.approx([0.69314718] * len(PAIRS), abs=1e-7)


def test_weights_of_adapters_are_float32_masters_and_the_base_is_kept_once():
    model, fast = half_engine(use_dora=True)
    masters = dict(fast.trainable_parameters())
    assert {p.dtype for p in masters.values()} == {torch.float32}
    kept = {name: p for name, p in model.named_parameters() if name not in masters}
    assert {p.dtype for p in kept.values()} == {torch.bfloat16}
    narrow = {p.dtype for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n}
    assert narrow == {torch.bfloat16}
    # DoRA's magnitudes are few: the model computes with the masters themselves.
    parameters = dict(model.named_parameters())
    magnitudes = [name for name in masters if "magnitude" in name]
    assert magnitudes and all(parameters[name] is masters[name] for name in magnitudes)


def test_gradients_in_bfloat16_are_near_those_in_float64():
    wide = build("qwen2")
    adapted(wide, freeze_layers=2, use_dora=True)
    narrow = copy.deepcopy(wide).float()
    for module in adapted_modules(narrow):
        module.smoldpo_lengths = module.smoldpo_lengths.float()
    for module in narrow.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.__dict__.pop("forward", None)
    exact = FastEngine(
        wide, MasterWeights(wide, torch.float64), settings=EngineSettings(stream_tokens=10_000)
    )
    rough = FastEngine(
        narrow, MasterWeights(narrow, torch.bfloat16), settings=EngineSettings(stream_tokens=10_000)
    )
    for engine in (exact, rough):
        engine.prepare(PAIRS)
        with torch.no_grad():
            for _, parameter in engine.trainable_parameters():
                steps = torch.arange(parameter.numel(), dtype=parameter.dtype)
                parameter.add_(0.1 * torch.sin(steps).view_as(parameter))
        engine.updated()
        engine.accumulate_gradients(PAIRS, LOSS)
    for (name, one), (_, other) in zip(
        exact.trainable_parameters(), rough.trainable_parameters(), strict=True
    ):
        error = (one.grad - other.grad).norm() / one.grad.norm()
        assert error < 0.2, (name, error)


def test_a_start_is_a_pure_function_of_the_seed():
    one, same, other = (adapted(build("llama"), seed=seed) for seed in (3, 3, 4))
    hashes = [weights_sha256(model) for model in (one, same, other)]
    assert hashes[0] == hashes[1] != hashes[2]
    model, state = build("llama"), torch.random.get_rng_state()
    adapted(model)
    assert torch.equal(torch.random.get_rng_state(), state), "nobody else's numbers change"


@pytest.mark.parametrize("targets", [(), ("c_attn",), ("all-linear",)])
def test_layers_by_other_names_are_an_error(targets):
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=97, n_embd=8, n_layer=2, n_head=1)
    )
    with pytest.raises(UsageError, match="a model of type 'gpt2' has none; leave use_peft out"):
        adapted(gpt2, lora_target_modules=targets)


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"lora_target_modules": ("lm_head",)}, "is the LM head or the embeddings"),
        ({"lora_target_modules": ("embed_tokens",)}, "is the LM head or the embeddings"),
        ({"lora_target_modules": ("q_prj",)}, "did you mean q_proj"),
        ({"lora_target_modules": ("*.layers.0.*",), "freeze_layers": 2}, "layers that may train"),
        ({"freeze_layers": 4}, "no layer is left"),
        ({"freeze_layers": 5}, "the model has 4 layers"),
        ({"train_layers": ("7",)}, "more than the model's 4 layers"),
    ],
)
def test_what_cannot_be_is_an_error(settings, says):
    with pytest.raises(UsageError, match=says):
        adapted(build("llama", tied=False), **settings)


@pytest.mark.parametrize("targets", [("down_proj",), ("gate_proj", "up_proj", "down_proj")])
def test_an_mlps_product_is_formed_anew_and_not_kept(targets):
    model = adapted(build("llama"), lora_target_modules=targets)
    layer = model.model.layers[1]
    own = own_modules(layer.mlp, kind=functools.partial(kind_of, dtype=torch.float64))
    rows, width = 8, model.config.hidden_size
    states = torch.randn(1, rows, width, dtype=torch.float64, requires_grad=True)
    kept = saved_for_backward(lambda: own(states), model.parameters())
    rank, inside = SETTINGS.lora_r, model.config.intermediate_size
    read = width if "up_proj" in targets else 0  # by adapters of gate and up
    assert kept == 8 * rows * (2 * inside + read + rank * len(targets))
