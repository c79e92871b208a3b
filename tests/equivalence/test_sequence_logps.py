"""sequence_logps against the textbook on the same model, in float64; the model stays what it
was.
"""

import copy

import pytest
import torch
import transformers
from test_fast_engine import FAMILIES, PAIRS, SHAPE, exact_norm

import smoldpo
from smoldpo.config.layer_spec import LayerSelection
from smoldpo.engine import plain
from smoldpo.engine.kernels import layers
from smoldpo.models.freeze import freeze


@pytest.fixture(autouse=True)
def exact_norms(monkeypatch):
    """Norms in float64 for every family, by their classes: the models have nothing of their own."""
    for family in ("llama", "smollm3", "qwen2", "qwen3", "mistral"):
        module = getattr(transformers.models, family)
        modeling = getattr(module, f"modeling_{family}")
        for name, found in vars(modeling).items():
            if name.endswith("RMSNorm") and isinstance(found, type):
                monkeypatch.setattr(found, "forward", exact_norm)


def build(family, tied=True):
    config_class, extra = FAMILIES[family]
    torch.manual_seed(0)
    config = config_class(**SHAPE | extra, tie_word_embeddings=tied)
    model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def textbook(model, pairs=PAIRS):
    return plain.sequence_logps(model, plain.pad_batch(pairs)).chunk(2)


def gradients(model, chosen, rejected):
    """Of a sum in which every pair and side has a weight of its own."""
    weights = torch.arange(1, len(chosen) + 1, dtype=chosen.dtype)
    model.zero_grad(set_to_none=True)
    (weights * chosen - 2 * weights.flip(0) * rejected).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(model, pairs=PAIRS, run=None, **options):
    chosen, rejected = textbook(run or model, pairs)
    expected = gradients(model, chosen, rejected)
    found = smoldpo.sequence_logps(run or model, pairs, **options)
    close = {"rtol": 1e-10, "atol": 1e-11}
    torch.testing.assert_close(found.chosen, chosen, **close)
    torch.testing.assert_close(found.rejected, rejected, **close)
    ours = gradients(model, found.chosen, found.rejected)
    assert ours.keys() == expected.keys() and ours
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, **close, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_textbook(family, tied):
    assert_same(build(family, tied))


@pytest.mark.parametrize("stream_tokens", [1, 40, 10_000])
def test_however_the_pairs_are_cut(stream_tokens):
    assert_same(build("llama"), stream_tokens=stream_tokens)
    assert_same(build("llama"), pairs=PAIRS[::-1], stream_tokens=stream_tokens)


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_with_frozen_layers(layers):
    model = build("llama")
    freeze(model, LayerSelection(layers))
    assert_same(model)


def test_in_training_mode_without_dropout():
    assert_same(build("llama").train())


def test_with_lora_adapters():
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj", "down_proj", "gate_proj"])
    model = peft.get_peft_model(build("llama"), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    assert_same(model)
    with model.disable_adapter():
        assert_same_values(model)


def with_peft(model, name="default", **settings):
    """The model with adapters by peft alone, moved away from their start."""
    import peft

    torch.manual_seed(0)
    targets = ["q_proj", "v_proj", "down_proj", "gate_proj"]
    config = peft.LoraConfig(**{"r": 3, "target_modules": targets} | settings)
    adapted = peft.get_peft_model(model, config, adapter_name=name)
    shift(adapted)
    return adapted


@torch.no_grad()
def shift(model):
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_" in name:
            steps = torch.arange(parameter.numel(), dtype=torch.float64) + number
            parameter.add_(0.1 * torch.sin(steps).view_as(parameter))


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "policy"},
        {"use_rslora": True, "lora_alpha": 5},
        {"lora_bias": True},
        {"use_dora": True},
        {"use_dora": True, "target_modules": ["embed_tokens", "up_proj"]},
        {"target_modules": ["embed_tokens", "gate_proj"]},
        {"target_modules": ["embed_tokens"]},
        {"bias": "lora_only"},
        {"bias": "all"},
        {"modules_to_save": ["input_layernorm", "mlp"], "target_modules": ["q_proj"]},
        {"modules_to_save": ["self_attn"], "target_modules": ["up_proj"]},
        {"init_lora_weights": "mica"},
        {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 3}},
        {"layers_to_transform": [1, 3]},
    ],
    ids=str,
)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_adapters_of_every_make(settings, tied):
    model = with_peft(build("qwen2", tied).float(), **settings).double()  # MiCA starts in no other
    assert_same(model)
    with model.disable_adapter():
        assert_same_values(model)


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_whichever_adapters_are_active(kind):
    import peft

    model = with_peft(build("qwen2"), **kind)
    first = smoldpo.sequence_logps(model, PAIRS).chosen.detach()
    model.add_adapter("ref", peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], **kind))
    shift(model)
    model.set_adapter("ref")
    assert_same(model)
    assert (smoldpo.sequence_logps(model, PAIRS).chosen - first).abs().min() > 1e-3
    model.base_model.set_adapter(["default", "ref"])
    assert_same(model)
    model.base_model.set_adapter([])
    assert_same_values(model)


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_merged_and_not_merged_again(kind):
    model = with_peft(build("qwen2"), **kind)
    before = smoldpo.sequence_logps(model, PAIRS).chosen.detach()
    model.merge_adapter()
    assert_same_values(model)
    torch.testing.assert_close(smoldpo.sequence_logps(model, PAIRS).chosen, before)
    model.unmerge_adapter()
    assert_same(model)
    model.merge_adapter()
    with model.disable_adapter():  # which unmerges them
        assert_same_values(model)
    assert_same(model)


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_dora": True}, {"target_modules": ["embed_tokens", "up_proj"]}],
    ids=["lora", "dora", "embeddings"],
)
def test_float32_adapters_over_a_bfloat16_model(settings):
    """As peft makes them; the numbers are those of the same weights in float64, but for
    rounding.
    """
    model = with_peft(build("qwen2").bfloat16(), **settings)
    dtypes = {p.dtype for name, p in model.named_parameters() if "lora_" in name}
    assert dtypes == {torch.float32}
    found = smoldpo.sequence_logps(model, PAIRS)
    (found.chosen - found.rejected).sum().backward()
    slopes = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    exact = copy.deepcopy(model).double()
    chosen, rejected = textbook(exact)
    exact.zero_grad(set_to_none=True)
    (chosen - rejected).sum().backward()
    close = {"rtol": 0.02, "atol": 0.1, "check_dtype": False}
    torch.testing.assert_close(found.chosen, chosen, **close)
    torch.testing.assert_close(found.rejected, rejected, **close)
    trained = {n: p.grad for n, p in exact.named_parameters() if p.grad is not None}
    assert slopes.keys() == trained.keys()
    for name, slope in trained.items():
        assert (slopes[name] - slope).norm() < 0.1 * slope.norm(), name


def test_adapters_that_look_at_more_than_a_row_are_refused():
    model = with_peft(build("qwen2"), alora_invocation_tokens=[5], task_type="CAUSAL_LM")
    with pytest.raises(smoldpo.ModelError, match=r"ALoraLinearVariant.*call merge_and_unload\(\)"):
        smoldpo.sequence_logps(model, PAIRS)


def assert_same_values(model):
    with torch.no_grad():
        found = smoldpo.sequence_logps(model, PAIRS)
        assert not found.chosen.requires_grad
        for ours, theirs in zip((found.chosen, found.rejected), textbook(model), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


def test_a_pairs_numbers_do_not_depend_on_the_others():
    model = build("llama").float()
    together = smoldpo.sequence_logps(model, PAIRS)
    for number, pair in enumerate(PAIRS):
        alone = smoldpo.sequence_logps(model, [pair])
        assert alone.chosen[0] == together.chosen[number]
        assert alone.rejected[0] == together.rejected[number]
    policy = copy.deepcopy(model)
    freeze(policy, LayerSelection(3))
    assert torch.equal(smoldpo.sequence_logps(policy, PAIRS).chosen, together.chosen)


def test_the_model_is_what_it_was():
    model = build("llama")
    ids = torch.tensor([[5, 6, 7, 8]])
    before, everything = model(ids).logits, attributes(model)
    state = copy.deepcopy(model.state_dict())
    found = smoldpo.sequence_logps(model, PAIRS)
    assert attributes(model) == everything
    assert torch.equal(model(ids).logits, before)
    found.chosen.sum().backward()  # also after other uses of the model
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "rows_product", None)  # anything that fails in the middle
        with pytest.raises(TypeError):
            smoldpo.sequence_logps(model, PAIRS)
    assert attributes(model) == everything


def attributes(model):
    """Of every module: its class, its attributes and parts by identity; and what the configuration
    holds.
    """
    modules = [
        (type(m), {k: id(v) for part in (vars(m), m._modules, m._buffers) for k, v in part.items()})
        for m in model.modules()
    ]
    return modules, model.config.to_dict(), model.config._attn_implementation


def test_pairs_are_tokenised_as_training_does(tiny_model, tiny_tokenizer):
    pairs = [
        smoldpo.PreferencePair(f"Is {n} odd?", f"Yes, {n}.", "No." * (n + 1)) for n in range(3)
    ]
    tokens = smoldpo.tokenize_pairs(tiny_tokenizer, pairs, max_length=64)
    found = smoldpo.sequence_logps(tiny_model, pairs, tiny_tokenizer, max_length=64)
    again = smoldpo.sequence_logps(tiny_model, tokens)
    assert torch.equal(found.chosen, again.chosen) and torch.equal(found.rejected, again.rejected)
    cut = smoldpo.sequence_logps(tiny_model, pairs, tiny_tokenizer, max_length=8)
    assert not torch.equal(found.chosen, cut.chosen)


class Special(torch.nn.Linear):
    pass


def quantised(model):
    model.model.layers[1].mlp.up_proj = Special(32, 48, bias=False).double()


def patched(model):
    model.model.layers[0].self_attn.forward = lambda *_: None


def dropping(model):
    model.train()
    model.model.layers[0].self_attn.attention_dropout = 0.1


def recomputing(model):
    model.train()
    model.activation_checkpointing_enable()


def other_head(model):
    model.lm_head = torch.nn.Sequential(model.lm_head)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (quantised, "up_proj is a Special, not a plain linear layer"),
        (patched, "self_attn has a forward of its own"),
        (dropping, "drops out 0.1 in training mode; call model.eval"),
        (recomputing, r"call gradient_checkpointing_disable\(\)"),
        (other_head, "its LM head is a Sequential"),
    ],
)
def test_models_that_would_be_run_wrongly_are_refused(spoil, said):
    model = build("llama")
    spoil(model)
    with pytest.raises(smoldpo.ModelError, match=said):
        smoldpo.sequence_logps(model, PAIRS)


def test_other_refusals(tiny_tokenizer):
    import peft

    model = build("llama")
    pair = smoldpo.PreferencePair("a", "b", "c")
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=97, n_embd=8, n_layer=1, n_head=1)
    )
    with pytest.raises(smoldpo.ModelError, match="not proven on models of type 'gpt2'"):
        smoldpo.sequence_logps(gpt2, PAIRS)
    with pytest.raises(smoldpo.ModelError, match="takes a transformers model, not DataParallel"):
        smoldpo.sequence_logps(torch.nn.DataParallel(model), PAIRS)
    with pytest.raises(smoldpo.UsageError, match="need a tokenizer"):
        smoldpo.sequence_logps(model, [pair])
    with pytest.raises(smoldpo.UsageError, match="there are no pairs"):
        smoldpo.sequence_logps(model, [])
    with pytest.raises(smoldpo.UsageError, match="give PreferencePairs"):
        smoldpo.sequence_logps(model, [{"prompt": "a"}], tiny_tokenizer)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(smoldpo.UsageError, match="autocast"):
        smoldpo.sequence_logps(model, PAIRS)
    model.config.max_position_embeddings = 20
    with pytest.raises(smoldpo.UsageError, match="only 20 positions"):
        smoldpo.sequence_logps(model, PAIRS)
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(smoldpo.ModelError, match="not PROMPT_TUNING"):
        smoldpo.sequence_logps(peft.get_peft_model(build("llama"), prompt), PAIRS)
    head = peft.LoraConfig(r=2, target_modules=["lm_head"])
    with pytest.raises(smoldpo.ModelError, match="its LM head is a Linear"):
        smoldpo.sequence_logps(peft.get_peft_model(build("llama", tied=False), head), PAIRS)
