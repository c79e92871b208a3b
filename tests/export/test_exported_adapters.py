"""Adapters without their model: what llama.cpp and mlx-lm add is what peft adds."""

import json

import gguf
import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_gguf_file import model_of, tokenizer_of

from conftest import jsonl, rows
from smoldpo.export import llama_cpp, mlx_lm

EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ARGUMENTS = ("--adapter", "--data", "pairs.jsonl", "--json", "--output")


@pytest.fixture
def adapter(tmp_path):
    """Writes a base model and an adapter of random weights, in peft's files."""
    (tmp_path / "pairs.jsonl").write_text(jsonl(rows(4)))

    def write(kind="llama", **settings):
        model, tokenizer = model_of(kind), tokenizer_of()
        for folder in ("base", "mine"):
            tokenizer.save_pretrained(tmp_path / folder)
        model.save_pretrained(tmp_path / "base")
        given = {"r": 4, "lora_alpha": 12, "target_modules": EVERY, "task_type": "CAUSAL_LM"}
        adapted = get_peft_model(model, LoraConfig(**given | settings))
        torch.manual_seed(1)
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.data.normal_(0, 0.2)
            if "magnitude" in name:
                weight.data *= 1.2
        adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        adapted.save_pretrained(tmp_path / "mine")
        return tmp_path / "mine"

    return write


CASES = {
    **{kind: (kind, {}) for kind in ("llama", "qwen2", "smollm3")},
    "some layers, rsLoRA": (
        "llama",
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], "use_rslora": True},
    ),
    "ranks of their own": (
        "llama",
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    ),
    "DoRA": ("llama", {"use_dora": True}),
}


@pytest.mark.parametrize("to", ["gguf", "mlx"])
@pytest.mark.parametrize("case", CASES)
def test_what_is_added_is_what_peft_adds(cli, tmp_path, adapter, case, to):
    kind, settings = CASES[case]
    folder = adapter(kind, **settings)
    name = "mine.gguf" if to == "gguf" else "out"
    result = cli("export", folder, "--to", to, *ARGUMENTS, name)
    if (case, to) == ("DoRA", "gguf"):
        assert result.code == 1 and "DoRA, which llama.cpp does not know" in result.err
        assert not (tmp_path / name).exists()
        return
    assert result.code == 0, result.err
    said = json.loads(result.out)
    assert said["verified"]["mean"] < 1e-4
    if (llama_cpp if to == "gguf" else mlx_lm).is_installed():
        assert said["witness"]["mean"] < 2e-4
    assert said["bytes"] < 80_000


def test_rows_of_another_order_are_found_out(cli, tmp_path, adapter, monkeypatch):
    monkeypatch.setattr("smoldpo.export.adapter_files.interleaved", lambda b, heads: b)
    result = cli("export", adapter(), "--to", "gguf", *ARGUMENTS, "mine.gguf")
    if llama_cpp.is_installed():
        assert result.code == 1 and "llama.cpp computes something else" in result.err
        assert not (tmp_path / "mine.gguf").exists()


def test_what_the_file_says(cli, tmp_path, adapter):
    assert cli("export", adapter(), "--to", "gguf", *ARGUMENTS, "mine.gguf").code == 0
    reader = gguf.GGUFReader(tmp_path / "mine.gguf")
    said = {name: field.contents() for name, field in reader.fields.items()}
    assert said["general.type"] == "adapter" and said["adapter.type"] == "lora"
    assert said["adapter.lora.alpha"] == 12.0 and said["general.architecture"] == "llama"
    names = {tensor.name for tensor in reader.tensors}
    assert {"blk.0.attn_q.weight.lora_a", "blk.1.ffn_down.weight.lora_b"} <= names


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--to", "gguf"), "holds a whole model, and no adapter"),
        (("--to", "ollama"), "takes no adapters"),
    ],
)
def test_what_is_no_adapter_is_said(cli, tiny_folder, words, says):
    result = cli("export", tiny_folder, *words, "--adapter")
    assert result.code == 2 and says in result.err


def test_a_runs_adapter(golden, tmp_path, cli):
    _, run = golden("export-lora", tmp_path, "--max-steps", "2", "--use-peft", "true")
    result = cli("export", run, "--to", "gguf", "--adapter", "--pairs", "2")
    assert result.code == 0, result.err
    assert (run / "export" / "run-adapter.gguf").is_file()
