import pytest
from transformers import LlamaForCausalLM

from smoldpo.config.layer_spec import LayerSelection
from smoldpo.models.freeze import freeze, layer_of, summarize
from smoldpo.utils.errors import UsageError


def trains(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_first_layers_with_the_embeddings(tiny_model):
    assert freeze(tiny_model, LayerSelection(3)) == 3
    names = trains(tiny_model)
    assert {layer_of(name) for name in names} == {3, -1}
    # The LM head is tied to the embeddings, so only the final norm is left outside the layers.
    assert {name for name in names if layer_of(name) < 0} == {"model.norm.weight"}


def test_default_is_five_sixths(tiny_model):
    assert freeze(tiny_model, LayerSelection()) == 3  # 4 * 5 // 6


def test_zero_freezes_nothing(tiny_model):
    freeze(tiny_model, LayerSelection(0))
    assert trains(tiny_model) == {name for name, _ in tiny_model.named_parameters()}


def test_untied_head_trains_when_embeddings_freeze(tiny_config):
    import copy

    config = copy.deepcopy(tiny_config)
    config.tie_word_embeddings = False
    model = LlamaForCausalLM(config)
    freeze(model, LayerSelection(4))
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
        (["norms", "*.mlp.*"], 9 + 12),
    ],
)
def test_groups_and_patterns(tiny_model, names, frozen):
    freeze(tiny_model, LayerSelection(0, freeze=names))
    assert sum(not p.requires_grad for p in tiny_model.parameters()) == frozen


def test_summary_counts_every_parameter_once(tiny_model):
    freeze(tiny_model, LayerSelection(3, freeze=["norms"]))
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
        freeze(tiny_model, LayerSelection(layers, freeze=names))


TINY = {"norm": "model.norm.weight", "embedding": "model.embed_tokens.weight"}


@pytest.mark.parametrize(
    "items, chosen",
    [
        (["last:2"], {2, 3}),
        (["first:1"], {0}),
        (["every:2"], {1, 3}),
        (["every:3"], {0, 3}),
        (["every:9"], {3}),
        (["0", "2-3"], {0, 2, 3}),
        (["1-1"], {1}),
        (["first:1", "last:1", "3"], {0, 3}),
    ],
)
def test_layers_by_number(tiny_model, items, chosen):
    assert freeze(tiny_model, LayerSelection(train_layers=items)) == 0
    names = trains(tiny_model)
    assert {layer_of(name) for name in names} == chosen, "and nothing outside the layers"
    assert len(names) == 9 * len(chosen), "each of them whole"


@pytest.mark.parametrize(
    "train, more, names",
    [
        (["norms"], {}, 9),
        (["*.mlp.*"], {}, 12),
        (["*.mlp.*"], {"freeze_layers": 3}, 3),
        (["norms"], {"train_layers": ["last:1"]}, 2),
        (["norms", "embeddings"], {}, 10),
        (["*.layers.3.*"], {"freeze": ["norms"]}, 7),
    ],
)
def test_names_that_train(tiny_model, train, more, names):
    freeze(tiny_model, LayerSelection(train=train, **more))
    assert len(trains(tiny_model)) == names


def test_what_says_what_trains_leaves_no_layer_frozen_by_default(tiny_model):
    assert freeze(tiny_model, LayerSelection(train=["norms"])) == 0
    assert TINY["norm"] in trains(tiny_model) and TINY["embedding"] not in trains(tiny_model)


def test_biases_are_a_group(tiny_config):
    import copy

    config = copy.deepcopy(tiny_config)
    config.attention_bias = True
    model = LlamaForCausalLM(config)
    freeze(model, LayerSelection(0, freeze=["biases"]))
    assert {n for n in dict(model.named_parameters()) if n.endswith("bias")} == {
        name for name, parameter in model.named_parameters() if not parameter.requires_grad
    }
    freeze(model, LayerSelection(train=["biases"], train_layers=["3"]))
    assert trains(model) == {f"model.layers.3.self_attn.{x}_proj.bias" for x in "qkvo"}


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"train_layers": ["last:5"]}, "more than the model's 4 layers"),
        ({"train_layers": ["2-4"]}, "more than the model's 4 layers"),
        ({"train_layers": ["3-1"]}, "write 1-3"),
        ({"train_layers": ["every:0"]}, "chooses no layer"),
        ({"train_layers": ["top"]}, "last:4"),
        ({"train_layers": ["-1"]}, "last:4"),
        ({"train": ["nroms"]}, "did you mean norms"),
        ({"train": ["biases"]}, "the model has no biases"),
        ({"train": ["*.layers.0.*"], "train_layers": ["3"]}, "fits nothing in the layers"),
        ({"train": ["norms", "*.layers.0.*"], "layers": 2}, "fits nothing in the layers"),
        ({"train": ["norms"], "names": ["norms"]}, "everything is frozen"),
    ],
)
def test_a_choice_that_cannot_be_is_an_error(tiny_model, settings, says):
    layers, names = settings.pop("layers", None), settings.pop("names", ())
    with pytest.raises(UsageError, match=says):
        freeze(tiny_model, LayerSelection(layers, freeze=names, **settings))


def test_scattered_layers_stand_apart_in_the_table(tiny_model):
    freeze(tiny_model, LayerSelection(train_layers=["1"]))
    table = [(g.name, g.trainable > 0) for g in summarize(tiny_model)]
    assert ("layer 0", False) in table and ("layer 1", True) in table
    assert ("layers 2-3", False) in table and ("final norm", False) in table
