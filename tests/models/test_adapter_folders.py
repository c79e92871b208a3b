"""Adapters of others, merged: what peft's own model computes, or a refusal that says why."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from conftest import make_tiny
from smoldpo.models.load import find_model, load_model, load_tokenizer
from smoldpo.models.save import save_model
from smoldpo.utils.errors import ModelError

WEIGHTS = "adapter_model.safetensors"
IDS = torch.tensor([[1, 2, 3, 4, 5, 1]])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model of one layer in float64, its head tied to its embeddings."""
    folder = tmp_path_factory.mktemp("base")
    make_tiny(folder, tie_word_embeddings=True)
    torch.manual_seed(4)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight))
    model.save_pretrained(folder)
    return folder


def adapt(base, folder, rows=None, kind=None, **settings):
    """An adapter as peft alone writes it, and the log-probabilities of peft's model."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    if rows:
        model.resize_token_embeddings(rows)
    adapted = get_peft_model(model, kind or LoraConfig(task_type="CAUSAL_LM", r=2, **settings))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name or "trainable_tokens" in name:
                weight.add_(torch.randn_like(weight))
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder)
    return adapted.eval()


def logps(model):
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=IDS).logits, -1)


def load(folder):
    return load_model(find_model(str(folder)), torch.float64)


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": ["lm_head"], "use_dora": True},
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
    ],
    ids=str,
)
def test_merged_it_computes_what_pefts_model_computes(base, tmp_path, settings, recwarn):
    adapted = adapt(base, tmp_path / "adapter", **settings)
    recwarn.clear()
    model = load(tmp_path / "adapter")
    assert not [w for w in recwarn if "peft" in w.filename], "nothing of peft's is shown"
    torch.testing.assert_close(logps(model), logps(adapted), rtol=0, atol=1e-11)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings == tied
    targets = settings["target_modules"]
    if targets == ["q_proj", "lm_head"]:
        stored = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
        assert torch.equal(model.model.embed_tokens.weight, stored), "the head's alone"

    # Saved, it is the same model to us and to transformers.
    tokenizer = load_tokenizer(find_model(str(base)))
    save_model(tmp_path / "merged", model, tokenizer, "", torch.float64)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float64)
    for again in (load(tmp_path / "merged"), theirs):
        torch.testing.assert_close(logps(again), logps(adapted), rtol=0, atol=1e-11)


def test_a_run_on_such_an_adapter_saves_what_it_trained(base, tmp_path, cli, write_rows):
    """Untied for the adapter's sake, the head stays untied in what a merged run saves."""
    adapt(base, tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    pairs = [{"prompt": f"{a} {b}", "chosen": "c", "rejected": "d"} for a in "abc" for b in "efg"]
    data = write_rows(pairs)
    result = cli(
        "train", "--model", tmp_path / "adapter", "--data", data, "--output-dir", "out",
        "--use-peft", "--merge", "--max-steps", "1", "--learning-rate", "0.1", "--eval-fraction",
        "0.3", "--lora-r", "2", "--sample-prompt", "none", "--generate-prompts", "0",
        "--compile", "off", "--dtype", "float32",
    )  # fmt: skip
    assert result.code == 0, result.err
    saved = load(tmp_path / "out")
    assert not saved.config.tie_word_embeddings
    assert saved.lm_head.weight is not saved.model.embed_tokens.weight
    torch.testing.assert_close(
        saved.lm_head.weight, load(tmp_path / "adapter").lm_head.weight, rtol=1e-6, atol=1e-6
    )


def refused(folder, *words):
    with pytest.raises(ModelError) as caught:
        load(folder)
    said = str(caught.value)
    assert said.startswith(f"{folder}: the adapter cannot be put into its model: ")
    assert all(word in said for word in words) and not said.endswith(":"), said


def change(folder, edit):
    weights = load_file(folder / WEIGHTS)
    edit(weights)
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


def test_an_adapter_of_resized_embeddings_says_both_sizes(base, tmp_path):
    adapt(base, tmp_path / "a", rows=11, target_modules=["q_proj"])
    refused(tmp_path / "a", "[11, 8]", "[8, 8]", "embeddings of another size")
    adapt(base, tmp_path / "b", rows=11, target_modules=["lm_head"])
    refused(tmp_path / "b", "[11, ", "[8, ", WEIGHTS)


def test_no_adapter_is_merged_whose_weights_are_not_its_models(base, tmp_path):
    adapt(base, tmp_path / "a", target_modules=["q_proj", "down_proj"])
    names = sorted(load_file(tmp_path / "a" / WEIGHTS))
    for name in names:
        for kind in ("remove", "rename", "reshape", "add"):
            folder = shutil.copytree(tmp_path / "a", tmp_path / f"{kind}-{name}")

            def edit(weights, name=name, kind=kind):
                found = weights[name]
                if kind in ("remove", "rename"):
                    del weights[name]
                if kind in ("rename", "add"):
                    weights[name.replace("layers.0", "layers.7")] = found.clone()
                if kind == "reshape":
                    weights[name] = torch.cat([found, found[:1]])

            change(folder, edit)
            refused(folder, name.rpartition(".lora")[2].partition(".")[2] or WEIGHTS)


def test_a_head_of_another_training_is_refused(base, tmp_path):
    """Trained on an untied model: put into a tied one, the last of the two would count for both."""
    adapt(base, tmp_path / "a", target_modules=["embed_tokens", "lm_head"])

    def edit(weights):
        weights["base_model.model.lm_head.base_layer.weight"] += 1

    change(tmp_path / "a", edit)
    refused(tmp_path / "a", "differ", "ties")


def test_kinds_that_are_no_weights_are_refused(base, tmp_path):
    from peft import PromptTuningConfig

    adapt(base, tmp_path / "a", kind=PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=2))
    refused(tmp_path / "a", "PROMPT_TUNING", "cannot be merged")
    adapt(base, tmp_path / "b", target_modules=["q_proj"])
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    config["target_modules"] = ["query"]
    (tmp_path / "b" / "adapter_config.json").write_text(json.dumps(config))
    refused(tmp_path / "b", "query", "not found")


def test_a_model_and_an_adapter_in_one_folder(base, tmp_path):
    adapt(base, tmp_path / "a", target_modules=["q_proj"])
    shutil.copytree(base, tmp_path / "a", dirs_exist_ok=True)
    with pytest.raises(ModelError, match="holds a model and an adapter"):
        load(tmp_path / "a")
