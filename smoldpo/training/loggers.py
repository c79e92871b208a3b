"""Loggers beside metrics.jsonl (`report_to`): TensorBoard, Trackio, Weights & Biases, MLflow.

A logger is a class with `log(step, row)` and `close()`, made from an `About`, and a line in
LOGGERS. Its package is imported when it is made and not before. metrics.jsonl stays what a run is
known by: a logger that fails is left out from then on, and the run goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from smoldpo.utils import progress
from smoldpo.utils.errors import SmoldpoError, UsageError
from smoldpo.utils.text import redact

FILE = "report_to.json"
"""In the run folder: what each logger was told, so that a resume tells nothing twice."""
PROJECT = "smoldpo"
"""Unless WANDB_PROJECT, TRACKIO_PROJECT or MLFLOW_EXPERIMENT_NAME say otherwise."""


class Logger(Protocol):
    """Where a run's figures go."""

    def log(self, step: int, row: dict[str, float]) -> None:
        """The figures of a step or an evaluation (`eval_...`); it may raise anything."""
        ...

    def close(self) -> None:
        """There is nothing more to come, now."""
        ...


@dataclass(frozen=True)
class About:
    """What a logger is told of a run: name, settings without secrets, a folder for files."""

    name: str
    folder: Path
    settings: dict[str, Any]
    id: str
    """The run's own in that service; made at its beginning, and the same when it goes on."""
    resumed: bool
    """Whether the service knows the run already."""


class TensorBoard:
    """Event files in RUN/tensorboard: `tensorboard --logdir runs` shows all runs."""

    def __init__(self, about: About):
        from torch.utils.tensorboard import SummaryWriter

        folder = about.folder / "tensorboard"
        shutil.rmtree(folder, ignore_errors=True)  # written anew from metrics.jsonl, see Reporting
        self._writer = SummaryWriter(log_dir=str(folder))
        lines = "".join(f"    {name}: {value}\n" for name, value in about.settings.items())
        self._writer.add_text("settings", lines)  # indented: Markdown's way to say verbatim

    def log(self, step: int, row: dict[str, float]) -> None:
        for name, value in row.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Trackio:
    """trackio's own store on this machine, or where TRACKIO_SPACE_ID and the like say."""

    def __init__(self, about: About):
        import trackio

        # The run's own `finish` leaves it to be finished once more, at the exit.
        self._finish = trackio.finish
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT") or PROJECT,
            name=f"{about.name}-{about.id[:6]}",  # it knows runs by their names alone
            config=about.settings,
            resume="allow" if about.resumed else "never",
            embed=False,
        )

    def log(self, step: int, row: dict[str, float]) -> None:
        self._run.log(row, step=step)

    def close(self) -> None:
        self._finish()


class WandB:
    """Weights & Biases, set up by its environment variables (WANDB_API_KEY, WANDB_MODE)."""

    def __init__(self, about: About):
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=about.name,
            id=about.id,
            resume="allow",
            config=about.settings,
            dir=str(about.folder),
        )
        # Its own steps may only grow; the evaluation of an earlier, best step would be refused.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, row: dict[str, float]) -> None:
        self._run.log({"step": step} | row)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """MLflow's tracking server or files, where MLFLOW_TRACKING_URI says."""

    MOST_AT_ONCE = 100
    LONGEST = 500

    def __init__(self, about: About):
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._client, self._metric = MlflowClient(), Metric
        if about.resumed:
            self._id = about.id
            self._client.update_run(self._id, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self._id = self._client.create_run(number, run_name=about.name).info.run_id
        params = [Param(k, str(v)[: self.LONGEST]) for k, v in about.settings.items()]
        for start in range(0, len(params), self.MOST_AT_ONCE):
            self._client.log_batch(self._id, params=params[start : start + self.MOST_AT_ONCE])

    @property
    def id(self) -> str:
        """The run's, which MLflow gives."""
        return self._id

    def log(self, step: int, row: dict[str, float]) -> None:
        now = int(1000 * time.time())
        metrics = [self._metric(name, value, now, step) for name, value in row.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._id)


LOGGERS: dict[str, Any] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": WandB,
    "mlflow": MLflow,
}
"""By what `report_to` calls them, which is also the package that each needs."""


def require_loggers(names: Iterable[str]) -> None:
    """Refuse, before anything is loaded, a logger whose package is not there.

    Raises:
        UsageError: naming the package and how to get it.
    """
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a folder of that name, such as W&B's own, is none
            raise UsageError(
                f"report_to {name}: the package {name} is not installed; pip install {name}, or "
                "leave it out (metrics.jsonl and report.html are always written)"
            )


class Reporting:
    """The loggers of one run.

    Args:
        earlier: rows that metrics.jsonl holds, of a run that goes on. TensorBoard's files are
            written anew from them. The other loggers keep what they were told, and FILE says what
            that was; one that is new, or had failed, is told what it missed.

    Raises:
        SmoldpoError: a logger that cannot be started, such as a server out of reach.
    """

    def __init__(
        self,
        names: Iterable[str],
        folder: Path,
        settings: dict[str, Any],
        earlier: Iterable[dict[str, Any]] = (),
    ):
        self._path = folder / FILE
        self._logged: dict[str, dict[str, Any]] = _read(self._path)
        self._loggers: dict[str, Logger] = {}
        safe = {name: redact(str(value)) for name, value in settings.items()}
        for name in names:
            known = self._logged.get(name)
            id = known["id"] if known else secrets.token_hex(16)
            about = About(folder.resolve().name, folder, safe, id, known is not None)
            try:
                with _on_standard_error():
                    logger = LOGGERS[name](about)
            except Exception as error:  # each package has errors of its own
                self.close()
                raise SmoldpoError(
                    f"report_to {name}: cannot be started ({type(error).__name__}: {error}); put "
                    "that right, or leave it out"
                ) from None
            self._loggers[name] = logger
            new: dict[str, Any] = {"id": getattr(logger, "id", id), "step": 0, "evaluations": []}
            self._logged[name] = new if name == "tensorboard" else known or new
        self._write()
        for row in earlier:
            self.log(row)

    def close(self) -> None:
        """Close every logger; one that fails is named."""
        for name, logger in self._loggers.items():
            try:
                with _on_standard_error():
                    logger.close()
            except Exception as error:
                progress.say(f"report_to {name}: could not be closed ({error})")
        self._loggers = {}

    def log(self, row: dict[str, Any]) -> None:
        """Give every logger a row of metrics.jsonl, unless it has it already."""
        step = int(row["step"])
        numbers = {k: float(v) for k, v in row.items() if k not in ("step", "pairs")}
        for name in list(self._loggers):
            if self._is_logged(name, step, numbers):
                continue
            try:
                with _on_standard_error():
                    self._loggers[name].log(step, numbers)
            except Exception as error:
                del self._loggers[name]
                progress.say(
                    f"report_to {name}: failed at step {step} ({type(error).__name__}: {error}); "
                    "it is left out from here on, and metrics.jsonl has everything"
                )
                continue
            self._mark(name, step, numbers)

    def _is_logged(self, name: str, step: int, numbers: dict[str, float]) -> bool:
        """A resumed run computes the steps behind its checkpoint again, to the same bits."""
        logged = self._logged[name]
        if "loss" in numbers:
            return step <= logged["step"]
        return _key(step, numbers) in logged["evaluations"]

    def _mark(self, name: str, step: int, numbers: dict[str, float]) -> None:
        if "loss" in numbers:
            self._logged[name]["step"] = step
        else:
            self._logged[name]["evaluations"].append(_key(step, numbers))
        if name != "tensorboard":  # its entry begins anew with every start, as its files do
            self._write()

    def _write(self) -> None:
        """Whole or not at all; not synced to disk each time: at worst a row is told twice."""
        staging = self._path.with_name(f".{FILE}.{os.getpid()}")
        staging.write_text(json.dumps(self._logged), encoding="utf-8")
        staging.replace(self._path)


def _key(step: int, numbers: dict[str, float]) -> str:
    return f"{step} {hashlib.sha256(repr(sorted(numbers.items())).encode()).hexdigest()[:12]}"


def _read(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    try:
        logged = json.loads(path.read_text(encoding="utf-8"))
        for entry in logged.values():
            entry["id"], entry["step"] + 0, entry["evaluations"] + []
        return logged
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SmoldpoError(
            f"{path}: cannot be read ({error}); remove it, and the loggers begin a new run"
        ) from None


@contextlib.contextmanager
def _on_standard_error() -> Iterator[None]:
    """Some packages greet on standard output, which belongs to data."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
