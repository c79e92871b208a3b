"""A folder whose weights are not exactly its model's is refused by name; nothing is computed."""

import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaForSequenceClassification

from conftest import make_tiny
from smoldpo.evaluation.judges import parse_judge
from smoldpo.models.load import find_model, load_classifier, load_model, load_tokenizer
from smoldpo.utils.errors import ModelError

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A model of one layer, whose head is not tied."""
    folder = tmp_path_factory.mktemp("whole")
    torch.manual_seed(1)
    make_tiny(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "m")


def edit(folder, change=None, **config):
    """Change the weights (in place, or by what is returned) and settings of a model folder."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights = (change(weights) if change else None) or weights
    save_file({name: w.clone() for name, w in weights.items()}, path, {"format": "pt"})
    said = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(said))


def drop(folder, name):
    edit(folder, lambda weights: {n: w for n, w in weights.items() if n != name})


def load(folder):
    return load_model(find_model(str(folder)), torch.float32)


def refused(folder, *words, load=load):
    with pytest.raises(ModelError) as caught:
        load(folder)
    said = str(caught.value)
    assert said.startswith(f"{folder}: ") and not said.rstrip().endswith(":")
    assert all(word in said for word in words), said
    assert not any(word in said for word in ("report", "You set", "newly initialized")), said


def shard(folder, indexed=(FIRST, SECOND), cut=6):
    """Split the weights into two shards, with an index that names some of them."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    parts = {FIRST: names[:cut], SECOND: names[cut:]}
    for file, some in parts.items():
        save_file({name: weights[name] for name in some}, folder / file, {"format": "pt"})
    found = {name: file for file in indexed for name in parts[file]}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": found}))
    return parts


# One weight too few, too many, or of another shape or name.

KINDS = ("remove", "rename", "reshape", "add")


def test_the_untouched_folder_loads_and_is_the_same_each_time(whole):
    one, two = load(whole).state_dict(), load(whole).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    at=st.integers(0, 11),
    tied=st.booleans(),
    sharded=st.booleans(),
    new=st.sampled_from(["{}x", "module.{}", "model.model.{}", "transformer.{}", "{}.weight"]),
)
def test_no_folder_is_scored_whose_weights_are_not_the_models(
    whole, tmp_path_factory, kind, at, tied, sharded, new
):
    folder = shutil.copytree(whole, tmp_path_factory.mktemp("changed") / "m")

    def change(weights):
        if tied:
            del weights["lm_head.weight"]
        name = sorted(weights)[at % len(weights)]
        found = weights[name]
        if kind in ("remove", "rename"):
            del weights[name]
        if kind in ("rename", "add"):
            weights[new.format(name)] = found
        if kind == "reshape":
            weights[name] = torch.cat([found, found[:1]])

    edit(folder, change, tie_word_embeddings=tied)
    if sharded:
        shard(folder)
    refused(folder)


@pytest.mark.parametrize("part", ["mlp.down_proj", "input_layernorm", "self_attn.v_proj"])
def test_a_weight_that_the_files_lack_is_named(folder, part):
    name = f"model.layers.0.{part}.weight"
    drop(folder, name)
    refused(folder, f"its files lack {name}")


def test_an_untied_model_without_its_head_is_refused_and_a_tied_one_is_whole(folder):
    drop(folder, "lm_head.weight")
    refused(folder, "lack lm_head.weight", "not tied to the embeddings")
    edit(folder, tie_word_embeddings=True)
    model = load(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_tied_head_may_be_stored_twice_if_it_is_the_same(folder):
    def both(weights):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]

    edit(folder, tie_word_embeddings=True)
    refused(folder, "ties lm_head.weight to model.embed_tokens.weight", "differ")
    edit(folder, both)
    assert load(folder).config.tie_word_embeddings
    drop(folder, "model.embed_tokens.weight")
    model = load(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("more", ["lm_head", "norm"])
def test_two_names_of_one_weight_are_refused(folder, more):
    """transformers takes the base model's name off, or adds it, and reads one of the two."""
    ours, other = (
        ("lm_head.weight", "model.lm_head.weight")
        if more == "lm_head"
        else ("model.norm.weight", "norm.weight")
    )

    def add(weights):
        weights[other] = weights[ours] + 1

    edit(folder, add)
    refused(folder, ours, other, "one weight of the model")
    drop(folder, ours)
    refused(folder, other, "unlike the rest")


def test_the_base_models_names_alone_are_whole(folder):
    expected = load(folder).state_dict()
    edit(folder, lambda weights: {n.removeprefix("model."): w for n, w in weights.items()})
    found = load(folder).state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_a_config_of_fewer_or_more_layers_than_the_files(folder):
    def deepen(weights):
        for name in [name for name in weights if ".layers.0." in name]:
            weights[name.replace(".layers.0.", ".layers.1.")] = weights[name] + 1

    edit(folder, deepen)
    refused(folder, "model.layers.1.", "num_hidden_layers is 1", "layer 1")
    edit(folder, num_hidden_layers=2)
    load(folder)
    edit(folder, num_hidden_layers=3)
    refused(folder, "lack model.layers.2.")


def test_shapes_are_told_both_ways(folder):
    edit(folder, vocab_size=9)
    refused(folder, "model.embed_tokens.weight is [8, 8] in its files, and [9, 8] by its config")
    edit(folder, vocab_size=8, intermediate_size=4)
    refused(folder, "mlp.down_proj.weight is [8, 8] in its files, and [8, 4]")


def test_what_a_model_computes_for_itself_may_lie_in_its_files(folder):
    def add(weights):
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    edit(folder, add)
    load(folder)


# Packed weights.


@pytest.mark.parametrize(
    ("settings_", "word"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bits"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "mlx"),
    ],
)
def test_packed_weights_are_asked_for_unpacked(folder, settings_, word):
    edit(folder, **settings_)
    refused(folder, "packed", word, "unpacked")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_weights_in_a_packed_type_are_packed_whatever_config_json_says(folder, dtype):
    name = "model.layers.0.mlp.up_proj.weight"
    edit(folder, lambda weights: weights.update({name: weights[name].to(dtype)}))
    refused(folder, "packed", name)


# Shards and their index.


def test_shards_and_their_index(folder, whole):
    shard(folder)
    found, expected = load(folder).state_dict(), load(whole).state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_an_index_that_leaves_a_shard_out_is_stale(folder):
    parts = shard(folder, indexed=(FIRST,))
    refused(folder, INDEX, SECOND, parts[SECOND][0])
    (folder / SECOND).unlink()
    refused(folder, "lack", parts[SECOND][0])


def test_shards_without_an_index(folder):
    shard(folder)
    (folder / INDEX).unlink()
    refused(folder, FIRST, SECOND, f"no {INDEX}")
    with pytest.raises(ModelError) as caught:
        load(folder)
    assert "pickle" not in str(caught.value) and "*.safetensors" not in str(caught.value)


def test_a_shard_that_the_index_names_and_is_not_there(folder):
    shard(folder)
    (folder / SECOND).unlink()
    refused(folder, f"names {SECOND}, which is not there")
    (folder / INDEX).write_text("[]")
    refused(folder, INDEX, "cannot be read")


def test_one_weight_in_two_shards(folder):
    parts = shard(folder)
    weights = load_file(folder / SECOND)
    save_file(weights | {parts[FIRST][0]: torch.ones(8, 8)}, folder / SECOND, {"format": "pt"})
    refused(folder, parts[FIRST][0], FIRST, SECOND)


def test_shards_of_another_model_beside_the_weights(folder, whole):
    shard(folder)
    shutil.copy(whole / "model.safetensors", folder)
    refused(folder, "of another set of weights", FIRST)


def test_weights_under_another_name_and_pickles(folder):
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    refused(folder, "weights.safetensors", "model.safetensors")
    (folder / "weights.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "pickled weights are never read")


# Errors of other libraries, told whole.


def test_a_folder_without_a_tokenizer_says_which_files_it_lacks(folder):
    (folder / "tokenizer.json").unlink()

    def read(folder):
        load_tokenizer(find_model(str(folder)))

    refused(folder, "tokenizer.json", "tokenizer.model", load=read)
    edit(folder, model_type="qwen2")  # of which transformers makes a tokenizer of no words
    refused(folder, "tokenizer.json", load=read)


def test_a_type_that_transformers_does_not_know(folder):
    edit(folder, model_type="tomorrow")
    refused(folder, "'tomorrow'", "update transformers")
    (folder / "config.json").write_text("{")
    refused(folder, "config.json is damaged")


# Every command, and judges.


def lacking(folder):
    drop(folder, "model.norm.weight")
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "--model", "{m}", "--data", "{data}", "--output-dir", "out"),
        ("train", "--model", "{ok}", "--reference", "{m}", "--data", "{data}"),
        ("evaluate", "{m}", "{data}"),
        ("evaluate", "{ok}", "{data}", "--reference", "{m}"),
        ("chat", "{m}", "--prompt", "a b"),
    ],
    ids=["policy", "reference", "evaluate", "evaluate against", "chat"],
)
def test_every_command_refuses_before_it_computes(
    cli, tiny_folder, tmp_path, pairs_file, arguments, monkeypatch
):
    def computed(*_, **__):
        raise AssertionError("computed")

    monkeypatch.setattr("torch.nn.functional.embedding", computed)
    folder = lacking(shutil.copytree(tiny_folder, tmp_path / "m"))
    names = {"m": folder, "ok": tiny_folder, "data": pairs_file}
    result = cli(*(word.format(**names) for word in arguments))
    assert result.code == 1 and result.out == "", result.err
    assert "its files lack model.norm.weight" in result.err
    assert "changed on disk" not in result.err


def test_judges_refuse_alike(whole, folder, tmp_path):
    for judge in (f"implicit:{lacking(folder)},{whole}", f"implicit:{whole},{folder}"):
        with pytest.raises(ModelError, match=r"lack model\.norm\.weight"):
            parse_judge(judge)
    config = type(load(whole).config)(**load(whole).config.to_dict() | {"num_labels": 1})
    reward = shutil.copytree(whole, tmp_path / "reward")
    LlamaForSequenceClassification(config).save_pretrained(reward)

    def classifier(folder):
        load_classifier(find_model(str(folder)))

    parse_judge(f"reward:{reward}")
    with pytest.raises(ModelError, match=r"files hold score\.weight"):
        load(reward)
    drop(reward, "model.layers.0.mlp.up_proj.weight")
    refused(reward, "lack model.layers.0.mlp.up_proj.weight", load=classifier)
