"""Smaller types by llama-quantize: a program of this name on the PATH does what the test says."""

import pytest

from conftest import jsonl, rows

GIVES = {
    "a file": ('cp "$1" "$2"; echo "$3" > asked', 0, "q4_k_m: 0 MB, token ids equal"),
    "an error": ("echo main: no such type; exit 3", 1, "llama-quantize did not write q4_k_m: main"),
    "no model": ('printf GGUF > "$2"', 1, "cannot be read as a GGUF model"),
}


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Writes a shell script that is found as llama-quantize."""

    def write(script):
        folder = tmp_path / "bin"
        folder.mkdir()
        (folder / "llama-quantize").write_text(f"#!/bin/sh\n{script}\n")
        (folder / "llama-quantize").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    return write


@pytest.mark.parametrize("case", GIVES)
def test_a_smaller_type_is_made_and_proven(cli, tiny_folder, tmp_path, program, case):
    script, code, says = GIVES[case]
    program(script)
    (tmp_path / "pairs.jsonl").write_text(jsonl(rows(3)))
    result = cli("export", tiny_folder, "--to", "gguf", "--quantize", "Q4_K_M", "--data",
                 "pairs.jsonl", "--output", "mine.gguf")  # fmt: skip
    assert result.code == code and says in result.err, result.err
    assert (tmp_path / "mine.gguf").exists() is (code == 0)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    if code == 0:
        assert (tmp_path / "asked").read_text() == "Q4_K_M\n"
