import pytest
from transformers import LlamaForCausalLM

from smoldpo.errors import UsageError
from smoldpo.models.freeze import freeze, layer_of, summarize


def trains(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_first_layers_with_the_embeddings(tiny_model):
    assert freeze(tiny_model, 3) == 3
    names = trains(tiny_model)
    assert {layer_of(name) for name in names} == {3, -1}
    # The LM head is tied to the embeddings, so only the final norm is left outside the layers.
    assert {name for name in names if layer_of(name) < 0} == {"model.norm.weight"}


def test_default_is_five_sixths(tiny_model):
    assert freeze(tiny_model, None) == 3  # 4 * 5 // 6


def test_zero_freezes_nothing(tiny_model):
    freeze(tiny_model, 0)
    assert trains(tiny_model) == {name for name, _ in tiny_model.named_parameters()}


def test_untied_head_trains_when_embeddings_freeze(tiny_config):
    import copy

    config = copy.deepcopy(tiny_config)
    config.tie_word_embeddings = False
    model = LlamaForCausalLM(config)
    freeze(model, 4)
    assert trains(model) == {"model.norm.weight", "lm_head.weight"}
    assert [g.name for g in summarize(model) if g.trainable] == ["final norm", "LM head"]


@pytest.mark.parametrize(
    "names, frozen",
    [
        (["embeddings"], 1),
        (["norms"], 9),
        (["*.mlp.*"], 12),
        (["norms", "*.layers.0.*"], 9 + 7),
        (["model.layers.1.self_attn.q_proj.weight"], 1),
    ],
)
def test_groups_and_patterns(tiny_model, names, frozen):
    freeze(tiny_model, 0, names)
    assert sum(not p.requires_grad for p in tiny_model.parameters()) == frozen


def test_summary_counts_every_parameter_once(tiny_model):
    freeze(tiny_model, 3, ["norms"])
    groups = summarize(tiny_model)
    assert sum(g.parameters for g in groups) == sum(p.numel() for p in tiny_model.parameters())
    assert sum(g.trainable for g in groups) == sum(
        p.numel() for p in tiny_model.parameters() if p.requires_grad
    )
    assert [g.name for g in groups] == [
        "embeddings and LM head (tied)",
        "layers 0-2",
        "layer 3",
        "final norm",
    ]


@pytest.mark.parametrize(
    "layers, names, says",
    [
        (5, [], "the model has 4 layers"),
        (4, ["norms"], "everything is frozen"),
        (0, ["embedings"], "did you mean embeddings"),
        (0, ["*"], "everything is frozen"),
    ],
)
def test_what_cannot_be_is_an_error(tiny_model, layers, names, says):
    with pytest.raises(UsageError, match=says):
        freeze(tiny_model, layers, names)
