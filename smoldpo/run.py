"""A whole run: data, policy and reference, accuracy before, training, the model, accuracy after."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from smoldpo import cache, progress
from smoldpo.config import TrainConfig, to_yaml
from smoldpo.data.tokenize import PairTokenizer
from smoldpo.engine.memory import give_back_freed_memory
from smoldpo.engine.precision import master_dtype
from smoldpo.evaluation.metrics import PairScore, accuracies, reward_metrics
from smoldpo.evaluation.scoring import pair_scores
from smoldpo.export import model_card, save_model
from smoldpo.files import require_space, write_json, write_jsonl, write_text
from smoldpo.materials import Models, TokenizedData, load_data, load_models, tokenize
from smoldpo.models.generate import generate_answer
from smoldpo.models.load import load_model
from smoldpo.runfolder import choose_folder, environment, make_folder
from smoldpo.tracking import MetricsFile
from smoldpo.trainer import Schedule, loss_function, train
from smoldpo.types import PairLogps


@dataclass
class RunResult:
    """What a run found out, and where it is kept."""

    folder: Path
    steps: int
    starts_equal: bool
    evaluation: dict[str, Any] | None
    sample: dict[str, str] | None


def run_training(config: TrainConfig) -> RunResult:
    """Do everything that `smoldpo train` does.

    Raises:
        SmoldpoError: whatever is wrong with settings, data, model or disk; see each part.
    """
    folder = choose_folder(config)
    data = load_data(config)
    models = load_models(config, data)
    tokenized = tokenize(config, models, data)
    question = _question(config, models)
    saves = Schedule.of(config, len(tokenized.train)).total_steps // (config.save_steps or 10**12)
    require_space(folder, (saves + 1) * models.bytes, "the model and its checkpoints")
    make_folder(folder)
    _write_start(folder, config, models, tokenized)
    run = _Run(folder, config, models, tokenized, question)
    try:
        return run.go()
    except KeyboardInterrupt:
        progress.say(
            f"interrupted after {run.steps} steps; metrics and checkpoints stay in {folder}"
        )
        raise


def _question(config: TrainConfig, models: Models) -> list[int] | None:
    """The sample prompt's tokens; made before training, so that a bad prompt costs none."""
    if config.sample_prompt is None:
        return None
    return PairTokenizer(models.tokenizer, config.max_length).prompt_ids(config.sample_prompt)


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
        question: list[int] | None,
    ):
        self.folder, self.config, self.models, self.data = folder, config, models, data
        self.question = question
        self.steps = 0
        self.seconds: dict[str, float] = {}
        self.metrics = MetricsFile(folder / "metrics.jsonl")
        self.engine = models.engine
        self.reference_logps: PairLogps | None = None

    def go(self) -> RunResult:
        self._prepare()
        before = self._evaluate_before() if self.data.eval else None
        self._train()
        self._save("model")  # before anything else can go wrong
        after = self._evaluate("evaluating after") if self.data.eval else None
        evaluation = self._write_evaluation(before, after)
        card = model_card(self.config, evaluation, len(self.data.train), self.steps)
        write_text(self.folder / "README.md", card)
        write_text(self.folder / "model" / "README.md", card)
        self.metrics.close()
        sample = self._sample()
        write_json(self.folder / "timings.json", self.seconds)
        starts_equal = self.config.reference is None
        return RunResult(self.folder, self.steps, starts_equal, evaluation, sample)

    def _prepare(self) -> None:
        pairs = self.data.train + self.data.eval
        with self._phase("trunk and reference", len(pairs)) as advance:
            self.engine.prepare(pairs, advance)
        give_back_freed_memory()
        kept_in = self.models.kept_in
        for entry in cache.trim(self.config.cache_limit * 1e9, kept_in) if kept_in else ():
            progress.say(
                f"cache: over its limit, so {entry.folder} was removed ({entry.bytes:,} bytes)"
            )

    def _evaluate_before(self) -> list[PairScore]:
        pairs = self.data.eval
        with self._phase("evaluating before", len(pairs)) as advance:
            self.reference_logps = self.engine.reference_logps(pairs, advance)
        if self.config.reference is None:
            # The policy still is the reference: its log-probabilities are these.
            return self._scored(self.reference_logps)
        return self._evaluate("evaluating the policy before")

    def _evaluate(self, title: str) -> list[PairScore]:
        with self._phase(title, len(self.data.eval)) as advance:
            return self._scored(self.engine.policy_logps(self.data.eval, advance))

    def _scored(self, policy: PairLogps) -> list[PairScore]:
        reference = self.reference_logps
        assert reference is not None
        scores = pair_scores(self.data.eval, policy, reference)
        row = {"eval_loss": loss_function(self.config)(policy, reference).double().mean().item()}
        row |= {f"eval_{k}": v for k, v in reward_metrics(scores, self.config.beta).items()}
        row |= {f"eval_accuracy/{k}": v for k, v in accuracies(scores).items()}
        self.metrics.log({"step": self.steps} | row)
        return scores

    def _train(self) -> None:
        total = Schedule.of(self.config, len(self.data.train)).total_steps
        with self._phase("training", total) as advance:
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

    def _write_evaluation(
        self, before: Sequence[PairScore] | None, after: Sequence[PairScore] | None
    ) -> dict[str, Any] | None:
        if before is None or after is None:
            return None
        evaluation = {
            "n": len(after),
            "before": {"accuracy": accuracies(before)},
            "after": {"accuracy": accuracies(after)},
            "pairs": [
                {"id": new.id, "before": old.as_row(), "after": new.as_row()}
                for old, new in zip(before, after, strict=True)
            ],
        }
        write_json(self.folder / "evaluation.json", evaluation)
        return evaluation

    def _sample(self) -> dict[str, str] | None:
        if self.question is None or self.config.sample_prompt is None:
            return None
        models = self.models
        answers = {"prompt": self.config.sample_prompt}
        with self._phase("answering the sample prompt", 2) as advance:
            for name in ("reference", "policy"):
                source = models.reference_source if name == "reference" else None
                model = (
                    load_model(source, master_dtype(models.dtype)) if source else models.trained()
                )
                answers[name] = generate_answer(
                    model.to(models.device),
                    models.tokenizer,
                    self.question,
                    max_new_tokens=self.config.max_new_tokens,
                )
                advance(1)
        write_jsonl(self.folder / "samples.jsonl", [answers])
        return answers

    def _phase(self, title: str, total: int) -> _Phase:
        return _Phase(title, total, self.seconds)


class _Phase:
    """A progress bar whose time is kept under its title."""

    def __init__(self, title: str, total: int, seconds: dict[str, float]):
        self._title, self._seconds = title, seconds
        self._bar = progress.bar(title, total)

    def __enter__(self) -> Any:
        self._start = time.perf_counter()
        return self._bar.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._bar.__exit__(*error)
        took = time.perf_counter() - self._start
        self._seconds[self._title] = round(took, 2)
        if error[0] is None and took >= 2:
            progress.say(f"{self._title}: {took:.0f} s")
