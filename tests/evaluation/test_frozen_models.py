"""Models that answer: narrow weights stay, and what both have in common is there once. Nothing
tells.
"""

import copy
import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import smoldpo
from smoldpo.config.layer_spec import LayerSelection
from smoldpo.config.load import build_config
from smoldpo.engine.autotune import KernelChoice
from smoldpo.engine.kernels.lora import copy_adapters
from smoldpo.engine.logprobs import token_logps
from smoldpo.engine.precision import cast_frozen
from smoldpo.evaluation import side_by_side
from smoldpo.models.adapters import AdapterSettings, add_adapters
from smoldpo.models.families import FAMILIES
from smoldpo.models.generate import generate_answers
from smoldpo.models.load import ModelSource, load_model, load_tokenizer
from smoldpo.training.setup import load_data, load_models
from smoldpo.types import TokenizedPair
from wide import LAYERS, make_wide

DATA = [{"prompt": f"Is {n}?", "chosen": "Yes, it is.", "rejected": "No, no."} for n in range(12)]
PROMPTS = [(5, 6, n) for n in range(20, 26)]


@pytest.fixture(scope="module")
def both_kinds(tmp_path_factory, tiny_tokenizer):
    """By whether the head is tied: the same values in bfloat16 and in float32."""
    return {
        tied: [
            make_wide(tmp_path_factory.mktemp("wide"), tiny_tokenizer, dtype, tied, width=64)
            for dtype in (torch.bfloat16, torch.float32)
        ]
        for tied in (True, False)
    }


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def folders(request, both_kinds):
    return both_kinds[request.param]


def loaded(folder, dtype=torch.float32):
    return load_model(ModelSource("m", str(folder)), dtype, as_stored=FAMILIES)


def apart(reference, model) -> set[str]:
    """Names of the weights that are not the same memory in both."""
    theirs = {name: weight.data_ptr() for name, weight in reference.named_parameters()}
    named = {
        n.replace(".linear.", "."): w for n, w in model.named_parameters()
    }  # adapters beside it
    return {n for n, weight in named.items() if weight.data_ptr() != theirs.get(n)}


def answers(model, folder) -> list[tuple[int, ...]]:
    tokenizer = load_tokenizer(ModelSource("m", str(folder)))
    settings = {"max_new_tokens": 8, "temperature": 1.0, "seed": 1, "batch_size": 4}
    return [a.ids for a in generate_answers(model, tokenizer, PROMPTS, **settings)]


def test_narrow_weights_answer_as_converted_ones(folders):
    narrow, full = (cast_frozen(loaded(folder), torch.float32) for folder in folders)
    stored = {n for n, weight in narrow.named_parameters() if weight.dtype == torch.bfloat16}
    assert len([name for name in stored if ".layers." in name]) == 7 * LAYERS
    assert ("model.embed_tokens.weight" in stored) == (not narrow.config.tie_word_embeddings)
    assert not any("norm" in name or "lm_head" in name for name in stored)
    assert answers(narrow, folders[0]) == answers(full, folders[1])
    ids = torch.tensor([PROMPTS[0]])
    ours, theirs = narrow(ids).logits, full(ids).logits
    assert ours.dtype == torch.float32 and torch.equal(ours, theirs)
    assert not any(weight.requires_grad for weight in narrow.parameters())


def test_what_the_compute_dtype_does_not_hold_is_converted(folders):
    model = cast_frozen(loaded(folders[1]), torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", [0, 1], ids=["narrow", "full"])
@pytest.mark.parametrize("second", [0, 1], ids=["narrow", "full"])
def test_equal_weights_lie_in_memory_once(folders, compute, first, second):
    """Whichever of the two models is stored in the wider precision; a wider one keeps its own
    values.
    """
    reference = cast_frozen(loaded(folders[first]), compute)
    alone = loaded(folders[second])
    name = "model.layers.2.mlp.up_proj.weight"
    weight = alone.get_parameter(name)
    weight.data = weight.data.clone()
    weight.data[3, 4] += 0.5  # which bfloat16 holds
    beside = copy.deepcopy(alone)
    cast_frozen(alone, compute)
    cast_frozen(beside, compute, share_with=reference)
    # A float32 matrix is not given to a layer that has it in bfloat16: it would only grow.
    beyond = {
        n
        for n, weight in alone.named_parameters()
        if weight.dtype.itemsize < reference.get_parameter(n).dtype.itemsize
    }
    assert apart(reference, beside) == {name} | beyond
    assert bool(beyond) == ((first, second, compute) == (1, 0, torch.float32))
    ids = torch.tensor([PROMPTS[0]])
    assert torch.equal(beside(ids).logits, alone(ids).logits)
    assert not torch.equal(beside(ids).logits, reference(ids).logits)


def test_a_weight_that_bfloat16_does_not_hold_is_not_shared(folders):
    reference = cast_frozen(loaded(folders[0]), torch.float32)
    model = loaded(folders[1])
    name = "model.layers.1.self_attn.q_proj.weight"
    weight = model.get_parameter(name)
    weight.data = weight.data.clone()
    weight.data[0, 0] *= 1 + 2**-20
    cast_frozen(model, torch.float32, share_with=reference)
    assert apart(reference, model) == {name}


def test_a_family_that_converts_nothing_gets_nothing_narrower(folders):
    """Of which products are not known to take it: its weights are as they would be alone."""
    reference = cast_frozen(loaded(folders[0]), torch.float32)
    model = load_model(ModelSource("m", str(folders[1])), torch.float32)
    model.config.model_type = "another"
    cast_frozen(model, torch.float32, share_with=reference)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert 0 < len(apart(reference, model)) < len(list(model.parameters()))


def trained(names: set[str]) -> bool:
    return all("layers.3." in n or n in ("model.norm.weight", "lm_head.weight") for n in names)


@pytest.fixture
def asked(monkeypatch):
    """The models that answered: the reference, then the policy."""
    seen, draw = [], side_by_side.generate_answers

    def watched(model, *given, **more):
        if model not in seen:
            seen.append(model)
        return draw(model, *given, **more)

    monkeypatch.setattr(side_by_side, "generate_answers", watched)
    return seen


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def run(folder, output, **more):
    given = {"model": str(folder), "data": DATA, "output_dir": str(output), "max_steps": 2}
    given |= {"learning_rate": 1e-2, "freeze_layers": 3, "max_new_tokens": 4, "eval_fraction": 0.3}
    given |= {"dtype": "float32", "generate_prompts": 1, "sample_prompt": None}
    smoldpo.train(**given | more)
    return output


@pytest.mark.runs
@pytest.mark.parametrize(
    "folders, stored, dtype, engine",  # each two of them in every combination
    [
        (True, 0, "float32", "fast"),
        (True, 1, "bfloat16", "plain"),
        (True, 0, "float32", "plain"),
        (False, 0, "bfloat16", "plain"),
        (False, 1, "float32", "plain"),
        (False, 1, "bfloat16", "fast"),
    ],
    indirect=["folders"],
)
def test_a_run_has_what_does_not_train_once(folders, tmp_path, asked, stored, dtype, engine):
    run(folders[stored], tmp_path / "run", dtype=dtype, engine=engine)
    reference, policy = asked
    found = apart(reference, policy)
    assert len(found) >= 10 and trained(found)
    head = policy.get_output_embeddings().weight
    assert (head is policy.get_input_embeddings().weight) == policy.config.tie_word_embeddings


@pytest.mark.runs
@pytest.mark.parametrize(
    "folders, mine, others, use_peft",
    [
        (True, 0, 1, False),
        (False, 0, 1, True),
        (True, 1, 0, True),
        (False, 1, 0, False),
        (True, 0, 2, False),
        (False, 0, 2, True),
    ],
    indirect=["folders"],
)
def test_a_policy_that_was_loaded_for_itself_shares_as_much(
    folders, tmp_path, asked, use_peft, mine, others
):
    """Beside a reference of the same values in other files."""
    names = [*folders, shutil.copytree(folders[0], tmp_path / "copy")]
    run(names[mine], tmp_path / "run", reference=str(names[others]), use_peft=use_peft)
    reference, policy = asked
    found = apart(reference, policy)
    if others == 1:  # its own bfloat16 is less than a reference's float32
        named = policy.named_parameters()
        found -= {n.replace(".linear.", ".") for n, w in named if w.dtype == torch.bfloat16}
    assert found and trained(found)
    if use_peft:
        assert {n.rsplit(".", 1)[-1] for n in found} == {"down", "up"}


@pytest.mark.runs
def test_evaluate_has_what_two_models_have_in_common_once(folders, tmp_path, asked):
    tuned = run(folders[0], tmp_path / "run", generate_prompts=0, sample_prompt=None)
    given = {"generate_prompts": 3, "max_new_tokens": 4, "dtype": "float32", "verbose": False}
    smoldpo.evaluate([str(folders[0]), str(tuned)], DATA, **given)
    before, after = asked
    found = apart(before, after)
    assert found and trained(found)
    # The run's file is float32; what did not train is read as the start's files have it.
    assert after.get_parameter("model.layers.0.mlp.up_proj.weight").dtype == torch.bfloat16


@pytest.mark.parametrize("more", [{}, {"use_peft": True}], ids=str)
def test_nothing_is_copied_to_be_given_up_again(folders, write_rows, more):
    """What a run's policy shares with its reference is shared before either is converted."""
    given = {"model": str(folders[1]), "data": str(write_rows(DATA)), "dtype": "float32"}
    config = build_config(given | {"freeze_layers": 3} | more)
    models = load_models(config, load_data(config))
    reference = models.reference()
    found = apart(reference, models.tuned(reference))
    assert found and trained(found)


def with_biases() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=97, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        attention_bias=True,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight, std=5.0)
    return model


def adapted_copy(model, dora: bool, full: torch.dtype):
    adapted = copy.deepcopy(model)
    add_adapters(adapted, AdapterSettings(3, 12.0, (), dora, dora, LayerSelection(0), 0), full)
    return adapted


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_that_have_learnt_nothing_change_nothing(dora, dtype):
    """To the last bit, though DoRA scales what a layer gives; a bias it adds behind a rounding."""
    model = with_biases()
    if dora and dtype == torch.bfloat16:
        model = LlamaForCausalLM(LlamaConfig(**model.config.to_dict() | {"attention_bias": False}))
    beside = cast_frozen(copy.deepcopy(model), dtype)
    copy_adapters(beside, adapted_copy(model, dora, torch.float32))
    cast_frozen(beside, dtype)
    ids = torch.tensor([[3, 4, 5, 6]])
    assert torch.equal(beside(ids).logits, cast_frozen(model, dtype)(ids).logits)


@pytest.mark.runs
@pytest.mark.parametrize(
    "folders, more", [(True, {}), (False, {"use_dora": True})], ids=str, indirect=["folders"]
)
def test_what_answers_is_what_is_saved(folders, tmp_path, asked, more):
    tuned = run(folders[0], tmp_path / "run", use_peft=True, merge=True, **more)
    policy, saved = asked[1], loaded(tuned / "model")
    ids = torch.tensor([PROMPTS[0]])
    ours, theirs, start = (model(ids).logits for model in (policy, saved, asked[0]))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert (ours - start).abs().max() > 0.05


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_beside_the_weights_are_those_in_the_weights(dora):
    """Llama with biases, in float64: as peft merges them."""
    model = with_biases().double()
    adapted = adapted_copy(model, dora, torch.float64)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.add_(0.2 * torch.randn_like(weight))
    beside, start = copy.deepcopy(model), model.state_dict()
    copy_adapters(beside, adapted)
    ids = torch.tensor([[3, 4, 5, 6]])
    found = beside(ids).logits
    torch.testing.assert_close(found, adapted(ids).logits, rtol=1e-10, atol=1e-10)
    assert (found - model(ids).logits).abs().max() > 1e-2
    pair = TokenizedPair("a", (3, 4), (5, 6), (7,))
    (ours,), (theirs,) = (token_logps(each, [pair], KernelChoice()) for each in (beside, adapted))
    assert ours[0] == pytest.approx(theirs[0], rel=1e-10)
    assert all(torch.equal(weight, start[name]) for name, weight in model.named_parameters())
