"""What comes after training, measured: the model put together and saved, answers of both models, the disk."""

from __future__ import annotations

import gc
import hashlib
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from transformers import PreTrainedModel

from smoldpo.answering import AT_ONCE, Question, choose_questions
from smoldpo.config import TrainConfig
from smoldpo.engine.frozen import cast_frozen
from smoldpo.engine.memory import give_back_freed_memory
from smoldpo.materials import Models, TokenizedData
from smoldpo.models.generate import generate_answers
from smoldpo.plan.resident import bytes_of, height, read_in, resident
from smoldpo.proof import question_of

FEW, SOME = 2, 8
"""Tokens of the answers drawn here: from two lengths follows what a token takes."""
PROBE_BYTES = 32 << 20


@dataclass(frozen=True)
class Disk:
    """Seconds a byte: written into the page cache, brought to the disk besides, hashed."""

    written: float
    synced: float
    hashed: float


def measure_disk(folder: Path) -> Disk:
    """Writes a file without a name beside `folder`; it is gone with this call, whatever happens.

    Raises:
        OSError: nothing can be written there.
    """
    folder = folder.absolute()
    while not folder.is_dir():
        folder = folder.parent
    block = os.urandom(1 << 20)
    with tempfile.TemporaryFile(dir=folder) as file:
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
    return Disk(*((after - before) / PROBE_BYTES for before, after in pairwise(times)))


@dataclass(frozen=True)
class Ends:
    """Seconds, and bytes of memory."""

    loading: float
    """The tuned model put together, from where it was loaded."""
    answering: float
    """Both models loaded, and every answer as long as it may become."""
    model_bytes: float
    """The reference as it answers."""
    answering_bytes: float
    """What drawing answers takes beside the models."""
    prompts: list[int]
    """Tokens of each prompt that is answered."""


def measure_ends(config: TrainConfig, models: Models, data: TokenizedData) -> Ends:
    """Loads models as at the end of a run, and draws a few tokens of the run's own answers."""
    asked = choose_questions(
        data.eval_pairs, data.eval, config.generate_prompts, models.positions, config.max_new_tokens
    )
    sample = question_of(config, models)
    begun = time.perf_counter()
    trained = models.trained()
    if models.adapter is not None and config.merge:
        models.adapter.merged(trained)
    del trained
    loading = time.perf_counter() - begun
    give_back_freed_memory()
    begun = time.perf_counter()
    model = cast_frozen(models.reference(), models.dtype)
    read_in(model)
    beginning = time.perf_counter() - begun
    before = resident()
    batches = [asked[start : start + AT_ONCE] for start in range(0, len(asked), AT_ONCE)]
    batches += [[sample]] if sample else []
    with height() as seen:
        drawing = _drawing(config, models, model, batches)
    size = bytes_of(model)
    del model
    gc.collect()
    give_back_freed_memory()
    beginning += 0.0 if models.shares else loading
    answering = beginning + 2 * drawing if batches else 0.0
    prompts = [len(question.ids) for batch in batches for question in batch]
    return Ends(loading, answering, float(size), float(seen.bytes - before), prompts)


def _drawing(
    config: TrainConfig, models: Models, model: PreTrainedModel, batches: list[list[Question]]
) -> float:
    """Seconds in which one model answers all batches; like batches are measured once."""
    seconds, known = 0.0, {}
    for batch in batches:
        if len(batch) not in known:
            _draw(config, models, model, batch, 1)
            short = _draw(config, models, model, batch, FEW)
            known[len(batch)] = (short, _draw(config, models, model, batch, SOME))
        (few, begun), (some, ended) = known[len(batch)]
        token = max(0.0, ended - begun) / (some - few) if some > few else begun / few
        seconds += begun + max(0, config.max_new_tokens - few) * token
    return seconds


def _draw(
    config: TrainConfig,
    models: Models,
    model: PreTrainedModel,
    batch: Sequence[Question],
    tokens: int,
) -> tuple[int, float]:
    """Tokens drawn (the longest answer's) and seconds."""
    begun = time.perf_counter()
    answers = generate_answers(
        model,
        models.tokenizer,
        [question.ids for question in batch],
        max_new_tokens=min(tokens, config.max_new_tokens),
        temperature=config.temperature,
        seed=config.seed,
        batch_size=len(batch),
    )
    return max(len(answer.ids) for answer in answers), time.perf_counter() - begun
