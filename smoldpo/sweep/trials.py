"""One trial: an ordinary run on the sweep's pairs, and the record of what became of it.

    trials/003/trial.json    written when a trial begins, and again when it has ended
    trials/003/...           a run folder without a model: the winner's is made at the end (final.py)

A trial without an end goes on from its newest checkpoint, or begins anew.
"""

from __future__ import annotations

import gc
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from smoldpo import progress
from smoldpo.checkpoint import newest
from smoldpo.config import TrainConfig
from smoldpo.engine.memory import give_back_freed_memory
from smoldpo.errors import DiskError, SmoldpoError
from smoldpo.files import write_json
from smoldpo.fingerprint import differences, other_machine, read_beginning, write_beginning
from smoldpo.interrupts import Interruption
from smoldpo.keeper import require_disk
from smoldpo.run import Loaded, Run, write_start
from smoldpo.runfolder import command_line, make_folder
from smoldpo.sweep.shared import ChangedError, Shared
from smoldpo.tracking import cut_back

FILE = "trial.json"
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
    path = folder_of(sweep, number) / FILE
    if not path.is_file():
        return None
    try:
        return Record(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise SmoldpoError(
            f"{path}: cannot be read ({error}); remove {path.parent}, and the trial is made again"
        ) from None


def _write(sweep: Path, record: Record) -> None:
    write_json(folder_of(sweep, record.number) / FILE, asdict(record))


class Trial(Run):
    """A run that ends with its figures: no model, no answers, no page.

    Args:
        leads: told the evaluation, whether the trial is the best so far; then its checkpoint is kept.
    """

    def __init__(self, *given: Any, leads: Callable[[dict[str, Any]], bool], **options: Any):
        super().__init__(*given, **options)
        self._leads = leads

    def _save(self) -> None:
        pass

    def _evaluated(self, evaluation: dict[str, Any] | None) -> None:
        assert evaluation is not None, "a sweep has validation pairs"
        if self._leads(evaluation):
            self.keeper.save()

    def _report(self) -> None:
        return None


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

    def is_best(evaluation: dict[str, Any]) -> bool:
        nonlocal leads
        leads = best is None or _value(evaluation, arena.metric) > best
        return leads

    try:
        result = _make(arena, folder, config, is_best).go()
    except (DiskError, ChangedError):
        raise
    except (SmoldpoError, MemoryError) as error:
        seconds = round(time.perf_counter() - began, 2)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        ended = Record(
            number, settings, FAILED, error=str(error) or "out of memory", seconds=seconds
        )
    else:
        evaluation = result.evaluation
        assert evaluation is not None
        ended = Record(
            number,
            settings,
            DONE,
            _value(evaluation, arena.metric),
            evaluation["accuracy"],
            result.steps,
            round(time.perf_counter() - began, 2),
        )
    finally:
        gc.collect()  # lean modules hold themselves (models/lean.py): the model would stay beside the next
        give_back_freed_memory()
    _write(sweep, ended)
    if not leads:
        forget_checkpoints(sweep, number)
    return ended


def forget_checkpoints(sweep: Path, number: int) -> None:
    """Of a trial that is not the best: its figures are enough."""
    shutil.rmtree(folder_of(sweep, number) / "checkpoints", ignore_errors=True)


def _value(evaluation: dict[str, Any], metric: str) -> float:
    return evaluation["accuracy"][metric]["after"]["value"]


def _make(
    arena: Arena, folder: Path, config: TrainConfig, leads: Callable[[dict[str, Any]], bool]
) -> Trial:
    """The trial, at its checkpoint or at its beginning."""
    loaded = arena.shared.load(config)
    going_on = _going_on(arena, folder, config, loaded, leads)
    if going_on is not None:
        return going_on
    require_disk(folder, config, loaded.models, loaded.data)
    make_folder(folder)
    write_start(folder, config, loaded.models, loaded.data, command_line())
    write_beginning(folder, loaded.fingerprint)
    return Trial(folder, config, loaded, arena.interruption, leads=leads)


def _going_on(
    arena: Arena,
    folder: Path,
    config: TrainConfig,
    loaded: Loaded,
    leads: Callable[[dict[str, Any]], bool],
) -> Trial | None:
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
    return Trial(
        folder, config, loaded, arena.interruption, checkpoint, exact, leads=leads
    )  # fmt: skip
