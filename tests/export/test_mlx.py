"""A folder for mlx-lm: transformers and mlx-lm read the model that was written."""

import json

import pytest
from test_gguf_file import CASES, PAIRS, SCALED, model_of, tokenizer_of

from conftest import jsonl, rows
from smoldpo.data.tokenize import Tokenization
from smoldpo.export import mlx, mlx_lm
from smoldpo.export.proof import Proof
from smoldpo.export.targets import Mlx
from smoldpo.export.verify import VerificationError
from smoldpo.utils.errors import ModelError, UsageError

installed = pytest.mark.skipif(not mlx_lm.is_installed(), reason="mlx-lm is not installed")


def proven(folder, model, tokenizer, kind="f32"):
    """The folder written and held against the model, as `smoldpo export` does."""
    mlx.write_mlx(folder, model, tokenizer, kind)
    proof = Proof.of(model, tokenizer, PAIRS, Tokenization(256))
    return Mlx().prove(folder, proof, kind)


@installed
@pytest.mark.parametrize("case", [case for case in CASES if "sharper" not in case])
def test_mlx_lm_computes_the_model(tmp_path, case):
    kind, settings = CASES[case]
    verified, witness = proven(tmp_path / "m", model_of(kind, **settings), tokenizer_of())
    assert verified.mean < 1e-6 and verified.greedy == 8
    assert witness.tokens > 16 and witness.mean < 1e-4, witness


@installed
def test_biases_go_along(tmp_path):
    model = model_of("llama", attention_bias=True, mlp_bias=True)
    assert proven(tmp_path / "m", model, tokenizer_of())[1].mean < 1e-4


@installed
@pytest.mark.parametrize("kind", ["f16", "bf16", "q8", "q4"])
def test_narrower_types(tmp_path, kind, monkeypatch):
    """Of a random model the log-probabilities are far apart, so the bounds are wider here."""
    for module in ("mlx", "verify"):
        monkeypatch.setattr(f"smoldpo.export.{module}.BOUNDS", {kind: 0.5})
    model = model_of("qwen3", tied=False, initializer_range=0.1)
    verified, witness = proven(tmp_path / "m", model, tokenizer_of(), kind)
    bound = {"q4": 0.3, "bf16": 0.05}.get(kind, 0.02)
    assert 0 < verified.mean < bound
    said = json.loads((tmp_path / "m" / "config.json").read_text())
    assert said.get("quantization", {}).get("bits") == {"q8": 8, "q4": 4}.get(kind)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert verified.greedy is not None and witness.mean < bound


def test_what_mlx_lm_looks_for_stands_at_the_top(tmp_path):
    model = model_of("llama", tied=False, rope_parameters=SCALED["llama3"])
    mlx.write_mlx(tmp_path, model, tokenizer_of(), "f32")
    said = json.loads((tmp_path / "config.json").read_text())
    assert said["rope_theta"] == 500000.0 and said["rope_scaling"]["factor"] == 32.0
    assert said["tie_word_embeddings"] is False


@installed
def test_a_base_that_is_not_said_is_found_out(tmp_path, monkeypatch):
    """What mlx-lm takes of a folder as transformers 5 writes it: a rotary base of 10,000."""
    monkeypatch.setattr("smoldpo.export.mlx.add_older_names", lambda folder: None)
    rope = {"rope_type": "default", "rope_theta": 500.0}
    with pytest.raises(VerificationError, match="is not the model: mean"):
        proven(tmp_path / "m", model_of("llama", rope_parameters=rope), tokenizer_of())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"rope_parameters": SCALED["yarn, sharper"]}, "attention_factor 1.5"),
        ({"rope_parameters": SCALED["linear"] | {"rope_type": "dynamic"}}, "'dynamic'"),
    ],
)  # fmt: skip
def test_models_that_it_computes_otherwise_are_refused(settings, says):
    with pytest.raises(ModelError, match=says):
        mlx.require_exportable(model_of("llama", **settings))


def test_types(monkeypatch):
    assert mlx.require_kind("BF16") == "bf16"
    with pytest.raises(UsageError, match=r"did you mean q8\?"):
        mlx.require_kind("q8_0")
    monkeypatch.setattr("smoldpo.export.mlx_lm.is_installed", lambda: False)
    with pytest.raises(UsageError, match="pip install mlx mlx-lm"):
        mlx.require_kind("q4")


def test_the_command(cli, tiny_folder, tmp_path):
    (tmp_path / "pairs.jsonl").write_text(jsonl(rows(3)))
    result = cli("export", tiny_folder, "--to", "mlx", "--data", "pairs.jsonl", "--json")
    assert result.code == 0, result.err
    said = json.loads(result.out)
    assert said["quantize"] == "f16" and "model.safetensors" in said["sha256"]
    assert (said["witness"] or {}).get("program") == ("mlx-lm" if mlx_lm.is_installed() else None)
    result = cli("export", tiny_folder, "--to", "mlx", "--data", "pairs.jsonl")
    assert result.code == 2 and "exists" in result.err
