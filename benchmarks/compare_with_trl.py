"""smoldpo against TRL's DPOTrainer: the same pairs in the same order must give the same losses.

    python benchmarks/compare_with_trl.py PAIRS.jsonl --pairs 64 --steps 10

Prints, for float32: the largest relative difference between smoldpo's summed log-probabilities and
those of single unpadded sequences straight through transformers; and the losses of both trainers,
step by step (same AdamW, same schedule, no dropout, end of turn scored alike).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from smoldpo.config.load import build_config
from smoldpo.config.optimizers import lowest_rate
from smoldpo.config.schema import TrainConfig
from smoldpo.data.load import load_pairs
from smoldpo.data.tokenize import PairTokenizer
from smoldpo.engine.base import EngineSettings
from smoldpo.engine.build import build_engine
from smoldpo.engine.plain import PlainEngine
from smoldpo.models.load import ModelSource, find_model, load_model, load_tokenizer
from smoldpo.training.loop import train
from smoldpo.training.metrics_file import MetricsFile
from smoldpo.training.optim import decay_steps
from smoldpo.training.sampler import Schedule
from smoldpo.types import TokenizedPair


def settings(pairs: int, steps: int, micro_batch: int) -> TrainConfig:
    """Ten steps over the pairs, in micro-batches."""
    return build_config(
        {
            "per_device_train_batch_size": micro_batch,
            "gradient_accumulation_steps": max(1, pairs // steps // micro_batch),
            "max_steps": steps,
            "learning_rate": 2e-5,
            "warmup_steps": 2,
            "dtype": "float32",
        }
    )


def logps_difference(source: ModelSource, pairs: list[TokenizedPair]) -> float:
    """Largest relative difference of summed log-probabilities from unpadded single sequences."""
    model = load_model(source, torch.float32)
    engine = PlainEngine(
        model,
        None,
        EngineSettings(compute_dtype=torch.float32, train_batch_size=8, eval_batch_size=8),
    )
    found = engine.policy_logps(pairs)
    worst = 0.0
    for index, pair in enumerate(pairs):
        for side, ids in ((found.chosen, pair.chosen_ids), (found.rejected, pair.rejected_ids)):
            expected = single_sequence_logp(model, pair.prompt_ids, ids)
            worst = max(worst, abs(side[index].item() - expected) / abs(expected))
    return worst


@torch.no_grad()
def single_sequence_logp(
    model: torch.nn.Module, prompt: tuple[int, ...], completion: tuple[int, ...]
) -> float:
    """log π(completion | prompt) by one forward pass over one unpadded sequence."""
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0]
    logps = torch.log_softmax(logits[len(prompt) - 1 : -1].double(), dim=-1)
    return logps.gather(-1, torch.tensor(completion)[:, None]).sum().item()


def our_losses(
    source: ModelSource,
    pairs: list[TokenizedPair],
    config: TrainConfig,
    micro_batch: int | None = None,
) -> list[float]:
    """The loss of each optimizer step of smoldpo, cut into micro-batches of so many pairs."""
    return [row["loss"] for row in our_metrics(source, pairs, config, micro_batch)]


def our_metrics(
    source: ModelSource,
    pairs: list[TokenizedPair],
    config: TrainConfig,
    micro_batch: int | None = None,
) -> list[dict[str, float]]:
    """What smoldpo writes of each of these steps."""
    about = EngineSettings(
        compute_dtype=torch.float32,
        train_batch_size=micro_batch or config.per_device_train_batch_size,
        eval_batch_size=8,
        stream_tokens=config.stream_tokens,
        engine="plain",
        use_weighting=config.use_weighting,
        sync_ref_model=config.sync_ref_model,
    )
    engine = build_engine(load_model(source, torch.float32), None, about).engine
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        train(
            engine,
            pairs,
            config,
            MetricsFile(path),
            starts_at_reference=True,
            after_step=lambda _: None,
            watch=lambda _, note="": None,
        )
        return [json.loads(line) for line in path.read_text().splitlines()]


def trl_losses(source: ModelSource, pairs: list[TokenizedPair], config: TrainConfig) -> list[float]:
    """The loss of each optimizer step of TRL's DPOTrainer, fed smoldpo's tokens in its order."""
    return [row["loss"] for row in trl_metrics(source, pairs, config)]


def trl_metrics(
    source: ModelSource, pairs: list[TokenizedPair], config: TrainConfig
) -> list[dict[str, float]]:
    """What TRL's trainer logs of each of these steps."""
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from trl import DPOConfig, DPOTrainer

    class Oracle(DPOTrainer):
        """TRL's trainer, with tokens given instead of made, in the order given."""

        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

        def _get_train_sampler(self, *args, **kwargs):
            return SequentialSampler(self.train_dataset)

    schedule = Schedule.of(config, len(pairs))
    order = [index for step in range(schedule.total_steps) for index in schedule.indices(step)]
    ordered = [pairs[index] for index in order]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        trainer = Oracle(
            model=load_model(source, torch.float32),
            ref_model=load_model(source, torch.float32),
            processing_class=load_tokenizer(source),
            train_dataset=Dataset.from_list(
                [
                    {
                        "prompt_ids": list(pair.prompt_ids),
                        "chosen_ids": list(pair.chosen_ids),
                        "rejected_ids": list(pair.rejected_ids),
                    }
                    for pair in ordered
                ]
            ),
            args=DPOConfig(
                output_dir=folder,
                use_cpu=True,
                bf16=False,
                beta=config.beta,
                loss_type=config.loss_type,
                loss_weights=config.loss_weights or None,
                label_smoothing=config.label_smoothing,
                discopop_tau=config.discopop_tau,
                f_divergence_type=config.f_divergence_type,
                f_alpha_divergence_coef=config.f_alpha_divergence_coef,
                ld_alpha=config.ld_alpha,
                use_weighting=config.use_weighting,
                learning_rate=config.learning_rate,
                lr_scheduler_type=config.lr_scheduler_type,
                lr_scheduler_kwargs=schedule_kwargs(config, schedule.total_steps),
                optim=config.optim,
                optim_args=f"momentum={config.sgd_momentum}" if config.optim == "sgd" else None,
                sync_ref_model=config.sync_ref_model,
                ref_model_mixup_alpha=config.ref_model_mixup_alpha,
                ref_model_sync_steps=config.ref_model_sync_steps,
                warmup_steps=config.warmup_steps,
                weight_decay=config.weight_decay,
                max_grad_norm=config.max_grad_norm,
                per_device_train_batch_size=config.per_device_train_batch_size,
                gradient_accumulation_steps=config.gradient_accumulation_steps,
                max_steps=config.max_steps,
                gradient_checkpointing=False,
                max_length=None,
                logging_steps=1,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
            ),
        )
        trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


def trl_kto_losses(
    source: ModelSource, answers: list[TokenizedPair], config: TrainConfig
) -> list[float]:
    """The loss of each step of TRL's KTOTrainer, of chosen answers that were liked or not.

    Rejected ones are those of its KL term.
    """
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    class Oracle(KTOTrainer):
        """TRL's trainer, with tokens given instead of made."""

        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

    schedule = Schedule.of(config, len(answers))
    order = [index for step in range(schedule.total_steps) for index in schedule.indices(step)]
    rows = [
        {
            "prompt_ids": list(answers[index].prompt_ids),
            "completion_ids": list(answers[index].chosen_ids),
            "KL_completion_ids": list(answers[index].rejected_ids),
            "label": answers[index].numbers.liked,
        }
        for index in order
    ]
    if config.loss_type != ["kto"]:
        rows = [{k: v for k, v in row.items() if k != "KL_completion_ids"} for row in rows]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        trainer = Oracle(
            model=load_model(source, torch.float32),
            ref_model=load_model(source, torch.float32),
            processing_class=load_tokenizer(source),
            train_dataset=Dataset.from_list(rows),
            args=KTOConfig(
                output_dir=folder,
                use_cpu=True,
                bf16=False,
                beta=config.beta,
                loss_type=config.loss_type[0],
                desirable_weight=config.desirable_weight,
                undesirable_weight=config.undesirable_weight,
                learning_rate=config.learning_rate,
                lr_scheduler_type=config.lr_scheduler_type,
                optim=config.optim,
                warmup_steps=config.warmup_steps,
                weight_decay=config.weight_decay,
                max_grad_norm=config.max_grad_norm,
                per_device_train_batch_size=config.per_device_train_batch_size,
                train_sampling_strategy="sequential",
                max_steps=config.max_steps,
                gradient_checkpointing=False,
                max_length=None,
                logging_steps=1,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
            ),
        )
        trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def schedule_kwargs(config: TrainConfig, total: int) -> dict[str, Any]:
    """What transformers' schedule of the same name takes besides its warm-up."""
    if config.lr_scheduler_type == "cosine_with_min_lr":
        return {"min_lr_rate": lowest_rate(config)}
    if config.lr_scheduler_type == "warmup_stable_decay":
        return {
            "num_decay_steps": decay_steps(config, total),
            "decay_type": config.lr_decay_type,
            "min_lr_ratio": lowest_rate(config),
        }
    return {}


def read_pairs(path: str, source: ModelSource, count: int, max_length: int) -> list[TokenizedPair]:
    """The first `count` pairs of a file, tokenised."""
    tokenizer = PairTokenizer(load_tokenizer(source), max_length)
    return tokenizer.tokenize_all(load_pairs(path).pairs[:count])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pairs_file")
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--max-length", type=int, default=1024)
    arguments = parser.parse_args()

    source = find_model(arguments.model)
    pairs = read_pairs(arguments.pairs_file, source, arguments.pairs, arguments.max_length)
    config = settings(len(pairs), arguments.steps, arguments.micro_batch)
    print(f"{len(pairs)} pairs, float32")
    print(f"log-probabilities: largest relative difference {logps_difference(source, pairs):.1e}")
    ours, theirs = our_losses(source, pairs, config), trl_losses(source, pairs, config)
    print("step      smoldpo          TRL   relative difference")
    for step, (our, their) in enumerate(zip(ours, theirs, strict=True), 1):
        print(f"{step:4d}  {our:.9f}  {their:.9f}   {abs(our - their) / abs(their):.1e}")


if __name__ == "__main__":
    main()
