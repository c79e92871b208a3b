"""A tokenizer with more ids than its model has rows: harmless, until one of them comes up."""

import json

import pytest
import torch
from transformers import AutoTokenizer, LlamaForSequenceClassification

import smoldpo
from conftest import CHAT_TEMPLATE
from smoldpo.evaluation.judges import parse_judge
from smoldpo.models.load import find_model, load_model
from smoldpo.models.token_rows import require_rows, token_rows
from smoldpo.types import PreferencePair
from smoldpo.utils.errors import ModelError


def larger(tiny_folder, folder, template=None, **more):
    """The tiny model with one token added to its tokenizer alone, which a template may use."""
    model = load_model(find_model(str(tiny_folder)), torch.float32)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder, **more)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|extra|>"]})
    tokenizer.chat_template = template or CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    assert len(tokenizer) == token_rows(model) + 1
    return folder


@pytest.fixture
def used(tiny_folder, tmp_path):
    return larger(tiny_folder, tmp_path / "used", "{{ '<|extra|>' }}" + CHAT_TEMPLATE)


def test_an_extra_token_that_never_comes_up_is_harmless(cli, tiny_folder, tmp_path, pairs_file):
    folder = larger(tiny_folder, tmp_path / "unused")
    result = cli("evaluate", folder, pairs_file, "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)
    assert cli("chat", folder, "--prompt", "<|extra|>", "--max-new-tokens", "2").code == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "--model", "{m}", "--data", "{data}", "--output-dir", "out"),
        ("evaluate", "{m}", "{data}"),
        ("chat", "{m}", "--prompt", "Hello", "--max-new-tokens", "2"),
    ],
    ids=["train", "evaluate", "chat"],
)
def test_a_template_that_uses_it_is_refused_before_anything_is_computed(
    cli, used, pairs_file, arguments, monkeypatch
):
    def computed(*_, **__):
        raise AssertionError("computed")

    monkeypatch.setattr("torch.nn.functional.embedding", computed)
    result = cli(*(word.format(m=used, data=pairs_file) for word in arguments))
    assert result.code == 1 and result.out == ""
    assert "the tokenizer has 3" in result.err and "'<|extra|>'" in result.err


def test_judges_and_the_library_refuse_alike(used, tiny_folder, tmp_path):
    with pytest.raises(ModelError, match=r"'<\|extra\|>'"):
        parse_judge(f"implicit:{used},{used}").compare("Hi", "a", "b")
    model = load_model(find_model(str(used)), torch.float32)
    with pytest.raises(ModelError, match=r"'<\|extra\|>'"):
        smoldpo.sequence_logps(
            model, [PreferencePair("Hi", "a", "b")], AutoTokenizer.from_pretrained(used)
        )
    config = type(model.config)(**model.config.to_dict() | {"num_labels": 1})
    LlamaForSequenceClassification(config).save_pretrained(used)
    with pytest.raises(ModelError, match=r"'<\|extra\|>'"):
        parse_judge(f"reward:{used}").compare("Hi", "a", "b")


def test_the_end_of_turn_of_a_plain_model_needs_a_row_too(tiny_folder, tmp_path, cli, write_rows):
    folder = larger(tiny_folder, tmp_path / "plain", eos_token="<|extra|>")
    (folder / "chat_template.jinja").unlink()
    data = write_rows([{"prompt": "a", "chosen": f"b {n}", "rejected": "c"} for n in range(9)])
    result = cli("evaluate", folder, data)
    assert result.code == 1 and "'<|extra|>'" in result.err


def test_the_rows_are_those_of_embeddings_and_head(tiny_model, tiny_tokenizer):
    rows = token_rows(tiny_model)
    require_rows(tiny_tokenizer, rows, [[], [rows - 1]])
    tiny_model.lm_head.weight = torch.nn.Parameter(tiny_model.lm_head.weight[:-1].clone())
    assert token_rows(tiny_model) == rows - 1
    with pytest.raises(ModelError, match=f"id {rows - 1}"):
        require_rows(tiny_tokenizer, rows - 1, [[0], [3, rows - 1]])
