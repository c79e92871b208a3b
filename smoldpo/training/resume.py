"""`smoldpo resume RUN`: an interrupted run goes on from its newest whole checkpoint, exactly."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

from smoldpo.config.load import build_config, load_yaml, to_yaml
from smoldpo.config.schema import TrainConfig
from smoldpo.training.checkpoint import Checkpoint, newest
from smoldpo.training.claim import claimed
from smoldpo.training.fingerprint import (
    Fingerprint,
    ResumeRecord,
    differences,
    other_machine,
    read_resume_record,
    write_resume_record,
)
from smoldpo.training.metrics_file import cut_back
from smoldpo.training.run import Run, RunResult
from smoldpo.training.run_inputs import load_inputs, require_seen
from smoldpo.training.sampler import Schedule
from smoldpo.utils import progress
from smoldpo.utils.distributed import world
from smoldpo.utils.errors import SmoldpoError, UsageError
from smoldpo.utils.files import write_text
from smoldpo.utils.rank_group import joined
from smoldpo.utils.signals import Interruption
from smoldpo.utils.threads import computing


def resume_training(folder: Path, extend: float | None = None) -> RunResult:
    """Go on with the run in `folder`; `extend` adds so many epochs to it.

    Raises:
        UsageError: no run that can be resumed, one that is finished, or one that began with
            something else than what is there now; each thing that differs is named.
        SmoldpoError: as run_training.
    """
    folder = folder.expanduser().absolute()
    with joined() as ranks, Interruption() as interruption:
        record, config = _read(folder, extend)
        with (
            in_folder(record.folder),
            claimed(folder) if ranks.first else contextlib.nullcontext(),
            computing(config.threads, config.nice),
        ):
            return _resume(folder, record, config, extend, interruption)


def _read(folder: Path, extend: float | None) -> tuple[ResumeRecord, TrainConfig]:
    record = read_resume_record(folder)
    return record, _config(folder, record.began, extend)


def _resume(
    folder: Path,
    record: ResumeRecord,
    config: TrainConfig,
    extend: float | None,
    interruption: Interruption,
) -> RunResult:
    began, ranks = record.began, world()
    inputs = load_inputs(config, began.computing.kernels)
    _require_same(folder, began, inputs.fingerprint, config, extend)
    total = Schedule.of(config, len(inputs.data.train)).total_steps
    require_seen(ranks, folder)
    checkpoint = newest(folder / "checkpoints", progress.say)
    _require_unfinished(folder, record, total, extend, checkpoint)
    step = checkpoint.step if checkpoint else 0
    if len(set(ranks.share(lambda: step))) > 1:
        raise SmoldpoError(f"{folder.name}: ranks read different checkpoints; resume it again")
    progress.say(f"resume: {folder.name} goes on after step {step:,} of {total:,}")
    extended_at = record.extended_at
    if extend:
        ranks.on_first(lambda: _write_extended(folder, record, config, step))
        extended_at = step
    if checkpoint and extended_at == step:
        checkpoint.state["best"]["since"] = 0  # patience begins anew
    rows = checkpoint.state["metrics_rows"] if checkpoint else 0
    ranks.on_first(lambda: cut_back(folder / "metrics.jsonl", rows))
    # On a GPU a pair's numbers depend on the pairs beside it, by rounding (docs/engine.md).
    exact = inputs.models.facts.device == "cpu" and not other_machine(began, inputs.fingerprint)
    return Run(folder, config, inputs, interruption, checkpoint=checkpoint, exact=exact).run()


def _config(folder: Path, began: Fingerprint, extend: float | None) -> TrainConfig:
    """The run's configuration with what was decided at its start; more epochs if extended."""
    settings = load_yaml(folder / "config.yaml")
    settings.setdefault("truncation", "tokens")  # a run from before there was a choice
    config = build_config(settings)
    computed = began.computing
    then = {
        "engine": computed.engine,
        "device": computed.device,
        "compile": "on" if computed.compiled else "off",
    }
    decided: dict[str, object] = {
        key: value for key, value in then.items() if getattr(config, key) == "auto"
    }
    decided |= {"output_dir": str(folder), "overwrite": False}
    if computed.engine == "plain":  # whose results depend on it
        decided["threads"] = computed.threads
    if extend is not None:
        settings = began.settings  # and not config.yaml's: a kill may have come between the two
        decided["num_train_epochs"] = settings["num_train_epochs"] + extend
        if settings["max_steps"] is not None:
            raise UsageError(
                f"{folder.name}: its length is max_steps, not epochs, so it cannot be extended by "
                "epochs; train anew with more --max-steps"
            )
    return config.model_copy(update=decided)


@contextlib.contextmanager
def in_folder(folder: str):
    """In the working folder of the run's start, so that relative names mean what they meant."""
    if Path(folder).is_dir():
        with contextlib.chdir(folder):
            yield
    else:
        yield


def _require_same(
    folder: Path,
    began: Fingerprint,
    now: Fingerprint,
    config: TrainConfig,
    extend: float | None,
) -> None:
    if extend is not None:
        length = {"num_train_epochs": config.num_train_epochs}
        began = began.model_copy(update={"settings": began.settings | length})
    found = differences(began, now)
    if found:
        raise UsageError(
            f"{folder.name}: cannot be resumed, it would not be the same run:\n"
            + "\n".join(f"  - {difference}" for difference in found)
            + "\nput it back as it was, or train anew"
        )
    if rounding := other_machine(began, now):
        version = began.machine.get("smoldpo", "of an unknown version")
        progress.say(
            f"resume: smoldpo {version} began this run; it goes on, perhaps not bit for bit, since "
            f"other things may round otherwise: {'; '.join(rounding)}"
        )


def _require_unfinished(
    folder: Path,
    record: ResumeRecord,
    total: int,
    extend: float | None,
    checkpoint: Checkpoint | None,
) -> None:
    finished = record.finished
    if finished and extend is None:
        raise UsageError(
            f"{folder.name}: is finished ({finished.total_steps:,} steps); "
            "smoldpo resume RUN --extend EPOCHS adds epochs"
        )
    if finished and checkpoint is None:
        raise SmoldpoError(
            f"{folder.name}: holds no checkpoint to go on from; runs keep their last one with "
            "--save-steps, or when they take longer than save_minutes"
        )
    if checkpoint and checkpoint.step > total:
        raise UsageError(f"{folder.name}: is at step {checkpoint.step:,} of {total:,} already")


def _write_extended(folder: Path, record: ResumeRecord, config: TrainConfig, step: int) -> None:
    """The longer length, in resume.json and config.yaml; in the latter nothing else changes.

    What the shorter run found is removed, lest it stand for the longer one's.
    """
    longer = {"num_train_epochs": config.num_train_epochs}
    began = record.began.model_copy(update={"settings": record.began.settings | longer})
    plain = build_config(load_yaml(folder / "config.yaml")).model_copy(update=longer)
    write_text(folder / "config.yaml", to_yaml(plain))
    changed = {"began": began, "finished": None, "extended_at": step}
    write_resume_record(folder, record.model_copy(update=changed))
    for name in ("evaluation.json", "samples.jsonl", "timings.json", "report.html"):
        (folder / name).unlink(missing_ok=True)


def check_epochs(epochs: float | None) -> None:
    """Refuse an extension that is none.

    Raises:
        UsageError: not a positive number.
    """
    if epochs is not None and not (epochs > 0 and math.isfinite(epochs)):
        raise UsageError(f"--extend is {epochs}; give the number of epochs to add, such as 1")
