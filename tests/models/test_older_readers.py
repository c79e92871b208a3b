"""A saved folder read as older programs read it: by names at the top of config.json."""

import json

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    LlamaConfig,
    PhiConfig,
    Qwen2Config,
)

from smoldpo.models.older_readers import older_names
from smoldpo.models.save import save_model

SHAPE = {
    "vocab_size": 8, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 3e4, "factor": 4.0}
YARN = {
    "rope_type": "yarn", "rope_theta": 2e4, "factor": 4.0, "original_max_position_embeddings": 128,
}  # fmt: skip


def saved(config, tokenizer, folder):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    save_model(folder, model, tokenizer, "", torch.float32)
    return model, json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("theta", [1e4, 1.3e5])
def test_the_rotary_base_and_the_precision_stand_at_the_top(tiny_tokenizer, tmp_path, theta):
    config = LlamaConfig(**SHAPE, rope_theta=theta)
    model, said = saved(config, tiny_tokenizer, tmp_path / "m")
    assert said["rope_theta"] == theta and "rope_scaling" not in said
    assert said["torch_dtype"] == said["dtype"] == "float32"
    dims = torch.arange(0, 8, 2) / 8
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, said["rope_theta"] ** -dims)


@pytest.mark.parametrize(
    ("kind", "rope"), [(LlamaConfig, LLAMA3), (LlamaConfig, LINEAR), (Qwen2Config, YARN)]
)
def test_scaling_stands_there_too_without_the_base(tiny_tokenizer, tmp_path, kind, rope):
    _, said = saved(kind(**SHAPE, rope_parameters=rope), tiny_tokenizer, tmp_path / "m")
    assert said["rope_theta"] == rope["rope_theta"]
    assert said["rope_scaling"] == {k: v for k, v in rope.items() if k != "rope_theta"}


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SHAPE, rope_parameters=LLAMA3),
        Qwen2Config(**SHAPE, rope_parameters=YARN),
        PhiConfig(**SHAPE),
        Gemma3TextConfig(**SHAPE, head_dim=8),
    ],
    ids=lambda config: config.model_type,
)
def test_transformers_reads_the_folder_as_before(config, tiny_tokenizer, tmp_path):
    config.save_pretrained(tmp_path / "before")
    before = json.loads((tmp_path / "before" / "config.json").read_text())
    model, said = saved(config, tiny_tokenizer, tmp_path / "m")
    known = ("rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor")
    assert said.keys() - before.keys() - set(known) <= {"torch_dtype", "dtype", "architectures"}
    again = AutoConfig.from_pretrained(tmp_path / "m")
    assert again.rope_parameters == model.config.rope_parameters
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 1, 2]])
    assert torch.equal(loaded.eval()(ids).logits, model.eval()(ids).logits)


def test_other_old_names():
    partial = {"rope_theta": 2.0, "rope_type": "default", "partial_rotary_factor": 0.5}
    assert older_names({"rope_parameters": partial}) == {
        "rope_theta": 2.0,
        "partial_rotary_factor": 0.5,
    }
    nested = {"full_attention": LINEAR, "sliding_attention": {"rope_theta": 1e4}}
    assert older_names({"rope_parameters": nested}) == {
        "rope_theta": 3e4,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    }
    assert older_names({"model_type": "gpt2"}) == {}


def test_a_tokenizer_has_a_class_and_tokens_that_transformers_4_knows(tiny_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<a>", "<b>"]})
    saved(LlamaConfig(**SHAPE), tokenizer, tmp_path / "m")
    said = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    assert said["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (
        said["additional_special_tokens"] == ["<a>", "<b>"] and "extra_special_tokens" not in said
    )
    again = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert type(again) is type(tokenizer)
    assert again.all_special_tokens == tokenizer.all_special_tokens
    assert again("x<a>y z").input_ids == tokenizer("x<a>y z").input_ids
