"""The winner on the final pairs, which no trial has seen: best/, an ordinary run folder with the model.

Its policy is the winner's, from its last checkpoint; nothing is trained again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from smoldpo import progress
from smoldpo.checkpoint import newest
from smoldpo.config import TrainConfig
from smoldpo.errors import SmoldpoError
from smoldpo.files import write_json, write_text
from smoldpo.fingerprint import write_beginning
from smoldpo.interrupts import Interruption
from smoldpo.run import Run, write_start
from smoldpo.runfolder import command_line, make_folder
from smoldpo.sweep.shared import Shared
from smoldpo.sweep.trials import folder_of

FOLDER, FILE, EVALUATION = "best", "final.json", "evaluation.json"
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


class Winner(Run):
    """A run that goes on after its last step: the policy is measured on other pairs, and saved."""

    def _train(self) -> None:
        pass


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
    run = Winner(folder, measured, loaded, interruption, checkpoint, exact=False)
    run.keeper.folder = trial / "checkpoints"
    result = run.go()
    assert result.evaluation is not None
    figures = {name: result.evaluation.get(name) for name in FIGURES}
    final = {"trial": number, **figures}
    write_json(sweep / FILE, final)
    return final


def read_final(sweep: Path, number: int) -> dict[str, Any] | None:
    """What is known of this winner on the final pairs, or None: then it is measured (again)."""
    path = sweep / FILE
    if not (path.is_file() and (sweep / FOLDER / EVALUATION).is_file()):
        return None
    final = json.loads(path.read_text(encoding="utf-8"))
    return final if final["trial"] == number else None


def read_evaluation(sweep: Path) -> dict[str, Any]:
    """All that was found of the winner on the final pairs.

    Raises:
        SmoldpoError: the file is damaged.
    """
    path = sweep / FOLDER / EVALUATION
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SmoldpoError(
            f"{path}: cannot be read ({error}); remove {path.parent}, and smoldpo resume measures the winner "
            "again"
        ) from None


def _copy_steps(source: Path, target: Path) -> None:
    """The rows of steps, without the evaluations on the validation pairs."""
    rows = source.read_text(encoding="utf-8").splitlines(keepends=True)
    write_text(target, "".join(row for row in rows if "loss" in json.loads(row)))
