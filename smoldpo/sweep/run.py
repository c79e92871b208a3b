"""A whole sweep: pairs, trials, the winner on the final pairs, results and page.

    SWEEP/sweep.json       what it began with; sweep.yaml the same for people
    SWEEP/data/            splits.py
    SWEEP/computing.json   shared.py
    SWEEP/trials/NNN/      trials.py
    SWEEP/best/            trials.py; final.json what it found
    SWEEP/results.json     results.py; results.csv, report.html

Each file is written whole, after what it speaks of. So a sweep goes on from whatever a kill has
left.
"""

from __future__ import annotations

import shlex
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smoldpo.config.schema import TrainConfig
from smoldpo.data.template_settings import today
from smoldpo.engine.cache import folder as cache
from smoldpo.evaluation.gates import failures, parse_gates
from smoldpo.evaluation.schema import Evaluation
from smoldpo.models.load import find_model
from smoldpo.sweep import space, splits
from smoldpo.sweep.report import write_page
from smoldpo.sweep.results import (
    DONE,
    FAILED,
    RUNNING,
    FinalResult,
    SplitFiles,
    SweepRecord,
    SweepResults,
    TrialRecord,
    collect,
    write_results,
)
from smoldpo.sweep.shared import SharedInputs
from smoldpo.sweep.spec import SweepSpec, build_spec, default_folder, differences
from smoldpo.sweep.trials import (
    BEST,
    SweepContext,
    folder_of,
    forget_checkpoints,
    measure_winner,
    read_final,
    read_record,
    run_trial,
)
from smoldpo.training.resume import in_folder
from smoldpo.training.run_folder import make_empty
from smoldpo.training.setup import load_data, preflight
from smoldpo.utils import progress
from smoldpo.utils.errors import ConfigError, SmoldpoError, UsageError
from smoldpo.utils.files import write_json, write_text
from smoldpo.utils.signals import InterruptedRunError, Interruption
from smoldpo.utils.text import format_seconds, percent
from smoldpo.utils.threads import computing

FILE, YAML, FORMAT = "sweep.json", "sweep.yaml", 1
CONTENTS = (
    FILE, YAML, "data", "computing.json", "trials", BEST, "final.json", "results.json",
    "results.csv", "report.html",
)  # fmt: skip
WITHOUT_ANSWERS: dict[str, Any] = {
    "generate_prompts": 0, "sample_prompt": None, "judges": [], "fail_under": [], "overwrite": False
}  # fmt: skip
"""Settings of trials: the winner alone generates answers."""


@dataclass(frozen=True)
class SweepResult:
    """What a sweep found, and where it is kept."""

    folder: Path
    results: SweepResults
    failed: list[str]
    """Each trial that failed, in words."""
    failed_gates: list[str]
    """What `fail_under` asked for and the winner does not have on the final pairs."""


def is_sweep(folder: Path) -> bool:
    """Whether a folder holds a sweep."""
    return (folder / FILE).is_file()


def run_sweep(spec: SweepSpec) -> SweepResult:
    """Do everything that `smoldpo sweep FILE` does; a sweep that has begun in its folder goes on.

    Raises:
        UsageError: the folder holds something else, or a sweep that began otherwise.
        SmoldpoError: data or models that cannot be read, or a full disk.
        InterruptedRunError: by SIGINT or SIGTERM; the sweep can go on.
    """
    common = spec.common
    preflight(common)
    folder = (
        Path(common.output_dir).expanduser() if common.output_dir else default_folder(spec.name)
    )
    if is_sweep(folder) and not common.overwrite:
        record = _read(folder)
        spec = spec.on_day(record.spec.get("template_date") or today())
        found = differences(record.spec, spec.as_plain())
        if found:
            raise UsageError(
                f"{folder}: holds a sweep that began otherwise:\n"
                + "\n".join(f"  - {difference}" for difference in found)
                + "\nput the file back as it was, give another --output-dir, or replace that sweep "
                "with --overwrite"
            )
        return _Sweep(folder, spec, record).run()
    spec = spec.on_day(today())
    _require_replaceable(folder, spec)
    _check_models(spec)
    make_empty(folder, reversed(CONTENTS))  # FILE last: until then it is a sweep, to be replaced
    record = SweepRecord(format=FORMAT, spec=spec.as_plain(), folder=str(Path.cwd()), data=None)
    write_json(folder / FILE, record.as_json())
    return _Sweep(folder, spec, record).run()


def resume_sweep(folder: Path) -> SweepResult:
    """Go on with the sweep in `folder`, or, where it is finished, draw its results anew.

    Raises:
        as run_sweep.
    """
    folder = folder.expanduser().absolute()
    record = _read(folder)
    plain = dict(record.spec)
    name = plain.pop("name")
    with in_folder(record.folder):
        spec = build_spec(plain, name)
        preflight(spec.common)
        return _Sweep(folder, spec, record).run()


def _read(folder: Path) -> SweepRecord:
    path = folder / FILE
    record = SweepRecord.read(path, "the sweep cannot go on")
    if record.format != FORMAT or "name" not in record.spec:
        raise SmoldpoError(
            f"{path}: its format is {record.format}, and this smoldpo reads {FORMAT}; the sweep "
            "cannot go on"
        )
    return record


def _require_replaceable(folder: Path, spec: SweepSpec) -> None:
    """That nothing but a sweep is replaced, and nothing that the sweep reads."""
    if folder.is_file():
        raise UsageError(f"output_dir {folder}: is a file; give a folder")
    if folder.is_dir() and any(folder.iterdir()) and not is_sweep(folder):
        raise UsageError(
            f"output_dir {folder}: holds something else; give a new or an empty folder"
        )
    common = spec.common
    for name in [*_models_of(spec), common.eval_data, *common.data]:
        path = Path(name or "").expanduser()
        if name and path.exists() and path.resolve().is_relative_to(folder.resolve()):
            raise UsageError(f"{name}: lies in output_dir {folder}, which this sweep would replace")


def _check_models(spec: SweepSpec) -> None:
    """That every model that trials name is there."""
    problems = []
    for name in _models_of(spec):
        try:
            find_model(name)
        except SmoldpoError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError(problems)


def _models_of(spec: SweepSpec) -> list[str]:
    """Every model that a trial may have as its policy or its reference, once each."""
    common = spec.common
    names: dict[str, None] = {}
    for setting in ("model", "reference"):
        part = spec.space.get(setting)
        values = getattr(part, "values", None) or [getattr(common, setting)]
        names |= dict.fromkeys(name for name in values if name is not None)
    return list(names)


class _Sweep:
    """A sweep, which goes on from what its folder holds."""

    def __init__(self, folder: Path, spec: SweepSpec, record: SweepRecord):
        self.folder, self.spec, self.record = folder, spec, record
        self.metric = spec.settings.metric
        self.total = spec.trials
        self.trials: list[TrialRecord] = []
        self.shared = SharedInputs(folder)

    def run(self) -> SweepResult:
        at = "at its beginning"
        common = self.spec.common
        threads = common.threads or self.shared.threads
        with (
            Interruption() as interruption,
            cache.sharing(),
            computing(threads, common.nice),
        ):
            try:
                self._prepare_pairs()
                context = SweepContext(self.folder, self.shared, self.metric, interruption)
                for number in range(1, self.total + 1):
                    at = f"in trial {number} of {self.total}"
                    self._run_trial(number, context)
                    interruption.check()
                at = "at the final pairs"
                if self._known_final() is None:  # lest a failure there hide what trials found
                    write_results(self.folder, self._results(None))
                final = self._final(context)
            except InterruptedRunError as stop:
                raise InterruptedRunError(
                    stop.number,
                    f"interrupted {at}; everything stays in {self.folder}; go on with: "
                    f"smoldpo resume {shlex.quote(str(self.folder))}",
                ) from None
        results = self._results(final)
        write_results(self.folder, results)
        with progress.spinner("drawing the report"):
            write_page(self.folder, results, self.spec.space)
        failed = [f"trial {r.number}: {r.error}" for r in self.trials if r.error]
        return SweepResult(self.folder, results, failed, self._failed_gates() if final else [])

    def _failed_gates(self) -> list[str]:
        """By the gates of now: a sweep may go on with others."""
        path = self.folder / BEST / "evaluation.json"
        advice = f"remove {path.parent}, and smoldpo resume measures the winner again"
        return failures(Evaluation.read(path, advice), parse_gates(self.spec.common.fail_under))

    def _prepare_pairs(self) -> None:
        if self.record.data is None:
            write_text(self.folder / YAML, self.spec.as_yaml())
            data = load_data(self.spec.common)
            found = splits.split_held_out(data, self.spec.settings.final_fraction)
            self.record.data = splits.write_splits(self.folder, found)
            write_json(self.folder / FILE, self.record.as_json())
        files = self._files
        splits.require_same_files(self.folder, files)
        progress.say(
            f"pairs: {files.train.pairs:,} to train on, {files.validation.pairs:,} to rank trials "
            f"on, {files.final.pairs:,} for the winner alone"
        )

    @property
    def _files(self) -> SplitFiles:
        assert self.record.data is not None, "the pairs are written first"
        return self.record.data

    def _run_trial(self, number: int, context: SweepContext) -> None:
        known = read_record(self.folder, number)
        if known is not None and known.status != RUNNING:
            self.trials.append(known)
            self._keep_best_checkpoint()
            return
        settings = known.settings if known else self._settings(number)
        progress.say(
            f"trial {number} of {self.total}: {space.settings_text(settings)}{self._time_left()}"
        )
        best = self._best()
        try:
            config = self._config(number, settings, "validation").model_copy(update=WITHOUT_ANSWERS)
        except ConfigError as error:  # of a method that makes its trials as it goes
            record = TrialRecord(number=number, settings=settings, status=FAILED, error=str(error))
        else:
            record = run_trial(context, number, settings, config, best.value if best else None)
        self.trials.append(record)
        self._keep_best_checkpoint()
        self._say_result(record)

    def _settings(self, number: int) -> dict[str, Any]:
        planned = self.spec.planned()
        if planned is not None:
            return planned[number - 1]
        propose = space.by_optuna(self.spec.space, self.spec.settings.sampler_seed)
        return propose([space.PastTrial(r.settings, r.value) for r in self.trials])

    def _config(self, number: int, settings: dict[str, Any], held_out: str) -> TrainConfig:
        config = self.shared.settle_auto(self.spec.config(settings))
        more = splits.data_settings(self.folder, self._files, held_out)
        return config.model_copy(update=more | {"output_dir": str(folder_of(self.folder, number))})

    def _best(self) -> TrialRecord | None:
        """The best trial so far; of equal ones the first."""
        done = [record for record in self.trials if record.status == DONE]
        return max(done, key=lambda record: record.value or 0.0, default=None)

    def _keep_best_checkpoint(self) -> None:
        best = self._best()
        for record in self.trials:
            if record is not best:
                forget_checkpoints(self.folder, record.number)

    def _say_result(self, record: TrialRecord) -> None:
        text = f"trial {record.number} of {self.total}: "
        if record.error is not None:
            progress.say(f"{text}failed: {record.error}")
            return
        after, best = record.estimate(self.metric), self._best()
        assert after is not None and best is not None
        text += percent(after.value)
        if after.low is not None:
            text += f" ({percent(after.low)} to {percent(after.high)})"
        other = f"the best: trial {best.number}, {percent(best.value)}"
        progress.say(f"{text}; {'the best so far' if best is record else other}")

    def _time_left(self) -> str:
        """By the median of finished trials: the first one computes what the others share."""
        seconds = [r.seconds for r in self.trials if r.status == DONE and r.seconds is not None]
        if not seconds:
            return ""
        left = statistics.median(seconds) * (self.total - len(self.trials))
        return f" (about {format_seconds(left)} left)"

    def _final(self, context: SweepContext) -> FinalResult | None:
        best, known = self._best(), self._known_final()
        if best is None or known is not None:
            return known
        trained = self._config(best.number, best.settings, "validation").model_copy(
            update={"output_dir": str(self.folder / BEST), "overwrite": False}
        )
        final = {"eval_data": str(splits.split_file(self.folder, "final"))}
        measured = trained.model_copy(update=final)
        return measure_winner(context, best.number, trained, measured)

    def _known_final(self) -> FinalResult | None:
        best = self._best()
        return read_final(self.folder, best.number) if best else None

    def _results(self, final: FinalResult | None) -> SweepResults:
        done = [record.number for record in self.trials if record.status == DONE]
        about = {
            "name": self.spec.name,
            "metric": self.metric,
            "method": self.spec.settings.method,
            "planned": self.total,
            "train": self._files.train,
            "validation": self._files.validation,
            "final_pairs": self._files.final,
        }
        folders = {number: folder_of(self.folder, number) for number in done}
        return collect(about, self.trials, folders, final)
