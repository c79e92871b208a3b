"""`--nproc` and torchrun: real launches with two gloo ranks, as docs/scale.md has them."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import yaml

from conftest import ROOT, rows
from smoldpo.cli.launch import take_nproc, take_option
from smoldpo.utils.errors import UsageError

PAGE = (ROOT / "docs" / "scale.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
LINES = [line for block in BLOCKS for line in block.splitlines()]
EXAMPLES = sorted((ROOT / "examples" / "scale").iterdir())
QUICK = {
    "freeze_layers": 2, "dtype": "float32", "device": "cpu", "compile": "off", "max_steps": 2,
    "eval_fraction": 0, "sample_prompt": None, "generate_prompts": 0, "save_steps": 1,
    "per_device_train_batch_size": 4,
}  # fmt: skip


def line_of(program):
    """The words of the page's line that trains on one machine, behind the program."""
    (line,) = [
        line
        for line in LINES
        if line.startswith(f"{program} ") and " train " in line and "--nnodes" not in line
    ]
    return shlex.split(line)[1:]


def test_nproc_is_taken_out_of_a_commands_words():
    assert take_nproc(["a.yaml", "--nproc", "4", "--beta", "1"]) == (["a.yaml", "--beta", "1"], 4)
    assert take_nproc(["--nproc=2"]) == ([], 2) and take_nproc(["--beta", "1"])[1] is None
    assert take_option(["--x"], "--x") == ([], "")
    for words in (["--nproc"], ["--nproc", "0"], ["--nproc=two"]):
        with pytest.raises(UsageError, match="number of processes"):
            take_nproc(words)


def test_nproc_is_torchruns_line(monkeypatch, cli):
    """Both lines of the page ask torchrun for the same; it is not started twice here."""
    from torch.distributed import run as torchrun

    asked = []
    monkeypatch.setattr(torchrun, "main", asked.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "60")
    assert cli(*line_of("smoldpo")).code == 0
    ours, theirs = map(torchrun.get_args_parser().parse_args, (*asked, line_of("torchrun")))
    for name in ("standalone", "nproc_per_node", "module", "training_script"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.training_script_args == theirs.training_script_args and ours.max_restarts == 0


@pytest.mark.runs
def test_torchruns_line_of_the_page(tmp_path, tiny_folder, write_rows):
    """The page's own command, with settings that make it short."""
    write_rows(rows(12))
    (tmp_path / "quick.yaml").write_text(yaml.safe_dump(QUICK | {"model": str(tiny_folder)}))
    words = [sys.executable, "-m", "torch.distributed.run", *line_of("torchrun")]
    words.insert(words.index("train") + 1, "quick.yaml")
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(
        words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Run folder: runs/mine") == 1, "one rank speaks"
    about = json.loads((tmp_path / "runs" / "mine" / "environment.json").read_text())
    assert about["ranks"] == 2
    assert (tmp_path / "runs" / "mine" / "model" / "model.safetensors").is_file()


def test_every_example_is_what_it_says():
    """Parsed; torchrun's words are its own, and smoldpo's verbs are there."""
    from torch.distributed.run import get_args_parser

    assert {path.name for path in EXAMPLES} == set(re.findall(r"examples/scale/([\w.]+)\)", PAGE))
    for path in EXAMPLES:
        text = path.read_text()
        if path.suffix == ".yaml":
            assert isinstance(yaml.safe_load(text), dict), path
        else:
            subprocess.run(["bash", "-n", str(path)], check=True)
        joined = text.replace("\\\n", " ")
        (line,) = [each for each in joined.splitlines() if "torchrun -" in each]
        words = shlex.split(re.sub(r"\$\{?\w+(\[@\])?\}?", "2", line.partition("torchrun ")[2]))
        known = get_args_parser().parse_args(words)
        assert known.module and known.training_script == "smoldpo"
        assert ("resume.json" in text and " resume " in text) or "(resume" in text


def test_what_does_not_run_on_ranks_says_so(cli, monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    for words in (["plan"], ["sweep"], ["doctor"], ["export", "builtin", "--to", "gguf"]):
        result = cli(*words)
        assert result.code == 2 and "does not run on several ranks yet" in result.err
        assert result.err.startswith("rank 1: error")
