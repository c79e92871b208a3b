"""A whole run: data, policy and reference, accuracy before, training, the model, accuracy after."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from smoldpo.config.schema import TrainConfig
from smoldpo.data.template_settings import today
from smoldpo.engine.batch_budget import fit_budget, retry_with_smaller_budget
from smoldpo.engine.cache import folder as cache
from smoldpo.evaluation.gates import failures
from smoldpo.evaluation.metrics import PairScore, pair_scores
from smoldpo.evaluation.schema import Evaluation
from smoldpo.reports.html import write_report
from smoldpo.reports.model_card import model_card
from smoldpo.reports.run_files import read_run
from smoldpo.training import display
from smoldpo.training.checkpoint import Checkpoint
from smoldpo.training.checkpointer import Checkpointer, require_disk
from smoldpo.training.claim import claimed
from smoldpo.training.final_evaluation import Scores
from smoldpo.training.fingerprint import mark_finished, write_beginning
from smoldpo.training.loggers import Reporting
from smoldpo.training.loop import NotFiniteError, loss_function, train
from smoldpo.training.metrics_file import MetricsFile, read_rows
from smoldpo.training.moved import StartingWeights
from smoldpo.training.phases import PhaseTimer, RunPhases
from smoldpo.training.run_folder import (
    choose_folder,
    make_folder,
    remove_partial_files,
    write_not_finite,
    write_start,
)
from smoldpo.training.run_inputs import RunInputs, load_inputs, require_seen
from smoldpo.training.sampler import Schedule
from smoldpo.training.state import TrainingState
from smoldpo.training.step_metrics import evaluation_metrics
from smoldpo.types import PairLogps, TokenizedPair, no_progress
from smoldpo.utils import progress
from smoldpo.utils.distributed import RankLostError, world
from smoldpo.utils.errors import SmoldpoError
from smoldpo.utils.files import write_json, write_text
from smoldpo.utils.memory import free_memory, trim_memory
from smoldpo.utils.rank_group import joined
from smoldpo.utils.rng import seed_everything
from smoldpo.utils.signals import InterruptedRunError, Interruption
from smoldpo.utils.threads import computing


@dataclass
class RunResult:
    """What a run found out, and where it is kept."""

    folder: Path
    steps: int
    record: Evaluation | None
    """None without held-out pairs."""
    sample: dict[str, Any] | None
    report: Path | None
    failed_gates: list[str]
    """What `fail_under` asked for and the run does not have, in words."""

    @property
    def evaluation(self) -> dict[str, Any] | None:
        """evaluation.json as a dictionary; None without held-out pairs."""
        return None if self.record is None else self.record.as_json()


def run_training(
    config: TrainConfig,
    interruption: Interruption | None = None,
    command: list[str] | None = None,
    picked: dict[str, Any] | None = None,
) -> RunResult:
    """Do everything that `smoldpo train` does, once freeze_layers is settled.

    Args:
        interruption: how signals are answered; by default as a program of its own answers them.
        command: the command line, for environment.json and the report; None where a Python program
            calls.
        picked: how freeze_layers auto became a number, where it did, for environment.json.

    Raises:
        SmoldpoError: whatever is wrong with settings, data, model or disk; see each part.
        InterruptedRunError: by SIGINT or SIGTERM, after a checkpoint was saved.
    """
    with (
        joined() as ranks,
        interruption or Interruption() as interruption,
        computing(config.threads, config.nice),
    ):
        day, name = ranks.of_first(
            lambda: (config.template_date or today(), str(choose_folder(config)))
        )
        config, folder = config.model_copy(update={"template_date": day}), Path(name)
        with claimed(folder) if ranks.first else contextlib.nullcontext():
            inputs = load_inputs(config)

            def begin() -> None:
                require_disk(folder, config, inputs.models, inputs.data)
                make_folder(folder, [*config.data, config.eval_data or ""])
                write_start(folder, config, inputs.models, inputs.data.account, command, picked)
                write_beginning(folder, inputs.fingerprint)

            ranks.on_first(begin)
            require_seen(ranks, folder)
            return Run(folder, config, inputs, interruption).run()


@dataclass(frozen=True)
class RunOptions:
    """What a run leaves out, and what it calls on its way.

    Attributes:
        train: False goes on with the policy of the checkpoint as it is: it is measured and saved.
        save_model: whether the model and its cards are written.
        write_report: whether report.html is drawn.
        checkpoints: where they are; by default in the run folder.
        after_step: called with the run after each optimizer step, its evaluation and its
            checkpoint.
        evaluated: called with the run and what evaluation.json holds, before answers are drawn.
    """

    train: bool = True
    save_model: bool = True
    write_report: bool = True
    checkpoints: Path | None = None
    after_step: Callable[[Run], None] = lambda *_: None
    evaluated: Callable[[Run, Evaluation], None] = lambda *_: None


class Run:
    """The part of a run after everything is loaded: evaluation, training, the model, evaluation.

    Args:
        options: what is left out or added.
        checkpoint: where the run goes on; None at its beginning.
        exact: whether it must go on to the last bit, being on the machine where it began.
    """

    def __init__(
        self,
        folder: Path,
        config: TrainConfig,
        inputs: RunInputs,
        interruption: Interruption,
        options: RunOptions | None = None,
        *,
        checkpoint: Checkpoint | None = None,
        exact: bool = True,
    ):
        self.folder, self.config = folder, config
        self.options = options = options or RunOptions()
        self.ranks = world()
        if self.ranks.first:
            remove_partial_files(folder)
        self.models, self.data, self.gates = inputs.models, inputs.data, inputs.gates
        self.final_evaluation = inputs.final_evaluation
        self.interruption, self.checkpoint, self.exact = interruption, checkpoint, exact
        self.steps = 0
        self.phases = RunPhases.of(config, len(self.data.train), len(self.data.eval))
        self.timer = PhaseTimer(interruption.checking)
        self.metrics = self._metrics_file(folder / "metrics.jsonl")
        self.engine = self.models.engine
        self.state = TrainingState(self.engine, config, self.models.trainable.rates)
        checkpoints = options.checkpoints or folder / "checkpoints"
        self.checkpointer = Checkpointer(checkpoints, config, self.state, self.metrics)
        self.reference_logps: PairLogps | None = None
        self.latest: dict[str, float] = {}
        """The last evaluation."""

    def _metrics_file(self, path: Path) -> MetricsFile:
        reporting = None
        if not self.ranks.first:
            return MetricsFile(Path(os.devnull))
        if self.config.report_to:
            settings = self.config.model_dump()
            reporting = Reporting(self.config.report_to, self.folder, settings, read_rows(path))
        return MetricsFile(path, reporting)

    def run(self) -> RunResult:
        """Every phase, and what came of them.

        Raises:
            InterruptedRunError: by SIGINT or SIGTERM, after a checkpoint was saved.
            SmoldpoError: as the phases; a loss or gradient that is not finite, among others.
        """
        with self.interruption.deferred():
            try:
                return self._run()
            except InterruptedRunError as stop:
                raise self._stopped(stop) from None
            except NotFiniteError as error:
                raise self._not_finite(error) from None
            except RankLostError as lost:
                raise self._rank_lost(lost) from None
            finally:
                self.metrics.close()

    def _stopped(self, stop: InterruptedRunError) -> InterruptedRunError:
        """Save where the run is, and say how to go on."""
        self.ranks.stopped_by(lambda: None)
        if not self.checkpoint:  # else the policy still is at its start, and that checkpoint stands
            self.checkpointer.save()
        return InterruptedRunError(stop.number, f"interrupted {self._how_to_go_on()}")

    def _how_to_go_on(self) -> str:
        step = self.checkpoint.step if self.checkpoint else self.state.step
        return (
            f"after {step} steps; everything stays in {self.folder}; "
            f"go on with: smoldpo resume {shlex.quote(str(self.folder))}"
        )

    def _rank_lost(self, lost: RankLostError) -> RankLostError:
        """The first rank saves where the run is: ranks meet between steps and within them alone."""
        if self.ranks.first and not self.checkpoint and not self.state.shared_out:
            self.checkpointer.write()
        return RankLostError(f"{lost}\nstopped {self._how_to_go_on()}")

    def _not_finite(self, error: NotFiniteError) -> SmoldpoError:
        facts, tokenizer = error.facts, self.models.tokenizer
        path = self.ranks.of_first(
            lambda: str(write_not_finite(self.folder, facts, error.pairs, tokenizer))
        )
        return SmoldpoError(f"{error}\ntheir texts and tokens are in {path}")

    def _run(self) -> RunResult:
        seed_everything(self.config.seed)
        self.engine.workers.lower(min(self.ranks.share(lambda: self.engine.workers.count)))
        self._prepare()
        before = self._evaluate_before()
        start = StartingWeights(self.engine.trainable_parameters())
        if self.checkpoint is not None:  # the reference is known: the policy may leave its start
            self.state.restore(self.checkpoint)
            self.steps, self.checkpoint = self.state.step, None
        if self.options.train:
            self._train()
        self._restore_best()
        self.checkpointer.end_training()
        self.models.gather_trained()
        if self.ranks.first:
            start.require_moved(self.engine.trainable_parameters(), self.folder / "metrics.jsonl")
            if self.options.save_model:  # before anything else can go wrong
                self._save_model()
        after = self._evaluate("evaluating after") if self.phases.after else None
        if not self.ranks.first:  # what is left the first rank does by itself
            return RunResult(self.folder, self.steps, None, None, None, [])
        return self._finish(before, after)

    def _finish(self, before: Scores | None, after: Scores | None) -> RunResult:
        """What both evaluations say, answers of both models, and the pages."""
        evaluation = self.final_evaluation.write_analysis(self.folder, before, after)
        if self.options.save_model:
            self._write_cards(evaluation)
        if evaluation is not None:
            self.options.evaluated(self, evaluation)
        self.engine.release_frozen(rest=True)
        with self.state.averaged():
            sample = self.final_evaluation.write_side_by_side(
                self.folder, evaluation, before, after, self.timer
            )
        if self.options.save_model:  # once more, with what the answers are like
            self._write_cards(evaluation)
        self.metrics.close()
        write_json(self.folder / "timings.json", self.timer.rows)
        mark_finished(self.folder, self.phases.steps)
        report = self._write_report() if self.options.write_report else None
        failed = failures(evaluation, self.gates) if evaluation else []
        return RunResult(self.folder, self.steps, evaluation, sample, report, failed)

    def _write_cards(self, evaluation: Evaluation | None) -> None:
        card = model_card(self.config, evaluation, len(self.data.train), self.steps)
        for folder in (self.folder, self.folder / "model", self.folder / "adapter"):
            if folder.is_dir():
                write_text(folder / "README.md", card)

    def _write_report(self) -> Path | None:
        """The page; all that it shows is saved already, so that a run does not fail for it."""
        path = self.folder / "report.html"
        try:
            with progress.spinner("drawing the report"):
                write_report([read_run(self.folder)], path)
        except (ImportError, MemoryError, SmoldpoError) as error:
            progress.say(
                f"the report could not be drawn ({error}); later, smoldpo report {self.folder} "
                "draws it"
            )
            return None
        return path

    def _prepare(self) -> None:
        """The first pass over all pairs: the engine computes what it keeps."""
        pairs = self.data.train + self.data.eval
        with self.timer.phase(self.phases.first_pass, len(pairs)) as advance:
            retry_with_smaller_budget(
                lambda: self.engine.prepare(pairs, advance), self.engine, pairs, "the first pass"
            )
        self.engine.release_frozen()
        trim_memory()
        folders = self.models.cache_folders if self.ranks.local_rank == 0 else set()
        for entry in cache.trim(self.config.cache_limit * 1e9, folders) if folders else ():
            progress.say(
                f"cache: over its limit, so {entry.folder} was removed ({entry.bytes:,} bytes)"
            )
        self._check_reference(pairs)

    def _check_reference(self, pairs: list[TokenizedPair]) -> None:
        """The reference of a run that goes on is the one that it began with, to the last bit."""
        digest = self.engine.reference_sha256(pairs)
        self.checkpointer.extra_state["reference_sha256"] = digest
        then = self.checkpoint.state.get("reference_sha256") if self.checkpoint else digest
        if self.exact and then not in (digest, None):
            raise SmoldpoError(
                "the reference's log-probabilities are not those that the run began with, though "
                "model, data and machine are; try smoldpo cache clear, and report it if that does "
                "not help"
            )

    def _evaluate_before(self) -> list[PairScore] | None:
        """The policy's scores of the held-out pairs before training; None without such pairs."""
        title = "evaluating before"
        if self.phases.reference_before:
            self.reference_logps = self._score(title, self.engine.reference_logps)
            if not self.phases.policy_before:
                # The policy still is the reference: its log-probabilities are these.
                return self._log_evaluation(self.reference_logps)
            title = "evaluating the policy before"
        return self._evaluate(title) if self.phases.policy_before else None

    def _score(self, title: str, logps: Callable[..., PairLogps]) -> PairLogps:
        """Log-probabilities of the held-out pairs, as a phase of its own."""
        pairs = self.data.eval
        with self.timer.phase(title, len(pairs)) as advance:
            return retry_with_smaller_budget(
                lambda: logps(pairs, advance), self.engine, pairs, "evaluation"
            )

    def _evaluate(self, title: str) -> list[PairScore]:
        with self.state.averaged():
            policy = self._score(title, self.engine.policy_logps)
        return self._log_evaluation(policy)

    def _log_evaluation(self, policy: PairLogps) -> list[PairScore]:
        reference, config, pairs = self.reference_logps, self.config, self.data.eval
        scores = pair_scores(pairs, policy, reference)
        loss = loss_function(config, config.last_beta)
        eval_loss = loss(policy, reference, pairs, pairs).double().mean().item()
        row: dict[str, Any] = {"step": self.steps, "eval_loss": eval_loss}
        found = evaluation_metrics(pairs, scores, policy, reference, loss, config.last_beta)
        row |= {f"eval_{k}": v for k, v in found.items()}
        if not (self.checkpoint and self.checkpoint.state["metrics_rows"]):
            # Of a run that goes on, the evaluation before is in the file already.
            self.metrics.log(row)
        self.latest = row
        return scores

    def _train(self) -> None:
        if self.steps and self._evaluate_if_due():
            return
        if not self.steps:  # a run that goes on has the budget that it had
            self._fit_memory()
        view = partial(
            display.training, step=lambda: self.state.figures, evaluation=lambda: self.latest
        )
        with self.timer.phase("training", self.phases.steps - self.steps, "steps", view) as advance:
            train(
                self.engine,
                self.data.train,
                self.config,
                self.metrics,
                starts_at_reference=self.config.reference is None,
                after_step=self._after_step,
                watch=advance,
                state=self.state,
                advance=self.interruption.checking(no_progress),
            )

    def _fit_memory(self) -> None:
        """On a CPU; a GPU says that its memory ran out, and nothing is lost then."""
        device = torch.device(self.models.facts.device)
        if device.type == "cpu" and not self.state.shared_out:
            per_step = Schedule.of(self.config, len(self.data.train)).pairs_per_step
            free = min(self.ranks.share(lambda: free_memory(device) // self.ranks.local_size))
            fit_budget(self.engine, self.data.train, per_step, self.state.step_bytes, free)

    def _after_step(self, steps: int) -> bool:
        self.steps = steps
        enough = self._evaluate_if_due()
        self.checkpointer.after_step(last=enough or steps == self.phases.steps)
        self.options.after_step(self)
        self.interruption.check()
        return enough

    def _evaluate_if_due(self) -> bool:
        """Evaluate after the steps that ask for it, and follow the best; whether to stop early."""
        config, state, steps = self.config, self.state, self.steps
        if steps in self.phases.evaluations and state.evaluated != steps:
            self._evaluate(f"evaluating at step {steps}")
            state.evaluated = steps
            if state.best.update(steps, self.latest) and config.load_best_model_at_end:
                self.checkpointer.save()
        enough = steps < self.phases.steps and state.best.exhausted(config.early_stopping_patience)
        if enough:
            progress.say(
                f"stopped early: {state.best.since} evaluations without a better "
                f"{state.best.metric} than {state.best.value:.4g} after step {state.best.step}"
            )
        return enough

    def _restore_best(self) -> None:
        """If asked, the policy goes back to its best evaluation; nothing is left to save then."""
        state = self.state
        if self.config.load_best_model_at_end and state.best.step not in (None, state.step):
            self.checkpointer.save()
            self.steps = self.checkpointer.restore_best()
            progress.say(
                f"best: the policy of step {self.steps}, {state.best.metric} {state.best.value:.4g}"
            )

    def _save_model(self) -> None:
        card = model_card(self.config, None, len(self.data.train), self.steps)
        self.engine.release_frozen(rest=True)  # the model is loaded once more
        with progress.spinner("saving model"), self.state.averaged():
            self.models.save(self.folder, card, self.config.merge)
