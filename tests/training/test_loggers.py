"""Loggers: TensorBoard's files read back; the others' errors, and the calls that they make on a
stand-in.
"""

import json
import math
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from smoldpo.config.load import build_config
from smoldpo.config.schema import TrainConfig
from smoldpo.training import loggers
from smoldpo.training.loggers import LOGGERS, Reporting, require_loggers
from smoldpo.training.metrics_file import MetricsFile
from smoldpo.utils.errors import ConfigError, SmoldpoError, UsageError

SHORT = [
    "--dtype", "float32", "--generate-prompts", "0", "--sample-prompt", "none", "--freeze-layers",
    "2", "--learning-rate", "1e-2",
]  # fmt: skip
STEP = {"step": 1, "epoch": 0.5, "loss": 0.7, "rewards/margins": 0.0, "pairs": 8}
CHECK = {"step": 0, "eval_loss": 0.69}


def scalars(folder):
    """Every scalar event in the order of the files, nothing purged: {tag: [(step, value), ...]}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0}, purge_orphaned_data=False)
    found.Reload()
    tags = found.Tags()
    texts = [str(event) for tag in tags["tensors"] for event in found.Tensors(tag)]
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in tags["scalars"]}, texts


def expected(run):
    """The same from metrics.jsonl."""
    tags = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        step = row.pop("step")
        row.pop("pairs", None)
        for name, value in row.items():
            tags.setdefault(name, []).append((step, pytest.approx(value, rel=1e-6)))
    return tags


def test_tensorboard_holds_what_metrics_hold(cli, tiny_folder, pairs_file, tmp_path):
    run = tmp_path / "run"
    result = cli(
        "train", "--model", tiny_folder, "--data", pairs_file, "--output-dir", run, *SHORT,
        "--report-to", "tensorboard", "--eval-steps", 2, "--save-steps", 1, "--num-train-epochs", 1,
    )  # fmt: skip
    assert result.code == 0, result.err
    found, texts = scalars(run / "tensorboard")
    assert found == expected(run) and len(found["loss"]) >= 3 and len(found["eval_loss"]) >= 3
    assert any("learning_rate: 0.01" in text and "report_to" in text for text in texts)
    # More epochs: the file goes on, and holds nothing twice.
    result = cli("resume", run, "--extend", 1)
    assert result.code == 0, result.err
    found, _ = scalars(run / "tensorboard")
    assert found == expected(run)
    steps = [step for step, _ in found["loss"]]
    assert steps == sorted(set(steps)) and len(steps) >= 6
    assert len(list((run / "tensorboard").iterdir())) == 1


def test_default_reports_nowhere(tmp_path):
    assert TrainConfig().report_to == []
    assert build_config({"report_to": "none"}).report_to == []
    assert build_config({"report_to": "wandb, mlflow"}).report_to == ["wandb", "mlflow"]
    with pytest.raises(ConfigError, match="tensorboard"):
        build_config({"report_to": "tensorbord"})
    assert set(LOGGERS) == set(
        TrainConfig.model_json_schema()["properties"]["report_to"]["items"]["enum"]
    )


@pytest.mark.parametrize("name", ["trackio", "wandb", "mlflow"])
def test_a_missing_package_is_said_before_anything_is_loaded(name, cli, pairs_file, monkeypatch):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda _: None)
    result = cli("train", "--model", "nowhere", "--data", pairs_file, "--report-to", name)
    assert result.code == 2 and f"pip install {name}" in result.err and "nowhere" not in result.err


def test_a_folder_of_that_name_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "somelogger").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UsageError, match="somelogger is not installed"):
        require_loggers(["somelogger"])


# A stand-in that remembers calls, as the packages' documentation has them


class Calls(list):
    """A list of (name, arguments, keywords) that any attribute of it adds to."""

    def of(self, name):
        return [entry for entry in self if entry[0] == name]


class Standing:
    """An object all of whose methods are recorded; `given` are what they return."""

    def __init__(self, calls, **given):
        self._calls, self._given = calls, given

    def __getattr__(self, name):
        def call(*arguments, **keywords):
            self._calls.append((name, arguments, keywords))
            found = self._given.get(name)
            if isinstance(found, Exception):
                raise found
            return found

        return call


def stand_in(monkeypatch, name, module):
    module.__spec__ = ModuleSpec(name, None, origin="here")
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.fixture
def calls():
    return Calls()


@pytest.fixture
def wandb(monkeypatch, calls):
    module = stand_in(monkeypatch, "wandb", types.ModuleType("wandb"))
    module.init = Standing(calls, init=Standing(calls)).init
    return calls


@pytest.fixture
def trackio(monkeypatch, calls):
    module = stand_in(monkeypatch, "trackio", types.ModuleType("trackio"))
    module.init = Standing(calls, init=Standing(calls)).init
    module.finish = Standing(calls).finish
    return calls


@pytest.fixture
def mlflow(monkeypatch, calls):
    module = stand_in(monkeypatch, "mlflow", types.ModuleType("mlflow"))
    run = types.SimpleNamespace(info=types.SimpleNamespace(run_id="r1"))
    module.MlflowClient = lambda: Standing(calls, create_experiment="7", create_run=run)
    entities = stand_in(monkeypatch, "mlflow.entities", types.ModuleType("mlflow.entities"))
    entities.Metric = lambda key, value, timestamp, step: (key, value, step)
    entities.Param = lambda key, value: (key, value)
    return calls


def report(folder, name, rows, settings=None):
    folder.mkdir(exist_ok=True)
    reporting = Reporting([name], folder, settings or {"beta": 0.1})
    for row in rows:
        reporting.log(row)
    reporting.close()


def test_wandb_is_called_as_documented(wandb, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    report(tmp_path / "run", "wandb", [CHECK, STEP], {"beta": 0.1, "model": "hf_" + "a" * 30})
    ((_, _, began),) = wandb.of("init")
    assert began["project"] == "mine" and began["name"] == "run" and began["resume"] == "allow"
    assert began["config"] == {"beta": "0.1", "model": "[secret]"}
    assert [entry[1][0] for entry in wandb.of("log")] == [
        {"step": 0, "eval_loss": 0.69},
        {"step": 1, "epoch": 0.5, "loss": 0.7, "rewards/margins": 0.0},
    ]
    assert ("define_metric", ("*",), {"step_metric": "step"}) in wandb
    assert wandb[-1][0] == "finish"


def test_a_resumed_run_tells_nothing_twice(wandb, tmp_path):
    steps = [STEP | {"step": step} for step in (1, 2, 3)]
    report(tmp_path / "run", "wandb", [CHECK, *steps])
    first = wandb.of("init")[0][2]["id"]
    wandb.clear()
    # From a checkpoint after step 1: steps 2 and 3 again, then new ones; the evaluation of before
    # not.
    again = [CHECK, *steps[1:], STEP | {"step": 4}, {"step": 3, "eval_loss": 0.5}]
    report(tmp_path / "run", "wandb", again)
    assert wandb.of("init")[0][2]["id"] == first
    told = [entry[1][0] for entry in wandb.of("log")]
    assert [row["step"] for row in told] == [4, 3] and "eval_loss" in told[1]


def test_a_logger_that_is_added_or_had_failed_is_told_what_it_missed(wandb, trackio, tmp_path):
    steps = [STEP | {"step": step} for step in (1, 2, 3)]
    check = {"step": 2, "eval_loss": 0.5}
    folder = tmp_path / "run"
    report(folder, "trackio", [CHECK, steps[0]])  # and then nothing more, as after a failure
    wandb.clear()
    reporting = Reporting(["wandb", "trackio"], folder, {}, [CHECK, *steps[:2], check])
    reporting.log(steps[2])
    reporting.close()
    told = wandb.of("log")
    first = [arguments[0] for _, arguments, keywords in told if not keywords]
    other = [keywords["step"] for _, _, keywords in told if keywords]
    assert [row["step"] for row in first] == [0, 1, 2, 2, 3]
    assert other == [2, 2, 3]


def test_tensorboard_alone_does_not_write_its_memory_at_every_step(tmp_path, monkeypatch):
    reporting = Reporting(["tensorboard"], tmp_path, {})
    written = []
    monkeypatch.setattr(reporting, "_write", lambda: written.append(1))
    reporting.log(STEP)
    reporting.log(CHECK)
    assert not written
    reporting.close()
    found, _ = scalars(tmp_path / "tensorboard")
    assert found["loss"] and found["eval_loss"]


def test_a_new_run_in_the_same_folder_is_new(cli, wandb, tiny_folder, pairs_file, tmp_path):
    command = [
        "train", "--model", tiny_folder, "--data", pairs_file, "--output-dir", tmp_path / "run",
        *SHORT, "--max-steps", 1, "--report-to", "wandb", "--overwrite",
    ]  # fmt: skip
    for _ in range(2):
        result = cli(*command)
        assert result.code == 0, result.err
    one, other = (entry[2]["id"] for entry in wandb.of("init"))
    assert one != other and len(wandb.of("finish")) == 2
    assert json.loads((tmp_path / "run" / "report_to.json").read_text())["wandb"]["step"] == 1


def test_trackio_is_called_as_documented(trackio, tmp_path):
    report(tmp_path / "run", "trackio", [STEP])
    report(tmp_path / "run", "trackio", [STEP, STEP | {"step": 2}])
    one, other = (entry[2] for entry in trackio.of("init"))
    assert one["project"] == "smoldpo" and one["name"].startswith("run-")
    assert one["name"] == other["name"], "the only thing by which it knows a run"
    assert (one["resume"], other["resume"]) == ("never", "allow")
    assert [entry[2]["step"] for entry in trackio.of("log")] == [1, 2]
    assert trackio.of("log")[0][1] == ({"epoch": 0.5, "loss": 0.7, "rewards/margins": 0.0},)
    assert len(trackio.of("finish")) == 2


def test_mlflow_is_called_as_documented(mlflow, tmp_path):
    many = {f"setting{n}": "x" * 600 for n in range(150)}
    report(tmp_path / "run", "mlflow", [STEP], many)
    assert mlflow.of("create_experiment") == [("create_experiment", ("smoldpo",), {})]
    assert mlflow.of("create_run") == [("create_run", ("7",), {"run_name": "run"})]
    batches = mlflow.of("log_batch")
    params = [batch[2]["params"] for batch in batches if "params" in batch[2]]
    assert [len(part) for part in params] == [100, 50]
    assert all(len(value) <= 500 for part in params for _, value in part)
    assert batches[-1][1] == ("r1",) and ("loss", 0.7, 1) in batches[-1][2]["metrics"]
    assert mlflow[-1] == ("set_terminated", ("r1",), {})
    mlflow.clear()
    report(tmp_path / "run", "mlflow", [STEP | {"step": 2}])
    assert mlflow[0] == ("update_run", ("r1",), {"status": "RUNNING"})
    assert not mlflow.of("create_run")


def test_a_logger_that_fails_is_left_out_and_the_run_goes_on(
    cli, monkeypatch, calls, tiny_folder, pairs_file, tmp_path
):
    failing = Standing(calls, log=ConnectionError("no route"))
    module = stand_in(monkeypatch, "trackio", types.ModuleType("trackio"))
    module.init, module.finish = lambda **_: failing, failing.finish
    run = tmp_path / "run"
    result = cli(
        "train", "--model", tiny_folder, "--data", pairs_file, "--output-dir", run, *SHORT,
        "--max-steps", 3, "--report-to", "trackio,tensorboard",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert result.err.count("report_to trackio: failed at step 0 (ConnectionError: no route)") == 1
    assert len(calls.of("log")) == 1
    assert scalars(run / "tensorboard")[0] == expected(run), "the other one goes on"


def test_a_logger_that_cannot_be_started_is_an_error(monkeypatch, calls, tmp_path):
    module = stand_in(monkeypatch, "trackio", types.ModuleType("trackio"))
    module.init = Standing(calls, init=PermissionError("who are you?")).init
    module.finish = Standing(calls).finish
    with pytest.raises(SmoldpoError, match=r"cannot be started.*who are you"):
        Reporting(["trackio"], tmp_path, {})


def test_greetings_go_to_standard_error_and_closing_never_fails(monkeypatch, tmp_path, capsys):
    class Loud:
        def log(self, *_, **__):
            print("logged")

    def finish():
        raise OSError("gone")

    module = stand_in(monkeypatch, "trackio", types.ModuleType("trackio"))
    module.init, module.finish = lambda **_: print("hello") or Loud(), finish
    report(tmp_path, "trackio", [STEP])
    out, err = capsys.readouterr()
    assert out == "" and "hello" in err and "logged" in err and "could not be closed (gone)" in err


def test_what_is_not_finite_reaches_the_logger_as_a_number(wandb, tmp_path):
    reporting = Reporting(["wandb"], tmp_path, {})
    metrics = MetricsFile(tmp_path / "metrics.jsonl", reporting)
    metrics.log({"step": 1, "loss": math.inf})
    metrics.close()
    metrics.close()
    assert wandb.of("log")[0][1][0]["loss"] == math.inf and len(wandb.of("finish")) == 1


def test_a_damaged_memory_of_what_was_told_is_named(tmp_path):
    for text in ("{", "[1]", '{"wandb": {"id": "x"}}'):
        Path(tmp_path / "report_to.json").write_text(text)
        with pytest.raises(SmoldpoError, match=r"report_to\.json: cannot be read"):
            Reporting([], tmp_path, {})
