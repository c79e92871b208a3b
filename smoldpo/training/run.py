"""A whole run: data, policy and reference, accuracy before, training, the model, accuracy after."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from smoldpo.config.checks import require_sync
from smoldpo.config.load import to_yaml
from smoldpo.config.losses import needs_reference
from smoldpo.config.schema import TrainConfig
from smoldpo.data.load import TrainingData
from smoldpo.engine.batch_budget import fit_budget, retry_with_smaller_budget
from smoldpo.engine.cache import folder as cache
from smoldpo.evaluation.gates import failures
from smoldpo.evaluation.metrics import (
    PairScore,
    accuracies,
    logp_metrics,
    pair_scores,
    reward_metrics,
)
from smoldpo.reports.html import write_report
from smoldpo.reports.model_card import model_card
from smoldpo.reports.run_files import read_run
from smoldpo.training import display
from smoldpo.training.checkpoint import Checkpoint
from smoldpo.training.checkpointer import Keeper, require_disk
from smoldpo.training.display import Phases
from smoldpo.training.final_evaluation import Proof, question_of
from smoldpo.training.fingerprint import fingerprint, mark_finished, write_beginning
from smoldpo.training.loggers import MetricsFile, Reporting, read_rows
from smoldpo.training.loop import NotFiniteError, loss_function, train
from smoldpo.training.policy_and_reference import Models
from smoldpo.training.run_folder import choose_folder, environment, make_folder, sweep_leftovers
from smoldpo.training.sampler import Schedule
from smoldpo.training.setup import TokenizedData, load_data, load_models, preflight, tokenize
from smoldpo.training.state import TrainingState
from smoldpo.types import PairLogps, TokenizedPair, no_progress
from smoldpo.utils import progress
from smoldpo.utils.errors import SmoldpoError, UsageError
from smoldpo.utils.files import write_json, write_text
from smoldpo.utils.memory import free_memory, trim_memory
from smoldpo.utils.rng import seed_everything
from smoldpo.utils.signals import InterruptedRunError, Interruption


@dataclass
class RunResult:
    """What a run found out, and where it is kept."""

    folder: Path
    steps: int
    evaluation: dict[str, Any] | None
    sample: dict[str, Any] | None
    report: Path | None
    failed_gates: list[str]
    """What `fail_under` asked for and the run does not have, in words."""


@dataclass
class Loaded:
    """Everything that a run works with, and the fingerprint of it (fingerprint.py)."""

    models: Models
    data: TokenizedData
    proof: Proof
    gates: dict[str, float]
    fingerprint: dict[str, Any]


def run_training(
    config: TrainConfig,
    interruption: Interruption | None = None,
    command: list[str] | None = None,
    picked: dict[str, Any] | None = None,
) -> RunResult:
    """Do everything that `smoldpo train` does, once freeze_layers is settled.

    Args:
        interruption: how signals are answered; by default as a program of its own answers them.
        command: the command line, for environment.json and the report; None where a Python program calls.
        picked: how freeze_layers auto became a number, where it did, for environment.json.

    Raises:
        SmoldpoError: whatever is wrong with settings, data, model or disk; see each part.
        InterruptedRunError: by SIGINT or SIGTERM, after a checkpoint was saved.
    """
    with interruption or Interruption() as interruption:
        folder = choose_folder(config)
        loaded = load_everything(config)
        require_disk(folder, config, loaded.models, loaded.data)
        make_folder(folder, [*config.data, config.eval_data or ""])
        write_start(folder, config, loaded.models, loaded.data, command, picked)
        write_beginning(folder, loaded.fingerprint)
        return Run(folder, config, loaded, interruption).go()


def load_everything(
    config: TrainConfig,
    computing: dict[str, Any] | None = None,
    read: Callable[..., TrainingData] = load_data,
    encode: Callable[..., TokenizedData] = tokenize,
) -> Loaded:
    """Data, models and tokens; `computing` is that of a fingerprint, for a run that goes on.

    Args:
        read, encode: do what `load_data` and `tokenize` do; the trials of a sweep share theirs.
    """
    if config.freeze_layers == "auto":
        raise UsageError(
            "freeze_layers auto is settled by smoldpo train alone, one run at a time: give a number here, "
            "such as the one that smoldpo plan shows"
        )
    judges, gates = preflight(config)
    data = read(config)
    require_sync(config, Schedule.of(config, len(data.train)).total_steps)
    models = load_models(config, data, computing["kernels"] if computing else None)
    tokenized = encode(config, models, data)
    proof = Proof(config, models, tokenized, question_of(config, models), judges)
    known = fingerprint(config, models, data, tokenized)
    return Loaded(models, tokenized, proof, gates, known)


def write_start(
    folder: Path,
    config: TrainConfig,
    models: Models,
    tokenized: TokenizedData,
    command: list[str] | None,
    picked: dict[str, Any] | None = None,
) -> None:
    """What a run folder holds from its beginning: settings as decided, the machine, the data's account.

    Args:
        command: that began it; None where a Python program did.
        picked: how freeze_layers auto became a number, where it did.
    """
    decided = {
        "overwrite": False,
        "freeze_layers": None if config.train_layers else models.frozen_layers,
        "dtype": str(models.dtype).removeprefix("torch."),
    }
    write_text(folder / "config.yaml", to_yaml(config.model_copy(update=decided)))
    machine = environment(
        torch.get_num_threads(),
        models.device,
        str(models.dtype).removeprefix("torch."),
        models.hashes,
        command,
    )
    how = {"freeze_layers_auto": picked} if picked else {}
    write_json(folder / "environment.json", machine | models.decided | how)
    write_json(folder / "data.json", tokenized.account)


class Run:
    """The part of a run after everything is loaded: before, train, save, after.

    Args:
        checkpoint: where the run goes on; None at its beginning.
        exact: whether it must go on to the last bit, being on the machine where it began.
    """

    def __init__(
        self,
        folder: Path,
        config: TrainConfig,
        loaded: Loaded,
        interruption: Interruption,
        checkpoint: Checkpoint | None = None,
        exact: bool = True,
    ):
        self.folder, self.config = folder, config
        sweep_leftovers(folder)
        self.models, self.data, self.proof = loaded.models, loaded.data, loaded.proof
        self.gates = loaded.gates
        self.interruption, self.checkpoint, self.exact = interruption, checkpoint, exact
        self.steps = 0
        self.phases = Phases(interruption.checking)
        self.metrics = self._metrics_file(folder / "metrics.jsonl")
        self.engine = self.models.engine
        self.state = TrainingState(self.engine, config, self.models.rates)
        self.keeper = Keeper(folder / "checkpoints", config, self.state, self.metrics)
        self.compares = needs_reference(config.loss_type)
        """Whether there is a reference; a loss without one has no implicit reward either."""
        self.reference_logps: PairLogps | None = None
        self.latest: dict[str, float] = {}
        """The last evaluation."""
        self.total = Schedule.of(config, len(self.data.train)).total_steps

    def _metrics_file(self, path: Path) -> MetricsFile:
        reporting = None
        if self.config.report_to:
            settings = self.config.model_dump()
            reporting = Reporting(self.config.report_to, self.folder, settings, read_rows(path))
        return MetricsFile(path, reporting)

    def go(self) -> RunResult:
        with self.interruption.deferred():
            try:
                return self._go()
            except InterruptedRunError as stop:
                raise self._stopped(stop) from None
            except NotFiniteError as error:
                raise keep_not_finite(self.folder, error, self.models.tokenizer) from None
            finally:
                self.metrics.close()

    def _stopped(self, stop: InterruptedRunError) -> InterruptedRunError:
        """Save where the run is, and say how to go on."""
        step = self.checkpoint.step if self.checkpoint else self.state.step
        if not self.checkpoint:  # else the policy still is at its start, and that checkpoint stands
            self.keeper.save()
        return InterruptedRunError(
            stop.number,
            f"interrupted after {step} steps; everything stays in {self.folder}; "
            f"go on with: smoldpo resume {shlex.quote(str(self.folder))}",
        )

    def _go(self) -> RunResult:
        seed_everything(self.config.seed)
        self._prepare()
        before = self._evaluate_before() if self.data.eval else None
        self._restore()
        self._train()
        self._take_best()
        self.keeper.training_is_over()
        self._save()  # before anything else can go wrong
        after = self._evaluate("evaluating after") if self.data.eval else None
        evaluation = self.proof.write_analysis(self.folder, before, after)
        self._evaluated(evaluation)
        self.engine.release_frozen(rest=True)
        with self.state.averaged():
            sample = self.proof.write_side_by_side(
                self.folder, evaluation, before, after, self.phases
            )
        self.metrics.close()
        write_json(self.folder / "timings.json", self.phases.rows)
        mark_finished(self.folder, self.total)
        report = self._report()
        failed = failures(evaluation, self.gates) if evaluation else []
        return RunResult(self.folder, self.steps, evaluation, sample, report, failed)

    def _evaluated(self, evaluation: dict[str, Any] | None) -> None:
        """What is written as soon as the figures are known."""
        card = model_card(self.config, evaluation, len(self.data.train), self.steps)
        write_text(self.folder / "README.md", card)
        for name in ("model", "adapter"):
            if (self.folder / name).is_dir():
                write_text(self.folder / name / "README.md", card)

    def _report(self) -> Path | None:
        """The page; all that it shows is saved already, so that a run does not fail for it."""
        path = self.folder / "report.html"
        try:
            with progress.spinner("drawing the report"):
                write_report([read_run(self.folder)], path)
        except (ImportError, MemoryError, SmoldpoError) as error:
            progress.say(
                f"the report could not be drawn ({error}); later, smoldpo report {self.folder} draws it"
            )
            return None
        return path

    def _prepare(self) -> None:
        pairs = self.data.train + self.data.eval
        title = "trunk and reference" if self.compares else "trunk"
        with self.phases.phase(title, len(pairs)) as advance:
            self._sparing(lambda: self.engine.prepare(pairs, advance), pairs, "the first pass")
        self.engine.release_frozen()
        trim_memory()
        kept_in = self.models.kept_in
        for entry in cache.trim(self.config.cache_limit * 1e9, kept_in) if kept_in else ():
            progress.say(
                f"cache: over its limit, so {entry.folder} was removed ({entry.bytes:,} bytes)"
            )
        self._check_reference(pairs)

    def _check_reference(self, pairs: list[TokenizedPair]) -> None:
        """The reference of a run that goes on is the one that it began with, to the last bit."""
        digest = self.engine.reference_sha256(pairs)
        self.keeper.more["reference_sha256"] = digest
        then = self.checkpoint.state.get("reference_sha256") if self.checkpoint else digest
        if self.exact and then not in (digest, None):
            raise SmoldpoError(
                "the reference's log-probabilities are not those that the run began with, though model, "
                "data and machine are; try smoldpo cache clear, and report it if that does not help"
            )

    def _sparing(self, work: Any, pairs: list[TokenizedPair], what: str) -> Any:
        return retry_with_smaller_budget(work, self.engine, pairs, what)

    def _evaluate_before(self) -> list[PairScore]:
        pairs = self.data.eval
        if not self.compares:
            return self._evaluate("evaluating before")
        with self.phases.phase("evaluating before", len(pairs)) as advance:
            self.reference_logps = self._sparing(
                lambda: self.engine.reference_logps(pairs, advance), pairs, "evaluation"
            )
        if self.config.reference is None and not self.config.use_weighting:
            # The policy still is the reference: its log-probabilities are these.
            return self._scored(self.reference_logps)
        return self._evaluate("evaluating the policy before")

    def _evaluate(self, title: str) -> list[PairScore]:
        pairs = self.data.eval
        with self.phases.phase(title, len(pairs)) as advance, self.state.averaged():
            policy = self._sparing(
                lambda: self.engine.policy_logps(pairs, advance), pairs, "evaluation"
            )
        return self._scored(policy)

    def _scored(self, policy: PairLogps) -> list[PairScore]:
        reference, config, pairs = self.reference_logps, self.config, self.data.eval
        scores = pair_scores(pairs, policy, reference)
        loss = loss_function(config, config.last_beta)
        row = {"eval_loss": loss(policy, reference, pairs, pairs).double().mean().item()}
        # Under TRL's names is what the loss compares; accuracies and evaluation.json are of whole answers.
        against = None if reference is None else loss.compared(reference)
        seen = pair_scores(pairs, loss.compared(policy), against)
        means = reward_metrics(seen, config.last_beta) if self.compares else logp_metrics(seen)
        row |= {f"eval_{k}": v for k, v in means.items()}
        row |= {f"eval_accuracy/{k}": v for k, v in accuracies(scores).items()}
        if not (self.checkpoint and self.checkpoint.state["metrics_rows"]):
            # Of a run that goes on, the evaluation before is in the file already.
            self.metrics.log({"step": self.steps} | row)
        self.latest = {"step": self.steps} | row
        return scores

    def _restore(self) -> None:
        """A run that goes on: the policy leaves its start, now that the reference is known."""
        if self.checkpoint is not None:
            self.state.restore(self.checkpoint)
            self.steps, self.checkpoint = self.state.step, None

    def _train(self) -> None:
        if self.steps and self._evaluate_if_due():
            return
        if not self.steps:  # a run that goes on has the budget that it had
            self._fit_memory()
        view = partial(
            display.training, step=lambda: self.state.figures, evaluation=lambda: self.latest
        )
        with self.phases.phase("training", self.total - self.steps, "steps", view) as advance:
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
        device = torch.device(self.models.device)
        if device.type == "cpu":
            per_step = Schedule.of(self.config, len(self.data.train)).pairs_per_step
            free = free_memory(device)
            fit_budget(self.engine, self.data.train, per_step, self.state.step_bytes, free)

    def _after_step(self, steps: int) -> bool:
        self.steps = steps
        enough = self._evaluate_if_due()
        self.keeper.after_step(last=enough or steps == self.total)
        self.interruption.check()
        return enough

    def _evaluate_if_due(self) -> bool:
        """Evaluate every eval_steps, and follow the best; whether the run is to stop early."""
        config, state, steps = self.config, self.state, self.steps
        if not (config.eval_steps and self.data.eval):
            return False
        last = steps == self.total  # after which the evaluation of every run comes
        due = config.load_best_model_at_end if last else steps % config.eval_steps == 0
        if due and state.evaluated != steps:
            self._evaluate(f"evaluating at step {steps}")
            state.evaluated = steps
            if state.best.update(steps, self.latest) and config.load_best_model_at_end:
                self.keeper.save()
        enough = not last and state.best.exhausted(config.early_stopping_patience)
        if enough:
            progress.say(
                f"stopped early: {state.best.since} evaluations without a better {state.best.metric} than "
                f"{state.best.value:.4g} after step {state.best.step}"
            )
        return enough

    def _take_best(self) -> None:
        """If asked, the policy goes back to its best evaluation; there is nothing more to save then."""
        state = self.state
        if self.config.load_best_model_at_end and state.best.step not in (None, state.step):
            self.keeper.save()
            self.steps = self.keeper.take_back_best()
            progress.say(
                f"best: the policy of step {self.steps}, {state.best.metric} {state.best.value:.4g}"
            )

    def _save(self) -> None:
        card = model_card(self.config, None, len(self.data.train), self.steps)
        self.engine.release_frozen(rest=True)  # the model is loaded once more
        with progress.spinner("saving model"), self.state.averaged():
            self.models.save(self.folder, card, self.config.merge)


# A step whose loss or gradient is not finite: its pairs are kept for a look.


FILE = "not_finite.json"


def keep_not_finite(folder: Path, error: NotFiniteError, tokenizer: Any) -> SmoldpoError:
    """Write the step's pairs, with texts and token ids, to not_finite.json; returns what to raise."""
    pairs = [
        {
            "id": pair.id,
            "prompt": tokenizer.decode(pair.prompt_ids),
            "chosen": tokenizer.decode(pair.chosen_ids),
            "rejected": tokenizer.decode(pair.rejected_ids),
            "prompt_ids": pair.prompt_ids,
            "chosen_ids": pair.chosen_ids,
            "rejected_ids": pair.rejected_ids,
        }
        for pair in error.pairs
    ]
    write_json(folder / FILE, error.facts | {"pairs": pairs})
    return SmoldpoError(f"{error}\ntheir texts and tokens are in {folder / FILE}")
