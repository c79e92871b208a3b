"""One trial: an ordinary run on the sweep's pairs, and the record of what became of it.

    trials/003/trial.json    written when a trial begins, and again when it has ended
    trials/003/...           a run folder without a model: the winner's is made at the end (trials.py)

A trial without an end goes on from its newest checkpoint, or begins anew.
"""

from __future__ import annotations

import gc
import json
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from smoldpo.config.schema import TrainConfig
from smoldpo.evaluation.schema import Evaluation
from smoldpo.sweep.shared import ChangedError, Shared
from smoldpo.training.checkpoint import newest
from smoldpo.training.checkpointer import require_disk
from smoldpo.training.fingerprint import differences, other_machine, read_beginning, write_beginning
from smoldpo.training.metrics_file import cut_back
from smoldpo.training.run import Run, RunInputs, RunOptions, write_start
from smoldpo.training.run_folder import command_line, make_folder
from smoldpo.utils import progress
from smoldpo.utils.errors import DiskError, SmoldpoError
from smoldpo.utils.files import write_json, write_text
from smoldpo.utils.memory import trim_memory
from smoldpo.utils.signals import Interruption

TRIAL_FILE = "trial.json"
RUNNING, DONE, FAILED = "running", "done", "failed"


@dataclass(frozen=True)
class Record:
    """What is known of a trial.

    Attributes:
        number: from 1.
        value: its accuracy on the validation pairs by the sweep's metric, where it is done.
        accuracy: each accuracy with its interval, before and after.
        seconds: what it took, since it last began or went on.
        steps: optimizer steps behind the policy that was measured.
        error: why it failed.
    """

    number: int
    settings: dict[str, Any]
    status: str = RUNNING
    value: float | None = None
    accuracy: dict[str, Any] = field(default_factory=dict)
    steps: int | None = None
    seconds: float | None = None
    error: str | None = None


def folder_of(sweep: Path, number: int) -> Path:
    """Where a trial lies."""
    return sweep / "trials" / f"{number:03d}"


def read_record(sweep: Path, number: int) -> Record | None:
    """What is known of a trial, or None where it has not begun.

    Raises:
        SmoldpoError: its record is damaged.
    """
    path = folder_of(sweep, number) / TRIAL_FILE
    if not path.is_file():
        return None
    try:
        return Record(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise SmoldpoError(
            f"{path}: cannot be read ({error}); remove {path.parent}, and the trial is made again"
        ) from None


def _write(sweep: Path, record: Record) -> None:
    write_json(folder_of(sweep, record.number) / TRIAL_FILE, asdict(record))


@dataclass(frozen=True)
class Arena:
    """Where trials run: the sweep's folder, what they share, its metric, and who stops them."""

    folder: Path
    shared: Shared
    metric: str
    interruption: Interruption


def run_trial(
    arena: Arena, number: int, settings: dict[str, Any], config: TrainConfig, best: float | None
) -> Record:
    """Run a trial, or go on with it, and return its record, which then also stands in its folder.

    Args:
        config: with the sweep's pairs, and without answers; output_dir is the trial's.
        best: the best result so far.

    Raises:
        DiskError: no room; the trial has not ended.
        ChangedError: a model is not what it was.
        InterruptedRunError: after a checkpoint was saved.
    """
    sweep, folder = arena.folder, folder_of(arena.folder, number)
    began = time.perf_counter()
    begun = Record(number, settings)
    folder.mkdir(parents=True, exist_ok=True)
    _write(sweep, begun)
    leads = False

    def save_if_best(run: Run, evaluation: Evaluation) -> None:
        nonlocal leads
        leads = best is None or _value(evaluation, arena.metric) > best
        if leads:
            run.checkpointer.save()

    options = RunOptions(save_model=False, write_report=False, evaluated=save_if_best)
    try:
        result = _make(arena, folder, config, options).run()
    except (DiskError, ChangedError):
        raise
    except (SmoldpoError, MemoryError) as error:
        seconds = round(time.perf_counter() - began, 2)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        ended = Record(
            number, settings, FAILED, error=str(error) or "out of memory", seconds=seconds
        )
    else:
        assert result.record is not None
        ended = Record(
            number,
            settings,
            DONE,
            _value(result.record, arena.metric),
            result.record.as_json()["accuracy"],
            result.steps,
            round(time.perf_counter() - began, 2),
        )
    finally:
        gc.collect()  # the model must not stay beside the next
        trim_memory()
    _write(sweep, ended)
    if not leads:
        forget_checkpoints(sweep, number)
    return ended


def forget_checkpoints(sweep: Path, number: int) -> None:
    """Of a trial that is not the best: its figures are enough."""
    shutil.rmtree(folder_of(sweep, number) / "checkpoints", ignore_errors=True)


def _value(evaluation: Evaluation, metric: str) -> float:
    accuracy = evaluation.accuracy[metric]
    assert accuracy is not None
    return accuracy.after.value


def _make(arena: Arena, folder: Path, config: TrainConfig, options: RunOptions) -> Run:
    """The trial, at its checkpoint or at its beginning."""
    loaded = arena.shared.load(config)
    going_on = _going_on(arena, folder, config, loaded, options)
    if going_on is not None:
        return going_on
    require_disk(folder, config, loaded.models, loaded.data)
    make_folder(folder)
    write_start(folder, config, loaded.models, loaded.data, command_line())
    write_beginning(folder, loaded.fingerprint)
    return Run(folder, config, loaded, arena.interruption, options)


def _going_on(
    arena: Arena,
    folder: Path,
    config: TrainConfig,
    loaded: RunInputs,
    options: RunOptions,
) -> Run | None:
    """The trial at its newest checkpoint, where there is one of the same training."""
    try:
        kept = read_beginning(folder)
    except SmoldpoError:  # stopped before it began
        return None
    if kept["finished"] or differences(kept["began"], loaded.fingerprint):
        return None
    checkpoint = newest(folder / "checkpoints", progress.say)
    if checkpoint is None:
        return None
    progress.say(f"goes on after step {checkpoint.step:,}")
    cut_back(folder / "metrics.jsonl", checkpoint.state["metrics_rows"])
    exact = loaded.models.device == "cpu" and not other_machine(kept["began"], loaded.fingerprint)
    return Run(
        folder, config, loaded, arena.interruption, options, checkpoint=checkpoint, exact=exact
    )


# The winner on the final pairs, which no trial has seen: best/, an ordinary run folder with the model.
#
# Its policy is the winner's, from its last checkpoint; nothing is trained again.


FOLDER, FINAL_FILE, EVALUATION = "best", "final.json", "evaluation.json"
FIGURES = (
    "n",
    "prompts",
    "metric",
    "headline",
    "verdict",
    "accuracy",
    "baselines",
    "drift",
    "judges",
)
"""Of the evaluation, what results.json says; best/evaluation.json has the rest."""


def measure_winner(
    sweep: Path,
    number: int,
    trained: TrainConfig,
    measured: TrainConfig,
    shared: Shared,
    interruption: Interruption,
) -> dict[str, Any]:
    """Make best/ and return what final.json says then.

    Args:
        trained: the trial's configuration; best/config.yaml holds it.
        measured: the same with the final pairs held out, and with answers.

    Raises:
        SmoldpoError: the trial's checkpoint is gone or damaged, or whatever a run's end raises.
    """
    trial, folder = folder_of(sweep, number), sweep / FOLDER
    progress.say(f"the winner, trial {number}, on the final pairs:")
    checkpoint = newest(trial / "checkpoints", progress.say)
    if checkpoint is None:
        raise SmoldpoError(
            f"{trial}: its last checkpoint is gone, which holds the winner's weights; remove {trial}, and "
            "smoldpo resume makes the trial again"
        )
    loaded = shared.load(measured)
    make_folder(folder)
    write_start(folder, trained, loaded.models, loaded.data, command_line())
    write_beginning(folder, loaded.fingerprint)
    _copy_steps(trial / "metrics.jsonl", folder / "metrics.jsonl")
    checkpoint.state["metrics_rows"] = (
        0  # the evaluation before is of other pairs, and so is logged
    )
    options = RunOptions(train=False, checkpoints=trial / "checkpoints")
    run = Run(folder, measured, loaded, interruption, options, checkpoint=checkpoint, exact=False)
    result = run.run()
    found = result.evaluation
    assert found is not None
    figures = {name: found[name] for name in FIGURES}
    final = {"trial": number, **figures}
    write_json(sweep / FINAL_FILE, final)
    return final


def read_final(sweep: Path, number: int) -> dict[str, Any] | None:
    """What is known of this winner on the final pairs, or None: then it is measured (again)."""
    path = sweep / FINAL_FILE
    if not (path.is_file() and (sweep / FOLDER / EVALUATION).is_file()):
        return None
    final = json.loads(path.read_text(encoding="utf-8"))
    return final if final["trial"] == number else None


def read_evaluation(sweep: Path) -> Evaluation:
    """All that was found of the winner on the final pairs.

    Raises:
        SmoldpoError: the file is damaged.
    """
    path = sweep / FOLDER / EVALUATION
    try:
        return Evaluation.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SmoldpoError(
            f"{path}: cannot be read ({error}); remove {path.parent}, and smoldpo resume measures the winner "
            "again"
        ) from None


def _copy_steps(source: Path, target: Path) -> None:
    """The rows of steps, without the evaluations on the validation pairs."""
    rows = source.read_text(encoding="utf-8").splitlines(keepends=True)
    write_text(target, "".join(row for row in rows if "loss" in json.loads(row)))
