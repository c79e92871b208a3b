"""smoldpo export: from a run or a folder to a proven file, whole or not at all."""

import json
import shutil

import pytest
from test_gguf_file import model_of, tokenizer_of

from conftest import jsonl, rows
from smoldpo.training.run_folder import make_folder

ARGUMENTS = ("--to", "gguf", "--pairs", "4")


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(jsonl(rows(6)))
    return path


def files(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "pairs.jsonl")


def test_a_run_goes_and_is_proven_on_what_it_held_out(golden, tmp_path, cli):
    said, run = golden("export", tmp_path, "--max-steps", "2")
    result = cli("export", run, *ARGUMENTS, "--quantize", "q8_0")
    assert result.code == 0, result.err
    file = run / "export" / "run-q8_0.gguf"
    assert result.out.strip() == str(file)
    assert "q8_0: 0 MB, token ids equal, mean |Δ log p| 0.0" in result.err
    (row,) = json.loads((run / "exports.json").read_text())
    assert row["file"] == str(file) and row["bytes"] == file.stat().st_size
    assert row["verified"]["pairs"] == 4 and 0 < row["verified"]["mean"] < 0.1
    report = (run / "report.html").read_text()
    assert str(file) in report and row["sha256"]["run-q8_0.gguf"] in report
    answer = cli("chat", file, "--prompt", "Is 3 a number?", "--max-new-tokens", "4")
    assert answer.code == 0, answer.err
    result = cli("export", run, *ARGUMENTS, "--quantize", "q8_0", "--json", "--overwrite")
    assert json.loads(result.out)["sha256"] == row["sha256"], "the same file again"
    assert len(json.loads((run / "exports.json").read_text())) == 1
    assert said


def test_a_run_that_is_replaced_takes_its_exports_along(golden, tmp_path, cli):
    _, run = golden("export", tmp_path, "--max-steps", "2")
    assert cli("export", run, *ARGUMENTS, "--quantize", "q8_0").code == 0
    make_folder(run)  # as `train --overwrite` does
    assert not (run / "exports.json").exists() and not (run / "export").exists()


def test_what_was_exported_is_evaluated_as_the_model_is(cli, tiny_folder, pairs):
    result = cli("export", tiny_folder, *ARGUMENTS, "--quantize", "f32", "--data", pairs,
                 "--output", "mine.gguf")  # fmt: skip
    assert result.code == 0, result.err
    figures = [
        json.loads(cli("evaluate", name, pairs, "--json", "--engine", "plain").out)["accuracy"]
        for name in (tiny_folder, "mine.gguf")
    ]
    assert figures[0] == figures[1]


def test_model_and_file_are_compared_where_rows_have_no_token(cli, tmp_path, pairs):
    """As Qwen's have: its tokenizer has fewer tokens than the model rows."""
    tokenizer_of().save_pretrained(tmp_path / "mine")
    model_of("qwen2", 448).save_pretrained(tmp_path / "mine")
    words = (*ARGUMENTS, "--quantize", "f32", "--data", pairs, "--output", "mine.gguf")
    assert cli("export", "mine", *words).code == 0
    result = cli("evaluate", "mine", "mine.gguf", pairs, "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert found["before"]["accuracy"]["logp"] == found["after"]["accuracy"]["logp"]


def test_an_adapter_is_merged(golden, tmp_path, cli):
    _, run = golden("export-lora", tmp_path, "--max-steps", "2", "--use-peft", "true")
    result = cli("export", run, *ARGUMENTS, "--quantize", "f32")
    assert result.code == 0, result.err
    assert "mean |Δ log p| 0 nats" in result.err


def test_lm_studio_finds_the_file_by_publisher_and_model(cli, tiny_folder, tmp_path, pairs):
    words = ("--to", "lmstudio", "--quantize", "q8_0", "--data", pairs, "--output", "models")
    assert cli("export", tiny_folder, *words).code == 0
    (file,) = (tmp_path / "models").rglob("*.gguf")
    name = tiny_folder.name
    assert str(file.relative_to(tmp_path)) == f"models/smoldpo/{name}/{name}-q8_0.gguf"


def test_a_file_that_is_there_stays(cli, tiny_folder, tmp_path, pairs):
    (tmp_path / "mine.gguf").write_text("mine")
    words = ("export", tiny_folder, *ARGUMENTS, "--data", pairs, "--output", "mine.gguf")
    result = cli(*words)
    assert result.code == 2 and "mine.gguf: exists" in result.err
    assert (tmp_path / "mine.gguf").read_text() == "mine"
    assert cli(*words, "--overwrite").code == 0
    assert (tmp_path / "mine.gguf").read_bytes()[:4] == b"GGUF"


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--quantize", "q4_k_m"], 2, "llama-quantize"),
        (["--quantize", "f23"], 2, "f32"),
        (["--output", "mine.bin"], 2, ".gguf"),
        (["--output", "no/folder/mine.gguf"], 2, "does not exist"),
        (["--to", "ggml"], 2, "give one of gguf"),
        (["--data", "nowhere.jsonl"], 2, "nowhere.jsonl"),
    ],
)
def test_what_cannot_be_is_said_at_once(cli, tiny_folder, tmp_path, words, code, says):
    given = {"--to": "gguf"} | dict(zip(words[::2], words[1::2], strict=True))
    result = cli("export", tiny_folder, *[word for pair in given.items() for word in pair])
    assert (result.code, says in result.err) == (code, True), result.err
    assert not list(tmp_path.rglob("*.gguf"))


def test_a_run_without_a_model_says_how_to_finish_it(golden, tmp_path, cli):
    _, run = golden("export", tmp_path, "--max-steps", "2")
    shutil.rmtree(run / "model")
    result = cli("export", run, *ARGUMENTS)
    assert result.code == 1 and f"smoldpo resume {run}" in result.err


def test_a_type_that_cannot_go_names_those_that_can(cli, tmp_path, pairs, tiny_tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path / "gpt2"
    size = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": len(tiny_tokenizer)}
    GPT2LMHeadModel(GPT2Config(**size)).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    result = cli("export", folder, *ARGUMENTS, "--data", pairs)
    assert result.code == 1 and "'gpt2' cannot be exported" in result.err
    assert files(tmp_path) == ["gpt2"]


@pytest.mark.parametrize("what", ["no room", "a full disk", "another model"])
def test_nothing_half_written_is_left(cli, tiny_folder, tmp_path, pairs, monkeypatch, what):
    """A disk's free bytes, and what a write or a check says, are all that is made up here."""
    if what == "no room":
        monkeypatch.setattr("smoldpo.utils.files.free_bytes", lambda folder: 1000)
    elif what == "a full disk":
        import resource

        def limited(*args):
            limit = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limit[1]))
            try:
                return write(*args)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limit)

        from smoldpo.export.gguf import write_gguf as write

        monkeypatch.setattr("smoldpo.export.targets.write_gguf", limited)
    else:
        monkeypatch.setattr("smoldpo.export.gguf.INTERLEAVED", set())
    (tmp_path / "mine.gguf").write_text("old")
    result = cli("export", tiny_folder, *ARGUMENTS, "--data", pairs, "--output", "mine.gguf",
                 "--overwrite", "--quantize", "f32")  # fmt: skip
    says = {
        "no room": "not enough disk space",
        "a full disk": "the disk is full",
        "another model": "the file is not the model",
    }
    assert result.code == 1 and says[what] in result.err, result.err
    assert "Traceback" not in result.err
    assert files(tmp_path) == ["mine.gguf"] and (tmp_path / "mine.gguf").read_text() == "old"


@pytest.mark.real
def test_the_builtin_model(cli, tmp_path, pairs):
    result = cli("export", "builtin", *ARGUMENTS, "--quantize", "q8_0", "--data", pairs)
    assert result.code == 0, result.err
    assert "q8_0: 145 MB, token ids equal" in result.err
    assert files(tmp_path) == ["SmolLM2-135M-Instruct-q8_0.gguf"]
