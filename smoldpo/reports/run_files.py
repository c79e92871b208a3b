"""Reading a run folder back, without torch; damaged and absent files are named."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, TypeAdapter, ValidationError

from smoldpo.data.account import DataAccount
from smoldpo.evaluation.schema import Evaluation, Sample
from smoldpo.utils.errors import SmoldpoError, UsageError

T = TypeVar("T")


class Phase(BaseModel):
    """What one phase of a run took."""

    seconds: float
    peak_mb: float | None = None
    units: float | None = None
    unit: str = ""


def _bare_seconds(value: Any) -> Any:
    """Early runs wrote nothing but the seconds."""
    return {"seconds": value} if isinstance(value, int | float) else value


Phases = dict[str, Annotated[Phase, BeforeValidator(_bare_seconds)]]


class Environment(BaseModel, extra="allow"):
    """environment.json, as far as it has a shape."""

    smoldpo: str = "?"
    python: str = "?"
    libraries: dict[str, str] = {}
    command: list[str] = []
    """Empty where a Python program began the run."""
    started: str = ""
    sha256: dict[str, str] = {}


class Proven(BaseModel, extra="allow"):
    """How far an export is from the model (export/verify.py), as far as pages show it."""

    mean: float
    before: float
    after: float
    pairs: int


class Export(BaseModel, extra="allow"):
    """An entry of exports.json, as far as pages show it."""

    file: str
    to: str
    quantize: str
    bytes: int
    sha256: dict[str, str]
    verified: Proven


Row = dict[str, float | None]
"""A row of metrics.jsonl; a number that is not finite is read back from its text."""


@dataclass(frozen=True)
class RunFiles:
    """What stands in a run folder.

    Attributes:
        config_text: config.yaml as it stands.
        steps: rows of metrics.jsonl about training.
        checks: rows of metrics.jsonl about evaluation.
        absent: for each file that is not there, why.
    """

    folder: Path
    config: dict[str, Any]
    config_text: str
    environment: Environment
    data: DataAccount
    steps: list[Row]
    checks: list[Row]
    evaluation: Evaluation | None
    samples: list[Sample]
    timings: dict[str, Phase]
    exports: list[Export]
    absent: dict[str, str]

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name

    @property
    def seconds(self) -> float:
        """What all phases took together."""
        return sum(phase.seconds for phase in self.timings.values())

    @property
    def peak_mb(self) -> float | None:
        """The most memory that any phase took."""
        return max((p.peak_mb for p in self.timings.values() if p.peak_mb), default=None)


def read_run(folder: Path | str) -> RunFiles:
    """Everything that a run left in its folder.

    Raises:
        UsageError: there is no such folder, or it holds no run.
        SmoldpoError: the run took no step yet, or a file of it is damaged.
    """
    folder = Path(folder)
    _require_run(folder)
    config_text = _text(folder, "config.yaml")
    rows = _metrics(folder)
    steps = [row for row in rows if "loss" in row]
    if not steps:
        raise SmoldpoError(
            f"{folder}: this run is unfinished: metrics.jsonl holds no training step yet; wait for "
            "it, or train again with --overwrite"
        )
    config = _config(folder, config_text)
    absent = _absent(folder, config)

    def optional(name: str, kind: type[T], default: T) -> T:
        return default if name in absent else _checked(folder, name, kind, _object(folder, name))

    return RunFiles(
        folder=folder,
        config=config,
        config_text=config_text,
        environment=_checked(
            folder, "environment.json", Environment, _object(folder, "environment.json")
        ),
        data=optional("data.json", DataAccount, DataAccount()),
        steps=steps,
        checks=[row for row in rows if "eval_loss" in row],
        evaluation=None if "evaluation.json" in absent else _evaluation(folder, absent),
        samples=[]
        if "samples.jsonl" in absent
        else _checked(folder, "samples.jsonl", list[Sample], _rows(folder, "samples.jsonl")),
        timings=optional("timings.json", Phases, {}),
        exports=_exports(folder),
        absent=absent,
    )


OPTIONAL = ("data.json", "evaluation.json", "samples.jsonl", "timings.json")


def _require_run(folder: Path) -> None:
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; give a run folder, such as runs/<name>")
    for name in ("config.yaml", "environment.json"):
        if not (folder / name).is_file():
            raise UsageError(f"{folder}: holds no run: {name} is missing")
    if not (folder / "metrics.jsonl").is_file():
        raise SmoldpoError(
            f"{folder}: this run is unfinished: metrics.jsonl is missing; train again with "
            "--overwrite"
        )


def _exports(folder: Path) -> list[Export]:
    """What was exported from the run since it ended; nothing is the usual case."""
    name = "exports.json"
    if not (folder / name).is_file():
        return []
    try:
        written = json.loads(_text(folder, name))
    except (json.JSONDecodeError, RecursionError):
        raise _damaged(folder, name, "not JSON") from None
    return _checked(folder, name, list[Export], written)


def _metrics(folder: Path) -> list[Row]:
    rows = _checked(folder, "metrics.jsonl", list[Row], _rows(folder, "metrics.jsonl"))
    for number, row in enumerate(rows, 1):
        if row.get("step") is None:
            raise _damaged(folder, "metrics.jsonl", "no step", number)
    return rows


def _absent(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """For each optional file that is not there, a sentence that says why."""
    stopped = "The run did not reach its end."
    why = {name: stopped for name in OPTIONAL if not (folder / name).is_file()}
    if "evaluation.json" in why and not config.get("eval_data") and not config.get("eval_fraction"):
        why["evaluation.json"] = "No pairs were held out (eval_fraction: 0)."
    if "samples.jsonl" in why and "timings.json" not in why:
        why["samples.jsonl"] = "No samples were asked for."
    return why


def _evaluation(folder: Path, absent: dict[str, str]) -> Evaluation | None:
    written = _object(folder, "evaluation.json")
    if "accuracy" not in written and "before" in written:
        absent["evaluation.json"] = (
            "evaluation.json was written by an earlier smoldpo, without statistics."
        )
        return None
    return _checked(folder, "evaluation.json", Evaluation, written)


def _config(folder: Path, text: str) -> dict[str, Any]:
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise _damaged(folder, "config.yaml", "not YAML", mark and mark.line + 1) from None
    if not isinstance(config, dict):
        raise _damaged(folder, "config.yaml", "not `key: value` lines")
    return config


def _text(folder: Path, name: str) -> str:
    try:
        return (folder / name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged(folder, name, str(error)) from None


def _object(folder: Path, name: str) -> dict[str, Any]:
    try:
        value = json.loads(_text(folder, name))
    except (json.JSONDecodeError, RecursionError) as error:
        raise _damaged(folder, name, "not JSON", getattr(error, "lineno", None)) from None
    if not isinstance(value, dict):
        raise _damaged(folder, name, "not a JSON object")
    return value


def _rows(folder: Path, name: str) -> list[dict[str, Any]]:
    """JSON lines. A last line that was cut off, as when a process is killed, does not count."""
    whole, _, _ = _text(folder, name).rpartition("\n")
    rows = []
    for number, line in enumerate(whole.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            raise _damaged(folder, name, "not JSON", number) from None
        if not isinstance(row, dict):
            raise _damaged(folder, name, "not a JSON object", number)
        rows.append(row)
    return rows


def _checked(folder: Path, name: str, kind: type[T], value: Any) -> T:
    """`value` as a `kind`, or an error that names what is wrong in the file."""
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise _damaged(folder, name, f"{where}: {first['msg'].lower()}") from None


def _damaged(folder: Path, name: str, problem: str, row: int | None = None) -> SmoldpoError:
    where = f"{folder / name}, row {row}" if row else str(folder / name)
    return SmoldpoError(
        f"{where}: damaged, or written by another version of smoldpo ({problem}); "
        "put the file back, or make the run again"
    )
