"""The trials of a sweep: ordinary runs on the sweep's pairs, and the winner on the final pairs.

    trials/003/trial.json    the trial's record, written when it begins and again when it has ended
    trials/003/...           a run folder without a model
    best/                    the winner's run folder, with the model; final.json: the final pairs

A trial without an end goes on from its newest checkpoint, or begins anew.
"""

from __future__ import annotations

import gc
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smoldpo.config.schema import TrainConfig
from smoldpo.evaluation.schema import Evaluation
from smoldpo.sweep.results import DONE, FAILED, FinalResult, TrialRecord
from smoldpo.sweep.shared import ChangedError, SharedInputs
from smoldpo.training.checkpoint import newest
from smoldpo.training.checkpointer import require_disk
from smoldpo.training.fingerprint import (
    differences,
    other_machine,
    read_resume_record,
    write_beginning,
)
from smoldpo.training.metrics_file import cut_back
from smoldpo.training.run import Run, RunOptions
from smoldpo.training.run_folder import command_line, make_folder, write_start
from smoldpo.training.run_inputs import RunInputs
from smoldpo.utils import progress
from smoldpo.utils.errors import DiskError, SmoldpoError
from smoldpo.utils.files import write_json, write_text
from smoldpo.utils.memory import trim_memory
from smoldpo.utils.signals import Interruption

TRIAL_FILE, BEST, FINAL_FILE = "trial.json", "best", "final.json"


@dataclass(frozen=True)
class SweepContext:
    """Where trials run: the sweep's folder, what they share, its metric, and what stops them."""

    folder: Path
    shared: SharedInputs
    metric: str
    interruption: Interruption


def folder_of(sweep: Path, number: int) -> Path:
    """A trial's run folder."""
    return sweep / "trials" / f"{number:03d}"


def read_record(sweep: Path, number: int) -> TrialRecord | None:
    """What is known of a trial, or None where it has not begun.

    Raises:
        SmoldpoError: its record is damaged.
    """
    path = folder_of(sweep, number) / TRIAL_FILE
    if not path.is_file():
        return None
    return TrialRecord.read(path, f"remove {path.parent}, and the trial is made again")


def _write(sweep: Path, record: TrialRecord) -> None:
    path = folder_of(sweep, record.number) / TRIAL_FILE
    write_json(path, record.model_dump(mode="json"))


def run_trial(
    context: SweepContext,
    number: int,
    settings: dict[str, Any],
    config: TrainConfig,
    best: float | None,
) -> TrialRecord:
    """Run a trial, or go on with it, and return its record, which then also stands in its folder.

    Args:
        config: with the sweep's pairs, and without answers; output_dir is the trial's.
        best: the best result so far.

    Raises:
        DiskError: no room; the trial has not ended.
        ChangedError: a model is not what it was.
        InterruptedRunError: after a checkpoint was saved.
    """
    sweep, folder = context.folder, folder_of(context.folder, number)
    began = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    record = TrialRecord(number=number, settings=settings)
    _write(sweep, record)

    def save_if_best(run: Run, evaluation: Evaluation) -> None:
        if best is None or _value(evaluation, context.metric) > best:
            run.checkpointer.save()

    options = RunOptions(save_model=False, write_report=False, evaluated=save_if_best)
    try:
        result = _make(context, folder, config, options).run()
    except (DiskError, ChangedError):
        raise
    except (SmoldpoError, MemoryError) as error:
        record.status, record.error = FAILED, str(error) or "out of memory"
    else:
        assert result.record is not None, "a sweep has validation pairs"
        record.status, record.steps = DONE, result.steps
        record.value = _value(result.record, context.metric)
        record.accuracy = result.record.accuracy
    finally:
        gc.collect()  # the model must not stay beside the next
        trim_memory()
    record.seconds = round(time.perf_counter() - began, 2)
    _write(sweep, record)
    return record


def forget_checkpoints(sweep: Path, number: int) -> None:
    """Remove the checkpoints of a trial that is not the best: its figures are enough."""
    shutil.rmtree(folder_of(sweep, number) / "checkpoints", ignore_errors=True)


def _value(evaluation: Evaluation, metric: str) -> float:
    accuracy = evaluation.accuracy[metric]
    assert accuracy is not None
    return accuracy.after.value


def _make(context: SweepContext, folder: Path, config: TrainConfig, options: RunOptions) -> Run:
    """The trial, at its checkpoint or at its beginning."""
    loaded = context.shared.load(config)
    if resumed := _resumed(context, folder, config, loaded, options):
        return resumed
    require_disk(folder, config, loaded.models, loaded.data)
    make_folder(folder)
    write_start(folder, config, loaded.models, loaded.data.account, command_line())
    write_beginning(folder, loaded.fingerprint)
    return Run(folder, config, loaded, context.interruption, options)


def _resumed(
    context: SweepContext,
    folder: Path,
    config: TrainConfig,
    loaded: RunInputs,
    options: RunOptions,
) -> Run | None:
    """The trial at its newest checkpoint, where there is one of the same training."""
    try:
        record = read_resume_record(folder)
    except SmoldpoError:  # stopped before it began
        return None
    if record.finished or differences(record.began, loaded.fingerprint):
        return None
    checkpoint = newest(folder / "checkpoints", progress.say)
    if checkpoint is None:
        return None
    progress.say(f"goes on after step {checkpoint.step:,}")
    cut_back(folder / "metrics.jsonl", checkpoint.state["metrics_rows"])
    exact = loaded.models.facts.device == "cpu" and not other_machine(
        record.began, loaded.fingerprint
    )
    return Run(
        folder, config, loaded, context.interruption, options, checkpoint=checkpoint, exact=exact
    )


def measure_winner(
    context: SweepContext, number: int, trained: TrainConfig, measured: TrainConfig
) -> FinalResult:
    """Make best/, an ordinary run folder, and return what final.json says then.

    The policy is the winner's, from its last checkpoint; nothing is trained again.

    Args:
        trained: the trial's configuration; best/config.yaml holds it.
        measured: the same with the final pairs held out, and with answers.

    Raises:
        SmoldpoError: the trial's checkpoint is gone or damaged, or whatever a run's end raises.
    """
    trial, folder = folder_of(context.folder, number), context.folder / BEST
    progress.say(f"the winner, trial {number}, on the final pairs:")
    checkpoint = newest(trial / "checkpoints", progress.say)
    if checkpoint is None:
        raise SmoldpoError(
            f"{trial}: its last checkpoint is gone, which holds the winner's weights; remove "
            f"{trial}, and smoldpo resume makes the trial again"
        )
    loaded = context.shared.load(measured)
    make_folder(folder)
    write_start(folder, trained, loaded.models, loaded.data.account, command_line())
    write_beginning(folder, loaded.fingerprint)
    _copy_steps(trial / "metrics.jsonl", folder / "metrics.jsonl")
    checkpoint.state["metrics_rows"] = 0  # the evaluation before is of other pairs: logged again
    options = RunOptions(train=False, checkpoints=trial / "checkpoints")
    run = Run(
        folder, measured, loaded, context.interruption, options, checkpoint=checkpoint, exact=False
    )
    record = run.run().record
    assert record is not None
    figures = {name: getattr(record, name) for name in FinalResult.model_fields if name != "trial"}
    final = FinalResult(trial=number, **figures)
    write_json(context.folder / FINAL_FILE, final.as_json())
    return final


def read_final(sweep: Path, number: int) -> FinalResult | None:
    """What is known of this winner on the final pairs, or None: then it is measured (again).

    Raises:
        SmoldpoError: the file is damaged.
    """
    path = sweep / FINAL_FILE
    if not (path.is_file() and (sweep / BEST / "evaluation.json").is_file()):
        return None
    final = FinalResult.read(path, "remove the file, and smoldpo resume measures the winner again")
    return final if final.trial == number else None


def _copy_steps(source: Path, target: Path) -> None:
    """The rows of steps, without the evaluations on the validation pairs."""
    rows = source.read_text(encoding="utf-8").splitlines(keepends=True)
    write_text(target, "".join(row for row in rows if "loss" in json.loads(row)))
