"""llama.cpp reads what was written as we do: its token ids and log-probabilities."""

import pytest
from test_gguf_file import CASES, PAIRS, model_of, tokenizer_of

from conftest import CONTROL_TOKENS, jsonl, rows
from smoldpo.data.tokenize import Tokenization
from smoldpo.engine.autotune import KernelChoice
from smoldpo.export import llama_cpp
from smoldpo.export.gguf import About, write_gguf
from smoldpo.export.verify import VerificationError, measure
from smoldpo.models.gguf_tokenizer import WRITTEN

pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")


def witness(path, model, tokenizer, kind="f32"):
    write_gguf(path, model, tokenizer, kind, About("mine"))
    how, kernels = Tokenization(256), KernelChoice(False, False)
    measured = measure(model, tokenizer, PAIRS, how, kernels, CONTROL_TOKENS, "the model")
    return llama_cpp.ask(path, tokenizer, measured, kind, 1)


@pytest.mark.parametrize("case", CASES)
def test_log_probabilities_are_the_models(tmp_path, case):
    kind, settings = CASES[case]
    found = witness(tmp_path / "m.gguf", model_of(kind, **settings), tokenizer_of())
    assert found.tokens >= 32 and found.mean < 1e-3, found


@pytest.mark.parametrize("name", WRITTEN)
def test_token_ids_are_the_tokenizers(tmp_path, name):
    tokenizer = tokenizer_of(name, ignore_merges=name in ("llama-bpe", "tekken"))
    witness(tmp_path / "m.gguf", model_of("llama"), tokenizer)


def test_rows_of_another_order_are_found_out(tmp_path, monkeypatch):
    monkeypatch.setattr("smoldpo.export.gguf.INTERLEAVED", set())
    with pytest.raises(VerificationError, match="computes something else"):
        witness(tmp_path / "m.gguf", model_of("llama"), tokenizer_of())


def test_a_file_that_it_cannot_load(tmp_path):
    tokenizer, model = tokenizer_of(), model_of("llama")
    how, kernels = Tokenization(256), KernelChoice(False, False)
    measured = measure(model, tokenizer, PAIRS, how, kernels, CONTROL_TOKENS, "the model")
    (tmp_path / "m.gguf").write_bytes(b"GGUF, but no more")
    with pytest.raises(VerificationError, match="does not load"):
        llama_cpp.ask(tmp_path / "m.gguf", tokenizer, measured, "f32", 1)


def test_the_command_says_what_it_found(cli, tiny_folder, tmp_path):
    (tmp_path / "pairs.jsonl").write_text(jsonl(rows(3)))
    result = cli("export", tiny_folder, "--to", "gguf", "--data", "pairs.jsonl")
    assert result.code == 0 and "; llama.cpp: token ids equal" in result.err, result.err
