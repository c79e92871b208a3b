"""smoldpo from Python: light to import, equal to the command line, good manners in its host."""

import ast
import dataclasses
import importlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch

import smoldpo
from conftest import ROOT, rows
from smoldpo.utils import progress

QUICK = {
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "dtype": "float32",
    "generate_prompts": 0,
    "sample_prompt": "none",
    "freeze_layers": 2,
    "max_steps": 3,
}
ANSWERS = {"generate_prompts": 2, "max_new_tokens": 2, "sample_prompt": "Hello"}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, tmp_path_factory, monkeypatch):
    """An empty folder, and a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def metrics(folder):
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


# The package


def test_import_is_light_and_names_are_where_they_say():
    code = (
        "import sys, smoldpo\n"
        "dir(smoldpo); smoldpo.__version__; smoldpo.SmoldpoError; smoldpo.PreferencePair\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pydantic', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert set(smoldpo.__all__) == set(smoldpo._HOMES) | {"__version__"}
    for name, home in smoldpo._HOMES.items():
        assert getattr(smoldpo, name) is getattr(importlib.import_module(home), name)


def test_no_public_name_is_a_modules():
    modules = {path.stem for path in (ROOT / "smoldpo").iterdir()}
    assert not modules & set(smoldpo.__all__)


def test_type_checkers_see_every_name():
    text = (ROOT / "smoldpo" / "__init__.py").read_text()
    seen = text.partition("if TYPE_CHECKING:\n")[2].partition("\n_HOMES")[0]
    imports = ast.parse(textwrap.dedent(seen)).body
    names = {(node.module, alias.name) for node in imports for alias in node.names}
    assert names == {(home, name) for name, home in smoldpo._HOMES.items()}
    assert (ROOT / "smoldpo" / "py.typed").exists()
    assert '"py.typed"' in (ROOT / "pyproject.toml").read_text()


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        smoldpo.trian  # noqa: B018


def test_public_docstrings_name_arguments_and_errors():
    for name in ("train", "evaluate", "load_pairs", "dpo_loss", "sequence_logps"):
        text = getattr(smoldpo, name).__doc__
        assert "Args:" in text and "Raises:" in text, name


# Runs


def test_train_is_the_command(cli, tiny_folder, pairs_file, capsys, tmp_path):
    settings = QUICK | ANSWERS | {"model": str(tiny_folder), "data": str(pairs_file)}
    said = [
        part for key, value in settings.items() for part in (f"--{key.replace('_', '-')}", value)
    ]
    assert cli("train", *said, "--output-dir", "command").code == 0
    result = smoldpo.train(output_dir="library", **settings)
    assert metrics(result.folder) == metrics("command")
    assert result.steps == 3 and result.evaluation["headline"].startswith("The tuned model")
    assert result.report.exists() and result.sample["policy"] is not None
    out, err = capsys.readouterr()
    assert out == "" and "trains:" in err


def test_every_form_of_configuration(tiny_folder, pairs_file, tmp_path):
    settings = QUICK | {"model": str(tiny_folder), "data": str(pairs_file), "seed": 7}
    whole = smoldpo.train(settings, output_dir="a", verbose=False)
    typed = smoldpo.TrainConfig(**settings | {"data": [str(pairs_file)], "seed": 1})
    smoldpo.train(typed, seed=7, output_dir="b", verbose=False)
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps({key.replace("_", "-"): v for key, v in settings.items()}))
    smoldpo.train(path, output_dir=Path("c"), data=pairs_file, verbose=False)
    smoldpo.train(str(path), output_dir="d", data=[pairs_file], verbose=False)
    for name in ("b", "c", "d"):
        assert metrics(name) == metrics(whole.folder), name
    assert typed.seed == 1, "what was handed over is not changed"


def test_pairs_in_memory_train_as_those_of_a_file(cli, tiny_folder, pairs_file):
    settings = QUICK | {"model": str(tiny_folder)}
    file = smoldpo.train(data=pairs_file, output_dir="file", verbose=False, **settings)
    given = smoldpo.train(data=rows(40), output_dir="given", verbose=False, **settings)
    typed = smoldpo.train(
        data=smoldpo.load_pairs(pairs_file), output_dir="typed", verbose=False, **settings
    )
    assert metrics(file.folder) == metrics(given.folder) == metrics(typed.folder)
    # The run is whole: it can be resumed, and replaced by another.
    assert cli("resume", "given", "--extend", 1).code != 0  # max_steps
    assert "cannot be extended" in cli("resume", "given", "--extend", 1).err
    with pytest.raises(smoldpo.UsageError, match="already holds a run"):
        smoldpo.train(data=rows(8), output_dir="given", verbose=False, **settings)
    (file,) = Path("given/given").iterdir()
    assert len(file.read_text().splitlines()) == 40
    smoldpo.train(
        data=rows(40)[:30], eval_data=rows(40)[30:], output_dir="given", overwrite=True,
        verbose=False, **settings,
    )  # fmt: skip
    lengths = [len(path.read_text().splitlines()) for path in sorted(Path("given/given").iterdir())]
    assert lengths == [10, 30], "of the eval and the data of this run, and no others"
    smoldpo.train(data=pairs_file, output_dir="given", overwrite=True, verbose=False, **settings)
    assert not Path("given/given").exists()


def test_a_run_over_pairs_in_memory_can_be_resumed(cli, tiny_folder):
    settings = QUICK | {"model": str(tiny_folder), "max_steps": None, "num_train_epochs": 1}
    smoldpo.train(data=rows(40), output_dir="run", save_steps=2, verbose=False, **settings)
    result = cli("resume", "run", "--extend", 1)
    assert result.code == 0, result.err


def test_a_call_that_fails_leaves_what_it_found(cli, tiny_folder):
    settings = QUICK | {"model": str(tiny_folder), "verbose": False}
    smoldpo.train(data=rows(40), output_dir="deep/run", save_steps=1, **settings)
    Path("deep/run/given/mine.jsonl").write_text("of somebody")
    before = {path: path.read_bytes() for path in Path("deep").rglob("*") if path.is_file()}
    for wrong in (
        {"model": "nowhere"},
        {"data": [{"nothing": "here"}]},
        {"eval_data": [{"prompt": "a"}, 3]},
    ):
        call = settings | {"data": rows(30), "overwrite": True} | wrong
        with pytest.raises(smoldpo.SmoldpoError):
            smoldpo.train(output_dir="deep/run", **call)
        after = {path: path.read_bytes() for path in Path("deep").rglob("*") if path.is_file()}
        assert after == before, wrong
        with pytest.raises(smoldpo.SmoldpoError):
            smoldpo.train(output_dir="another/run", **call)
        assert not Path("another").exists(), wrong
    with pytest.raises(smoldpo.SmoldpoError):  # the same pairs: what the run reads stays
        smoldpo.train(
            data=rows(40), output_dir="deep/run", overwrite=True, **settings | {"model": "x"}
        )
    assert {path: path.read_bytes() for path in before} == before


def test_an_interrupted_run_keeps_its_pairs(cli, tiny_folder, monkeypatch):
    kill_at_step(monkeypatch, signal.SIGINT)
    with pytest.raises(smoldpo.InterruptedRunError):
        smoldpo.train(
            data=rows(40), model=str(tiny_folder), output_dir="run", verbose=False, **QUICK
        )
    result = cli("resume", "run")
    assert result.code == 0, result.err


def test_settings_are_checked_with_the_pairs_in_memory_counted_in(tiny_folder, pairs_file):
    settings = QUICK | {"model": str(tiny_folder), "verbose": False, "max_steps": 2}
    held_out = smoldpo.train(
        data=pairs_file,
        eval_data=rows(8),
        eval_fraction=0,
        eval_steps=1,
        output_dir="a",
        **settings,
    )
    assert held_out.evaluation["headline"]
    smoldpo.train(
        data=rows(40)[:30], eval_data=rows(40)[30:], data_weights=[1], output_dir="b", **settings
    )
    with pytest.raises(smoldpo.ConfigError, match="2 numbers for 1 source"):
        smoldpo.train(data=rows(8), data_weights=[1, 2], output_dir="c", **settings)
    assert not Path("c").exists()


def test_a_run_from_python_has_no_command(cli, tiny_folder, pairs_file):
    settings = QUICK | {"model": str(tiny_folder), "max_steps": 1}
    result = smoldpo.train(data=pairs_file, output_dir="ours", verbose=False, **settings)
    assert "command" not in json.loads((result.folder / "environment.json").read_text())
    page = result.report.read_text()
    assert "The command that was given" not in page and "smoldpo train config.yaml" in page
    said = [
        part for key, value in settings.items() for part in (f"--{key.replace('_', '-')}", value)
    ]
    assert cli("train", *said, "--data", pairs_file, "--output-dir", "theirs").code == 0
    assert json.loads(Path("theirs/environment.json").read_text())["command"][0] == "smoldpo"
    assert "The command that was given" in Path("theirs/report.html").read_text()


def test_a_refused_pair_leaves_the_file_as_it_was(tmp_path):
    from smoldpo.api.pairs import write_in_memory_pairs
    from smoldpo.types import PairNumbers

    plain, own = (
        smoldpo.PreferencePair("a", "b", "c", numbers=numbers)
        for numbers in (PairNumbers(), PairNumbers(beta=0.5))
    )
    path = tmp_path / "pairs.jsonl"
    assert write_in_memory_pairs([own, own], path) == ["beta"]
    before = path.read_text()
    with pytest.raises(smoldpo.UsageError, match="pair 2 has no beta of its own"):
        write_in_memory_pairs([own, plain], path)
    assert path.read_text() == before


def test_numbers_of_pairs_in_memory_reach_the_loss(tiny_folder, write_rows):
    from smoldpo.types import PairNumbers

    settings = QUICK | {"model": str(tiny_folder), "verbose": False}
    file = write_rows([row | {"weight": 1 + n % 3} for n, row in enumerate(rows(40))])
    smoldpo.train(data=file, columns="weight=weight", output_dir="file", **settings)
    pairs = [
        smoldpo.PreferencePair(
            row["prompt"], row["chosen"], row["rejected"], numbers=PairNumbers(1 + n % 3)
        )
        for n, row in enumerate(rows(40))
    ]
    assert [pair.numbers.weight for pair in smoldpo.load_pairs(pairs[:4])] == [1, 2, 3, 1]
    smoldpo.train(data=pairs, output_dir="given", **settings)
    ours, theirs = metrics("given"), metrics("file")
    assert ours[1]["loss"] == theirs[1]["loss"] != pytest.approx(0.6931, abs=1e-3)
    mixed = [pairs[0], smoldpo.PreferencePair("a", "b", "c", numbers=PairNumbers(beta=0.5))]
    with pytest.raises(smoldpo.UsageError, match="no beta of its own"):
        smoldpo.train(data=mixed, output_dir="mixed", **settings)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "the list is empty"),
        ([{"prompt": "a"}, 3], "item 2 is int"),
        ([{"prompt": float("nan")}], "row 1 cannot be written as JSON"),
        ([{"nothing": "here"}], "row 1"),
    ],
)
def test_wrong_pairs_in_memory(data, said, tiny_folder):
    with pytest.raises(smoldpo.SmoldpoError, match=said):
        smoldpo.train(data=data, model=str(tiny_folder), output_dir="run", verbose=False)


def test_wrong_settings_are_all_said_at_once():
    with pytest.raises(smoldpo.ConfigError) as caught:
        smoldpo.train(bta=0.2, learning_rate=-1)
    assert len(caught.value.problems) == 2 and "did you mean beta" in str(caught.value)
    with pytest.raises(smoldpo.UsageError, match="config is int"):
        smoldpo.train(3)


# Inside another program


def test_silence_is_silence_and_ends(tiny_folder, pairs_file, capfd):
    settings = QUICK | ANSWERS | {"model": str(tiny_folder), "data": pairs_file}
    smoldpo.train(verbose=False, output_dir="a", **settings)
    assert capfd.readouterr() == ("", "")
    with pytest.raises(smoldpo.UsageError), progress.silenced():
        raise smoldpo.UsageError("inside")
    progress.say("heard again")
    assert "heard again" in capfd.readouterr().err


def test_random_generators_and_handlers_are_put_back(tiny_folder, pairs_file):
    import numpy

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    random.seed(3), numpy.random.seed(3), torch.manual_seed(3)
    expected = random.random(), numpy.random.rand(), torch.rand(1).item()
    random.seed(3), numpy.random.seed(3), torch.manual_seed(3)
    settings = QUICK | ANSWERS | {"model": str(tiny_folder), "data": pairs_file}
    smoldpo.train(verbose=False, output_dir="a", **settings)
    assert (random.random(), numpy.random.rand(), torch.rand(1).item()) == expected
    with pytest.raises(smoldpo.SmoldpoError):
        smoldpo.train(data="nowhere.jsonl", verbose=False)
    assert {number: signal.getsignal(number) for number in before} == before


def test_what_a_call_compiles_is_compiled_for_that_call_alone():
    from smoldpo.api.train import inside_host
    from smoldpo.engine.kernels import elementwise

    with pytest.raises(smoldpo.UsageError), inside_host(verbose=False):
        elementwise.set_compiled(True)
        assert elementwise.rotate.compiled is not None
        raise smoldpo.UsageError("however it ends")
    assert elementwise.rotate.compiled is None


def kill_at_step(monkeypatch, number, times=1):
    """Send this process a signal when the first step is finished."""
    from smoldpo.training import loop

    if number == signal.SIGINT:  # a background job of a shell begins by ignoring it
        signal.signal(number, signal.default_int_handler)

    real = loop.step_metrics

    def hit(*args):
        monkeypatch.setattr(loop, "step_metrics", real)
        for _ in range(times):
            os.kill(os.getpid(), number)
        return real(*args)

    monkeypatch.setattr(loop, "step_metrics", hit)


def test_ctrl_c_saves_and_raises_and_resume_goes_on(cli, tiny_folder, pairs_file, monkeypatch):
    kill_at_step(monkeypatch, signal.SIGINT)
    with pytest.raises(smoldpo.InterruptedRunError, match="after 1 steps") as caught:
        smoldpo.train(
            data=pairs_file, model=str(tiny_folder), output_dir="run", verbose=False, **QUICK
        )
    assert isinstance(caught.value, KeyboardInterrupt)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    smoldpo.train(
        data=pairs_file, model=str(tiny_folder), output_dir="whole", verbose=False, **QUICK
    )
    assert cli("resume", "run").code == 0
    assert metrics("run") == metrics("whole")


def test_a_second_ctrl_c_ends_the_run_and_not_the_program(tiny_folder, pairs_file, monkeypatch):
    kill_at_step(monkeypatch, signal.SIGINT, times=2)
    with pytest.raises(KeyboardInterrupt) as caught:
        smoldpo.train(
            data=pairs_file, model=str(tiny_folder), output_dir="run", verbose=False, **QUICK
        )
    assert not isinstance(caught.value, smoldpo.InterruptedRunError)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_programs_own_handler_stays_in_force(tiny_folder, pairs_file, monkeypatch):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        kill_at_step(monkeypatch, signal.SIGTERM)
        result = smoldpo.train(
            data=pairs_file, model=str(tiny_folder), output_dir="run", verbose=False, **QUICK
        )
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM] and result.steps == 3


def test_a_run_in_another_thread(tiny_folder, pairs_file):
    found = []
    settings = QUICK | {"data": pairs_file, "model": str(tiny_folder), "verbose": False}
    thread = threading.Thread(target=lambda: found.append(smoldpo.train(**settings).steps))
    thread.start()
    thread.join()
    assert found == [3]


# Figures and pairs


def test_evaluate_is_the_command(cli, tiny_folder, pairs_file, tmp_path):
    options = ["--dtype", "float64", "--rows", "rows.jsonl", "--json"]
    one = cli("evaluate", tiny_folder, pairs_file, "--reference", tiny_folder, *options)
    figures = smoldpo.evaluate(tiny_folder, pairs_file, tiny_folder, dtype="float64", verbose=False)
    assert figures == json.loads(one.out) and figures["accuracy"]["reward"] == 0.5
    assert figures.pairs == [
        json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()
    ]
    given = smoldpo.evaluate(tiny_folder, rows(40), tiny_folder, dtype="float64", verbose=False)
    assert given["accuracy"] == figures["accuracy"]
    two = smoldpo.evaluate(
        [tiny_folder, tiny_folder],
        pairs_file,
        dtype="float64",
        fail_under="reward=0.9",
        verbose=False,
    )
    assert "no evidence of a change" in two["headline"] and len(two.failed_gates) == 1
    asked = smoldpo.evaluate(
        [tiny_folder, tiny_folder], pairs_file, generate_prompts=2, judges="length",
        max_new_tokens=2,
        max_samples=4, verbose=False,
    )  # fmt: skip
    assert asked["judges"][0]["judge"] == "length"


def test_evaluate_refuses(tiny_folder, pairs_file):
    with pytest.raises(smoldpo.ConfigError, match="did you mean batch_size"):
        smoldpo.evaluate(tiny_folder, pairs_file, batchsize=3)
    with pytest.raises(smoldpo.UsageError, match="one model, or two"):
        smoldpo.evaluate([tiny_folder] * 3, pairs_file)
    with pytest.raises(smoldpo.UsageError, match="one source"):
        smoldpo.evaluate(tiny_folder, [pairs_file, pairs_file])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"engine": "fats"}, "did you mean fast"),
        ({"dtype": "bf16"}, "dtype is 'bf16': .*did you mean bfloat16"),
        ({"device": "gpu"}, "device is 'gpu'"),
        ({"beta": 0}, "beta is 0: must be above 0"),
        ({"beta": float("nan")}, "beta is nan"),
        ({"max_samples": -1}, "max_samples is -1"),
        ({"max_length": 1}, "max_length is 1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"temperature": -1}, "temperature is -1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"generate_prompts": -1}, "generate_prompts is -1"),
        ({"columns": "prompt=question"}, "columns is"),
        ({"beta": -1, "engine": "x", "batchsize": 3}, "3 problems"),
    ],
)
def test_evaluate_checks_what_the_command_checks(options, says):
    with pytest.raises(smoldpo.ConfigError, match=says):
        smoldpo.evaluate("nowhere", "nothing.jsonl", **options)


def test_evaluate_parts_judges_as_train_does(tiny_folder, pairs_file):
    found = smoldpo.evaluate(
        [tiny_folder, tiny_folder], pairs_file, generate_prompts=2, max_new_tokens=2, max_samples=4,
        judges=f"length,implicit:{tiny_folder},{tiny_folder}", verbose=False,
    )  # fmt: skip
    assert len(found["judges"]) == 2


def test_load_pairs_cleans_and_accounts(write_rows):
    given = [*rows(4), rows(1)[0], {"prompt": "empty", "chosen": "", "rejected": "x"}]
    pairs = smoldpo.load_pairs(write_rows(given))
    assert isinstance(pairs, list) and all(isinstance(p, smoldpo.PreferencePair) for p in pairs)
    assert [pair.chosen for pair in pairs] == [row["chosen"] for row in rows(4)]
    assert pairs.account["dropped"] == {"exact_duplicate": 1, "empty_chosen": 1}
    assert pairs.account["rows_read"] == 6 and pairs.account["touched"][0]["row"] == 5
    assert smoldpo.load_pairs(given).account["dropped"] == pairs.account["dropped"]
    kept = smoldpo.load_pairs(given, rules_off=["exact_duplicate"])
    assert len(kept) == 5
    again = smoldpo.load_pairs(pairs)
    assert again == [dataclasses.replace(pair, file="") for pair in pairs]
    assert again.account["source"] == "pairs in memory"
    assert len(smoldpo.load_pairs("builtin", split="test")) == 128
    with pytest.raises(smoldpo.UsageError, match="one source"):
        smoldpo.load_pairs(["a", "b"])


# The page


def test_every_example_of_the_docs_runs(tiny_folder, write_rows, monkeypatch, capsys):
    """In their order, as one program, with a small model in place of the built-in one."""
    from smoldpo.models import load

    write_rows(rows(40))
    monkeypatch.setattr(load, "builtin_gguf", lambda: None)
    monkeypatch.setattr(load, "unpack_gguf", lambda _: tiny_folder)
    page = (ROOT / "docs" / "library.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) >= 7
    names = {}
    for block in blocks:
        block = block.replace("freeze_layers=25", "freeze_layers=2, max_steps=2, max_new_tokens=2")
        exec(block.replace("verbose=False", "max_new_tokens=2, verbose=False"), names)
    assert torch.isfinite(names["losses"]).all() and "did you mean beta" in capsys.readouterr().out


def test_the_page_names_every_public_name():
    page = (ROOT / "docs" / "library.md").read_text()
    for name in smoldpo.__all__:
        assert name == "__version__" or f"`{name}" in page or f"smoldpo.{name}" in page, name
