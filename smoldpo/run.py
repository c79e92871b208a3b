"""A whole run: data, policy and reference, accuracy before, training, the model, accuracy after."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from smoldpo import cache, progress
from smoldpo.config import TrainConfig, to_yaml
from smoldpo.engine.memory import give_back_freed_memory
from smoldpo.evaluation.gate import failures, parse_gates
from smoldpo.evaluation.judges import parse_judge
from smoldpo.evaluation.metrics import PairScore, accuracies, logp_metrics, reward_metrics
from smoldpo.evaluation.scoring import pair_scores
from smoldpo.export import model_card, save_model
from smoldpo.files import require_space, write_json, write_text
from smoldpo.loss_facts import needs_reference
from smoldpo.materials import Models, TokenizedData, load_data, load_models, tokenize
from smoldpo.phases import Phases
from smoldpo.proof import Proof, question_of
from smoldpo.report import read_run, write_report
from smoldpo.runfolder import choose_folder, environment, make_folder
from smoldpo.tracking import MetricsFile
from smoldpo.trainer import Schedule, loss_function, train
from smoldpo.types import PairLogps


@dataclass
class RunResult:
    """What a run found out, and where it is kept."""

    folder: Path
    steps: int
    evaluation: dict[str, Any] | None
    sample: dict[str, Any] | None
    report: Path
    failed_gates: list[str] = field(default_factory=list)
    """What `fail_under` asked for and the run does not have, in words."""


def run_training(config: TrainConfig) -> RunResult:
    """Do everything that `smoldpo train` does.

    Raises:
        SmoldpoError: whatever is wrong with settings, data, model or disk; see each part.
    """
    folder = choose_folder(config)
    judges = [parse_judge(spec) for spec in config.judges]
    gates = parse_gates(config.fail_under)
    data = load_data(config)
    models = load_models(config, data)
    tokenized = tokenize(config, models, data)
    sample = question_of(config, models)
    saves = Schedule.of(config, len(tokenized.train)).total_steps // (config.save_steps or 10**12)
    require_space(folder, (saves + 1) * models.bytes, "the model and its checkpoints")
    make_folder(folder)
    _write_start(folder, config, models, tokenized)
    run = _Run(folder, config, models, tokenized, Proof(config, models, tokenized, sample, judges))
    try:
        result = run.go()
    except KeyboardInterrupt:
        progress.say(
            f"interrupted after {run.steps} steps; metrics and checkpoints stay in {folder}"
        )
        raise
    result.failed_gates = failures(result.evaluation, gates) if result.evaluation else []
    return result


def _write_start(
    folder: Path, config: TrainConfig, models: Models, tokenized: TokenizedData
) -> None:
    decided = {
        "overwrite": False,
        "freeze_layers": models.frozen_layers,
        "dtype": str(models.dtype).removeprefix("torch."),
    }
    write_text(folder / "config.yaml", to_yaml(config.model_copy(update=decided)))
    machine = environment(
        torch.get_num_threads(),
        models.device,
        str(models.dtype).removeprefix("torch."),
        models.hashes,
    )
    write_json(folder / "environment.json", machine | models.decided)
    write_json(folder / "data.json", tokenized.account)


class _Run:
    """The part of a run after everything is loaded: before, train, save, after."""

    def __init__(
        self,
        folder: Path,
        config: TrainConfig,
        models: Models,
        data: TokenizedData,
        proof: Proof,
    ):
        self.folder, self.config, self.models, self.data = folder, config, models, data
        self.proof = proof
        self.steps = 0
        self.phases = Phases()
        self.metrics = MetricsFile(folder / "metrics.jsonl")
        self.engine = models.engine
        self.compares = needs_reference(config.loss_type)
        """Whether there is a reference; a loss without one has no implicit reward either."""
        self.reference_logps: PairLogps | None = None

    def go(self) -> RunResult:
        self._prepare()
        before = self._evaluate_before() if self.data.eval else None
        self._train()
        self._save("model")  # before anything else can go wrong
        after = self._evaluate("evaluating after") if self.data.eval else None
        evaluation = self.proof.write_analysis(self.folder, before, after)
        card = model_card(self.config, evaluation, len(self.data.train), self.steps)
        write_text(self.folder / "README.md", card)
        write_text(self.folder / "model" / "README.md", card)
        self.metrics.close()
        sample = self.proof.write_side_by_side(self.folder, evaluation, before, after, self.phases)
        write_json(self.folder / "timings.json", self.phases.rows)
        report = self.folder / "report.html"
        with progress.spinner("drawing the report"):
            write_report([read_run(self.folder)], report)
        return RunResult(self.folder, self.steps, evaluation, sample, report)

    def _prepare(self) -> None:
        pairs = self.data.train + self.data.eval
        title = "trunk and reference" if self.compares else "trunk"
        with self.phases.phase(title, len(pairs)) as advance:
            self.engine.prepare(pairs, advance)
        give_back_freed_memory()
        kept_in = self.models.kept_in
        for entry in cache.trim(self.config.cache_limit * 1e9, kept_in) if kept_in else ():
            progress.say(
                f"cache: over its limit, so {entry.folder} was removed ({entry.bytes:,} bytes)"
            )

    def _evaluate_before(self) -> list[PairScore]:
        pairs = self.data.eval
        if not self.compares:
            return self._evaluate("evaluating before")
        with self.phases.phase("evaluating before", len(pairs)) as advance:
            self.reference_logps = self.engine.reference_logps(pairs, advance)
        if self.config.reference is None:
            # The policy still is the reference: its log-probabilities are these.
            return self._scored(self.reference_logps)
        return self._evaluate("evaluating the policy before")

    def _evaluate(self, title: str) -> list[PairScore]:
        with self.phases.phase(title, len(self.data.eval)) as advance:
            return self._scored(self.engine.policy_logps(self.data.eval, advance))

    def _scored(self, policy: PairLogps) -> list[PairScore]:
        reference, config, pairs = self.reference_logps, self.config, self.data.eval
        scores = pair_scores(pairs, policy, reference)
        loss = loss_function(config, config.last_beta)
        row = {"eval_loss": loss(policy, reference, pairs, pairs).double().mean().item()}
        means = reward_metrics(scores, config.last_beta) if self.compares else logp_metrics(scores)
        row |= {f"eval_{k}": v for k, v in means.items()}
        row |= {f"eval_accuracy/{k}": v for k, v in accuracies(scores).items()}
        self.metrics.log({"step": self.steps} | row)
        return scores

    def _train(self) -> None:
        total = Schedule.of(self.config, len(self.data.train)).total_steps
        with self.phases.phase("training", total, "steps") as advance:
            train(
                self.engine,
                self.data.train,
                self.config,
                self.metrics,
                starts_at_reference=self.config.reference is None,
                after_step=self._after_step,
                watch=advance,
            )

    def _after_step(self, steps: int) -> None:
        self.steps = steps
        config = self.config
        last = steps == Schedule.of(config, len(self.data.train)).total_steps
        if config.eval_steps and steps % config.eval_steps == 0 and self.data.eval and not last:
            self._evaluate(f"evaluating at step {steps}")
        if config.save_steps and steps % config.save_steps == 0:
            self._save(f"checkpoints/step-{steps}")

    def _save(self, name: str) -> None:
        card = model_card(self.config, None, len(self.data.train), self.steps)
        with progress.spinner(f"saving {name}"):
            save_model(self.folder / name, self.models.trained(), self.models.tokenizer, card)
