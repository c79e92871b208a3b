"""Ollama's template says what the chat template says, on every dialogue, or is refused."""

import json
from importlib.resources import files

import pytest
from test_gguf_file import model_of, tokenizer_of

from conftest import CHAT_TEMPLATE, jsonl, rows
from smoldpo.data.chat_template import TemplateSettings
from smoldpo.export.go_template import literal, render
from smoldpo.export.ollama import dialogues, modelfile, ollama_template, parameters
from smoldpo.utils.errors import ModelError

SMOLLM2 = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are SmolLM {{ x }}.<|im_end|>\\n' }}{% endif %}"
    + CHAT_TEMPLATE.split("%}", 1)[1].replace("message", "m")
)
QUESTION = {"role": "user", "content": "Why?"}


def derived(template):
    tokenizer = tokenizer_of()
    tokenizer.chat_template = template
    return ollama_template(tokenizer, TemplateSettings())


def test_go_templates_by_hand():
    """What Go 1.27's text/template gives for these."""
    text = (
        'a{{ range $i, $m := .Messages }}{{ if and (eq $i 0) (ne $m.Role "system") }}first '
        '{{ else if eq $m.Role "user" }}you: {{ $m.Content }}{{ else }}{{ $m.Role }}'
        '{{ end }};{{ end }}{{ "{{ \\n" }}}}'
    )
    said = [("user", "x"), ("user", "y"), ("assistant", "{{ z }}"), ("user", "%}")]
    messages = [{"role": role, "content": content} for role, content in said]
    assert render(text, messages) == "afirst ;assistant;you: %};{{ \n}}"
    assert (
        render("{{ range $i, $m := .Messages }}{{ $m.Content }}{{ end }}", messages[:2]) == "x\n\ny"
    )
    assert render(literal("{{ x }}"), []) == "{{ x }}"
    for wrong in ("{{ .System }}", "{{ eq 1 }}", "{{ if eq 1 1 }}", '{{ eq 1 1 "x" ) }}'):
        with pytest.raises(Exception, match=r"."):
            render(wrong, messages)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, SMOLLM2])
def test_the_template_is_the_chat_template(template):
    found = derived(template)
    assert (found.dialogues, found.trims) == (64, False)
    assert ("You are SmolLM" in render(found.text, [QUESTION])) is (template == SMOLLM2)


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3"])
def test_published_templates(name):
    found = derived((files("trl") / "chat_templates" / f"{name}.jinja").read_text())
    assert found.dialogues == 64
    assert found.trims is (name == "llama3")


def test_a_bos_that_ollama_puts_there_itself_is_left_out():
    tokenizer = tokenizer_of(bos=True)
    tokenizer.chat_template = "{{ bos_token }}" + CHAT_TEMPLATE.replace("<|im_start|>", "##")
    found = ollama_template(tokenizer, TemplateSettings())
    assert render(found.text, [QUESTION]) == "##user\nWhy?<|im_end|>\n##assistant\n"
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|im_start|>", "##")
    with pytest.raises(ModelError, match=r"does not begin with <\|im_start\|>"):
        ollama_template(tokenizer, TemplateSettings())


REFUSED = {
    "no template": (None, "no chat template"),
    "the day": ("{{ strftime_now('%d') }}" + CHAT_TEMPLATE, "writes the day"),
    "numbered turns": (
        CHAT_TEMPLATE.replace("+ '\\n' + message", "+ (loop.index | string) + message"),
        "depends on the others",
    ),
    "long answers are cut": (
        CHAT_TEMPLATE.replace("message['content']", "message['content'][:19]"),
        r"of a dialogue of user it writes '.*return \{<.*Ollama's would write",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_said_is_refused_with_the_difference(case):
    template, says = REFUSED[case]
    with pytest.raises(ModelError, match=says):
        derived(template)


def test_dialogues_are_of_all_shapes():
    every = list(dialogues())
    assert len(every) == 64 and {len(messages) for messages in every} >= {1, 2, 3, 9, 10}
    assert len({json.dumps(messages) for messages in every}) == 64


def test_the_modelfile():
    model, tokenizer = model_of("llama"), tokenizer_of()
    model.generation_config.eos_token_id = [2, 0]
    text = modelfile("m.gguf", model, tokenizer, "{{ x }}\n", "apache-2.0")
    assert text.splitlines() == [
        "FROM ./m.gguf", 'TEMPLATE """{{ x }}', '"""', 'PARAMETER stop "<|endoftext|>"',
        'PARAMETER stop "<|im_end|>"', "PARAMETER temperature 0", "PARAMETER repeat_penalty 1",
        'LICENSE """apache-2.0"""',
    ]  # fmt: skip
    settings = {"do_sample": True, "top_p": 0.9, "repetition_penalty": 1.2, "max_new_tokens": 64}
    model.generation_config.update(**settings)
    assert parameters(model) == {
        "temperature": 1.0, "top_k": 50, "top_p": 0.9, "repeat_penalty": 1.2, "num_predict": 64,
    }  # fmt: skip
    with pytest.raises(ModelError, match="three quotes"):
        modelfile("m.gguf", model, tokenizer, 'a """', None)


@pytest.mark.parametrize("answer", ["absent", "takes it", "refuses"])
def test_the_command(cli, tiny_folder, tmp_path, monkeypatch, answer):
    """A shell script stands for Ollama's program."""
    (tmp_path / "pairs.jsonl").write_text(jsonl(rows(3)))
    (tmp_path / "bin").mkdir()
    if answer != "absent":
        does = f'echo "$@" > {tmp_path}/asked; echo no server >&2; exit {int(answer == "refuses")}'
        (tmp_path / "bin" / "ollama").write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / "bin" / "ollama").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    words = ("--to", "ollama", "--data", "pairs.jsonl", "--output", "mine")
    result = cli("export", tiny_folder, *words)
    assert result.code == int(answer == "refuses"), result.err
    name = tiny_folder.name
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == [
        "Modelfile",
        f"{name}-f16.gguf",
    ]
    if answer == "refuses":
        assert "is whole and proven, but `ollama create" in result.err and "no server" in result.err
    else:
        assert "renders 64 dialogues as the chat template does" in result.err
    if answer != "absent":
        asked = (tmp_path / "asked").read_text().split()
        assert asked == ["create", name, "-f", "mine/Modelfile"]
