"""A whole run: data, policy and reference, accuracy before, training, the model, accuracy after."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smoldpo import progress
from smoldpo.config import TrainConfig, to_yaml
from smoldpo.data.load import TrainingData, load_mixture
from smoldpo.data.tokenize import PairTokenizer
from smoldpo.engine.base import Engine
from smoldpo.engine.build import build_engine, choose_engine
from smoldpo.engine.precision import compute_dtype, master_dtype, pick_device
from smoldpo.errors import UsageError
from smoldpo.evaluation.metrics import PairScore, accuracies, reward_metrics
from smoldpo.evaluation.scoring import pair_scores
from smoldpo.export import model_bytes, model_card, save_model
from smoldpo.files import require_space, write_json, write_jsonl, write_text
from smoldpo.models.freeze import freeze, summarize
from smoldpo.models.generate import generate_answer
from smoldpo.models.load import (
    ModelSource,
    find_model,
    load_model,
    load_tokenizer,
    weights_sha256,
)
from smoldpo.runfolder import choose_folder, environment, make_folder
from smoldpo.tracking import MetricsFile
from smoldpo.trainer import Schedule, loss_function, train
from smoldpo.types import PairLogps, TokenizedPair


@dataclass
class RunResult:
    """What a run found out, and where it is kept."""

    folder: Path
    steps: int
    evaluation: dict[str, Any] | None
    sample: dict[str, str] | None


@dataclass
class Models:
    """The engine with policy and reference in it, the tokenizer, and where they came from."""

    engine: Engine
    engine_name: str
    source: ModelSource
    reference_source: ModelSource
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype
    device: str
    bytes: int
    hashes: dict[str, str]

    def trained(self) -> PreTrainedModel:
        """The policy as it is now, in full precision: what is frozen comes from where it was loaded."""
        model = load_model(self.source, master_dtype(self.dtype))
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, parameter in self.engine.trainable_parameters():
                parameters[name].copy_(parameter)
        return model


@dataclass
class TokenizedData:
    """The pairs as the model sees them, and what to write to data.json."""

    train: list[TokenizedPair]
    eval: list[TokenizedPair]
    account: dict[str, Any] = field(default_factory=dict)


def run_training(config: TrainConfig) -> RunResult:
    """Do everything that `smoldpo train` does.

    Raises:
        SmoldpoError: whatever is wrong with settings, data, model or disk; see each part.
    """
    folder = choose_folder(config)
    data = _load_data(config)
    models = _load_models(config)
    tokenized = _tokenize(config, models.tokenizer, data)
    saves = Schedule.of(config, len(tokenized.train)).total_steps // (config.save_steps or 10**12)
    require_space(folder, (saves + 1) * models.bytes, "the model and its checkpoints")
    make_folder(folder)
    _write_start(folder, config, models, tokenized)
    run = _Run(folder, config, models, tokenized)
    try:
        return run.go()
    except KeyboardInterrupt:
        progress.say(
            f"interrupted after {run.steps} steps; metrics and checkpoints stay in {folder}"
        )
        raise


def _load_data(config: TrainConfig) -> TrainingData:
    with progress.spinner("reading the data"):
        data = load_mixture(
            config.data,
            config.data_weights,
            config.seed,
            subset=config.data_subset,
            split=config.data_split,
            eval_data=config.eval_data,
            eval_fraction=config.eval_fraction,
            max_train=config.max_train_samples,
            max_eval=config.max_eval_samples,
            format=config.format,
            columns=config.column_names,
            rules_off=config.rules_off,
        )
    for account in data.account.get("sources", [data.account]):
        _say_account(account)
    split = data.account["split"]
    progress.say(
        f"split: {split['train_pairs']:,} pairs to train on, {split['eval_pairs']:,} held out "
        f"({split['how']})"
    )
    return data


def _say_account(account: dict[str, Any]) -> None:
    for part in ("train", "eval"):
        read = account.get(part)
        if read is None:
            continue
        progress.say(f"data: {read['source']}, {read['format']} format, {read['rows_read']:,} rows")
        for action in ("dropped", "mended", "warned"):
            if read[action]:
                rules = ", ".join(f"{count} {rule}" for rule, count in read[action].items())
                progress.say(f"  {action}: {rules}")


def _load_models(config: TrainConfig) -> Models:
    device = pick_device(config.device)
    dtype, why = compute_dtype(config.dtype, device)
    progress.say(f"precision: {why}; {device}, {torch.get_num_threads()} threads")
    source = reference_source = find_model(config.model)
    with progress.spinner(f"loading {config.model}"):
        tokenizer = load_tokenizer(source)
        policy = load_model(source, master_dtype(dtype), device)
        reference = None
        if config.reference is not None:
            reference_source = find_model(config.reference)
            reference = load_model(reference_source, master_dtype(dtype), device)
            _require_same_vocabulary(policy, reference, config)
    freeze(policy, config.freeze_layers, config.freeze)
    progress.say(describe_parameters(policy))
    hashes = {"policy_start": weights_sha256(policy)}
    hashes["reference"] = weights_sha256(reference) if reference else hashes["policy_start"]
    size = model_bytes(policy)
    choice = choose_engine(config.engine, *(m for m in (policy, reference) if m is not None))
    progress.say(f"engine: {choice.name}" + (f", because {choice.reason}" if choice.reason else ""))
    engine = build_engine(
        choice.name,
        policy,
        reference,
        compute_dtype=dtype,
        train_batch_size=config.per_device_train_batch_size,
        eval_batch_size=config.per_device_eval_batch_size,
    )
    return Models(
        engine, choice.name, source, reference_source, tokenizer, dtype, device, size, hashes
    )


def _require_same_vocabulary(
    policy: PreTrainedModel, reference: PreTrainedModel, config: TrainConfig
) -> None:
    ours, theirs = (m.get_input_embeddings().num_embeddings for m in (policy, reference))
    if ours != theirs:
        raise UsageError(
            f"reference {config.reference}: has a vocabulary of {theirs:,} tokens, the policy one of "
            f"{ours:,}; their log-probabilities cannot be compared"
        )


def describe_parameters(model: PreTrainedModel) -> str:
    """How many parameters train, in all and by group."""
    groups = summarize(model)
    total = sum(group.parameters for group in groups)
    trainable = sum(group.trainable for group in groups)
    lines = [f"trains: {trainable:,} of {total:,} parameters ({trainable / total:.1%})"]
    for group in groups:
        share = "frozen" if not group.trainable else "trains"
        if 0 < group.trainable < group.parameters:
            share = f"{group.trainable:,} train"
        lines.append(f"  {group.name:<32}{group.parameters:>14,}  {share}")
    return "\n".join(lines)


def _tokenize(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, data: TrainingData
) -> TokenizedData:
    reader = PairTokenizer(tokenizer, config.max_length)
    with progress.bar("tokenising", len(data.train) + len(data.eval)) as advance:
        train_pairs = reader.tokenize_all(data.train, advance)
        eval_pairs = reader.tokenize_all(data.eval, advance)
    notes = dict(reader.notes)
    lengths = [pair.longest for pair in train_pairs + eval_pairs]
    account = data.account | {
        "tokens": {
            "max_length": config.max_length,
            "longest": max(lengths),
            "mean": sum(lengths) / len(lengths),
            "notes": notes,
        }
    }
    if notes:
        happened = ", ".join(f"{count} {note.replace('_', ' ')}" for note, count in notes.items())
        progress.say(f"tokens: {happened} (of {len(lengths):,} pairs)")
    return TokenizedData(train_pairs, eval_pairs, account)


def _write_start(
    folder: Path, config: TrainConfig, models: Models, tokenized: TokenizedData
) -> None:
    write_text(folder / "config.yaml", to_yaml(config.model_copy(update={"overwrite": False})))
    machine = environment(
        torch.get_num_threads(),
        models.device,
        str(models.dtype).removeprefix("torch."),
        models.hashes,
    )
    write_json(folder / "environment.json", machine | {"engine": models.engine_name})
    write_json(folder / "data.json", tokenized.account)


class _Run:
    """The part of a run after everything is loaded: before, train, save, after."""

    def __init__(self, folder: Path, config: TrainConfig, models: Models, data: TokenizedData):
        self.folder, self.config, self.models, self.data = folder, config, models, data
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
        sample = self._sample()
        card = model_card(self.config, evaluation, len(self.data.train), self.steps)
        write_text(self.folder / "README.md", card)
        write_text(self.folder / "model" / "README.md", card)
        self.metrics.close()
        return RunResult(self.folder, self.steps, evaluation, sample)

    def _prepare(self) -> None:
        pairs = self.data.train + self.data.eval
        if self.models.engine_name == "fast":
            with self._phase("trunk and reference", len(pairs)) as advance:
                self.engine.prepare(pairs, advance)

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
        if config.eval_steps and steps % config.eval_steps == 0 and self.data.eval:
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
            "seconds": self.seconds,
            "pairs": [
                {"id": new.id, "before": old.as_row(), "after": new.as_row()}
                for old, new in zip(before, after, strict=True)
            ],
        }
        write_json(self.folder / "evaluation.json", evaluation)
        return evaluation

    def _sample(self) -> dict[str, str] | None:
        prompt = self.config.sample_prompt
        if prompt is None:
            return None
        reader = PairTokenizer(self.models.tokenizer, self.config.max_length)
        ids = reader.prompt_ids(prompt)
        answers = {"prompt": prompt}
        with self._phase("answering the sample prompt", 2) as advance:
            for name in ("reference", "policy"):
                answers[name] = self._answer(name, ids)
                advance(1)
        write_jsonl(self.folder / "samples.jsonl", [answers])
        return answers

    def _answer(self, who: str, ids: list[int]) -> str:
        models = self.models
        if who == "policy":
            model = models.trained().to(models.device)
        else:
            model = load_model(models.reference_source, master_dtype(models.dtype), models.device)
        return generate_answer(
            model, models.tokenizer, ids, max_new_tokens=self.config.max_new_tokens
        )

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
