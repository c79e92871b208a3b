"""Measurements beside the dry run: resident memory, the disk, and the end of a run."""

from __future__ import annotations

import gc
import hashlib
import mmap
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedModel

from smoldpo.config.schema import TrainConfig
from smoldpo.engine.precision import cast_frozen
from smoldpo.evaluation.side_by_side import GENERATION_BATCH_SIZE, EvalPrompt, choose_prompts
from smoldpo.models.generate import generate_answers
from smoldpo.training.final_evaluation import tokenize_sample_prompt
from smoldpo.training.policy_and_reference import PolicyAndReference
from smoldpo.training.setup import TokenizedData
from smoldpo.utils.files import existing_parent
from smoldpo.utils.memory import trim_memory
from smoldpo.utils.workers import shares

SAMPLE_SECONDS = 0.005
"""Between readings of the resident memory. A peak that lasts shorter is missed."""
PROBE_BYTES = 32 << 20
FEW_TOKENS, MORE_TOKENS = 2, 8
"""Lengths of the answers drawn here: two lengths give the time of a token."""


def resident() -> int:
    """Bytes of this process that are resident now."""
    return psutil.Process().memory_info().rss


class PeakMemory:
    """Reads the resident memory during a block; `bytes` is the most that it saw."""

    def __enter__(self) -> PeakMemory:
        self.bytes, self._ended = resident(), threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def _read(self) -> None:
        ended = False
        while not ended:
            ended = self._ended.wait(SAMPLE_SECONDS)
            self.bytes = max(self.bytes, resident())

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._reader.join()


def page_in(*models: torch.nn.Module | None) -> None:
    """Read all weights once: pages of a mapped file become resident only then."""
    for model in models:
        for weight in model.parameters() if model is not None else ():
            weight.detach().flatten()[:: mmap.PAGESIZE // weight.element_size()].sum()


def bytes_of(model: torch.nn.Module) -> int:
    """Bytes of all weights, each in its own precision."""
    return sum(weight.nbytes for weight in model.parameters())


@dataclass(frozen=True)
class DiskSpeed:
    """Seconds per byte: written into the page cache, then synced to the disk, hashed."""

    written: float
    synced: float
    hashed: float


def measure_disk(folder: Path) -> DiskSpeed:
    """Writes an unnamed file beside `folder`, which is gone when this call ends.

    Raises:
        OSError: nothing can be written there.
    """
    block = os.urandom(1 << 20)
    with tempfile.TemporaryFile(dir=existing_parent(folder)) as file:
        times = [time.perf_counter()]
        for _ in range(PROBE_BYTES >> 20):
            file.write(block)
        file.flush()
        times.append(time.perf_counter())
        os.fsync(file.fileno())
        times.append(time.perf_counter())
        file.seek(0)
        hashlib.file_digest(file, "sha256")
        times.append(time.perf_counter())
    return DiskSpeed(*((after - before) / PROBE_BYTES for before, after in pairwise(times)))


@dataclass(frozen=True)
class RunEnd:
    """What follows training: seconds, and bytes of memory."""

    loading: float  # Seconds to assemble the trained model, from where it was loaded
    answering: float  # Seconds to load both models and to generate every answer at full length
    model_bytes: float  # The reference while it answers
    answering_bytes: float  # Taken by generation beside the models
    prompts: list[int]  # Tokens of each prompt that is answered


def measure_run_end(config: TrainConfig, models: PolicyAndReference, data: TokenizedData) -> RunEnd:
    """Loads the models as at the end of a run, and generates a few tokens of its own answers."""
    prompts = choose_prompts(
        data.eval_pairs,
        data.eval,
        config.generate_prompts,
        models.facts.positions,
        config.max_new_tokens,
    )
    sample = tokenize_sample_prompt(config, models)
    begun = time.perf_counter()
    trained = models.trained()
    if models.trainable.adapter is not None and config.merge:
        models.trainable.adapter.merged(trained)
    del trained
    loading = time.perf_counter() - begun
    trim_memory()
    begun = time.perf_counter()
    reference = cast_frozen(models.reference(), models.facts.dtype)
    page_in(reference)
    loading_both = time.perf_counter() - begun + (0.0 if models.shares else loading)
    before = resident()
    size = GENERATION_BATCH_SIZE
    batches = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    batches += [[sample]] if sample else []
    with PeakMemory() as peak:
        generating = _seconds_to_generate(config, models, reference, batches)
    model_bytes = float(bytes_of(reference))
    del reference
    gc.collect()
    trim_memory()
    answering = loading_both + 2 * generating if batches else 0.0
    lengths = [len(prompt.ids) for batch in batches for prompt in batch]
    return RunEnd(loading, answering, model_bytes, float(peak.bytes - before), lengths)


def _seconds_to_generate(
    config: TrainConfig,
    models: PolicyAndReference,
    model: PreTrainedModel,
    batches: list[list[EvalPrompt]],
) -> float:
    """Seconds in which one model answers all batches, each by one thread.

    Batches of one size are measured once.
    """

    def generate(batch: Sequence[EvalPrompt], tokens: int) -> tuple[int, float]:
        """Tokens of the longest answer, and seconds."""
        begun = time.perf_counter()
        answers = generate_answers(
            model,
            models.tokenizer,
            [prompt.ids for prompt in batch],
            max_new_tokens=min(tokens, config.max_new_tokens),
            temperature=config.temperature,
            seed=config.seed,
            batch_size=len(batch),
        )
        return max(len(answer.ids) for answer in answers), time.perf_counter() - begun

    known: dict[int, float] = {}
    for batch in batches:
        if len(batch) not in known:
            generate(batch, 1)
            few, short = generate(batch, FEW_TOKENS)
            more, long = generate(batch, MORE_TOKENS)
            token = max(0.0, long - short) / (more - few) if more > few else short / few
            known[len(batch)] = short + max(0, config.max_new_tokens - few) * token
    seconds = [known[len(batch)] for batch in batches]
    parts = shares(seconds, torch.get_num_threads())
    return max(sum(seconds[index] for index in part) for part in parts)
