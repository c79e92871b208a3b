"""Loading a run's parts as it will, and trying them at a few freeze depths: all that a forecast knows."""

from __future__ import annotations

import gc
import hashlib
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from smoldpo.config.losses import needs_reference
from smoldpo.config.schema import TrainConfig
from smoldpo.engine.autotune import NAMES, earlier_rates, matmul_rate
from smoldpo.engine.batch_budget import is_out_of_memory
from smoldpo.engine.compile import REACHED
from smoldpo.engine.packing import common_prefix
from smoldpo.engine.precision import cast_frozen, master_dtype
from smoldpo.evaluation.side_by_side import GENERATION_BATCH_SIZE, EvalPrompt, choose_prompts
from smoldpo.models.freeze import layer_of
from smoldpo.models.generate import generate_answers
from smoldpo.models.save import SHARD_BYTES
from smoldpo.plan.cache_lookup import NOTHING, Cupboard
from smoldpo.plan.cost_model import Pace, fit_rates
from smoldpo.plan.depths import Visit, depths_to_try, every_depth
from smoldpo.plan.dry_run import Dose, DryRun, Measured, choose_dose, step_samples
from smoldpo.plan.memory import Sizes, Tried, bytes_of, height, need, read_in, resident
from smoldpo.plan.workload import Counts, Depth, FastPacking, Packing, PlainPacking
from smoldpo.training.final_evaluation import tokenize_sample_prompt
from smoldpo.training.policy_and_reference import PolicyAndReference
from smoldpo.training.sampler import Schedule
from smoldpo.training.setup import TokenizedData, load_data, load_models, tokenize
from smoldpo.utils import progress
from smoldpo.utils.errors import SmoldpoError
from smoldpo.utils.memory import file_page_bytes, free_memory, trim_memory


class Trial:
    """What is there and what was seen.

    Args:
        imports: seconds that the process took before, which a run takes too.
    """

    def __init__(self, config: TrainConfig, imports: float):
        self.config = config
        self._measured: list[Measured] = []
        self._refused: list[tuple[Depth, Exception]] = []
        self._readings: list[float] = []
        begun = time.perf_counter()
        earlier = {dtype: earlier_rates(dtype, "cpu") for dtype in NAMES.values()}
        self._raw = load_data(config)
        libraries, self.free = resident(), free_memory(torch.device("cpu"))
        # In memory, so that nothing is written; what is on disk is looked up apart.
        self.models = load_models(config.model_copy(update={"cache": "memory"}), self._raw)
        self.data = tokenize(config, self.models, self._raw)
        self.start = imports + time.perf_counter() - begun
        self._earlier = earlier[self.models.dtype]
        self.fast = self.models.computing["engine"] == "fast"
        self.depths = every_depth(config, self.models)
        self.sizes = self._sizes(libraries)
        pairs = self.data.train + self.data.eval
        self.shared = common_prefix(pairs) if self.fast else ()
        self.kept = dict.fromkeys((depth.frozen for depth in self.depths), NOTHING)
        self.where = "off"
        if self.fast:
            cupboard = Cupboard(config, self.models, self.free, pairs, self.shared)
            self.where = cupboard.where
            for depth in self.depths:
                self.kept[depth.frozen] = cupboard.look(depth.below)
        self.packing = self._packing()
        self.counts = Counts(config, self.data.train, self.data.eval)

    def _sizes(self, libraries: float) -> Sizes:
        """Of the models as loaded; what loading left besides counts with the libraries."""
        models, config = self.models, self.config
        master = master_dtype(models.dtype).itemsize
        computing = models.bytes / master * models.dtype.itemsize
        reference = models.engine.reference if self.fast else None
        if self.fast:
            weights = computing + (bytes_of(reference) if reference is not None else 0.0)
        else:  # a reference of its own, unless that is the policy without adapters; all in full precision
            own = config.reference is not None or not config.use_peft
            weights = models.bytes * (1 + (needs_reference(config.loss_type) and own))
        read_in(models.engine.policy, models.engine.reference)
        apart = self.fast and models.dtype.itemsize != master
        trainable = sum(p.numel() for _, p in models.engine.trainable_parameters())
        loaded = models.bytes / master * models.loaded.itemsize
        here = next(d for d in self.depths if d.frozen == models.frozen_layers)
        left = resident() - libraries - (weights - here.unconverted) - trainable * master * apart
        return Sizes(
            libraries=libraries + max(0.0, left),
            loaded=loaded,
            loaded_item=models.loaded.itemsize,
            shard=min(SHARD_BYTES, models.bytes) if loaded < models.bytes else 0.0,
            weights=weights,
            compute_item=models.dtype.itemsize,
            master=master,
            masters_apart=apart,
            released=self._released(),
            answers=bool(config.generate_prompts or config.sample_prompt),
            shares=models.shares,
            merges=config.use_peft and config.merge,
        )

    def _released(self) -> int:
        """Bytes of a reference of its own that has scored all pairs, and is let go."""
        own = self.fast and self.config.reference is not None
        return file_page_bytes(self.models.engine.reference.parameters()) if own else 0

    def go(self) -> None:
        """The end of a run first, while the policy is what it was; then passes and steps at a few depths."""
        visits = depths_to_try(self.depths, self.models.frozen_layers)
        dose = self._dose(visits)
        with progress.bar("dry run", len(visits) + 1) as advance:
            with progress.silenced():
                folder = Path(self.config.output_dir or "runs").expanduser()
                self.disk: Disk = measure_disk(folder)
                self.ends: Ends = measure_ends(self.config, self.models, self.data)
            advance(1)
            for number, visit in enumerate(visits):
                with progress.silenced():
                    self._try(visit, dose, loaded=number == 0)
                advance(1)
        if not self._measured:
            raise self._refused[-1][1]
        ends = self.ends
        self.sizes = replace(
            self.sizes, answering_model=ends.model_bytes, answering=ends.answering_bytes
        )
        self.rates = fit_rates(
            [passed for found in self._measured for passed in found.passed],
            [stepped for found in self._measured for stepped in found.stepped],
        )

    @property
    def pace(self) -> Pace:
        """The machine's speed while it was tried."""
        return Pace(self._readings, self._earlier)

    def _read_pace(self) -> float:
        """GFLOP/s now; read between what is timed."""
        self._readings.append(matmul_rate(self.models.dtype, "cpu"))
        return self._readings[-1]

    @property
    def tried(self) -> list[Tried]:
        return [found.tried for found in self._measured if found.tried is not None]

    def refused(self, depth: Depth) -> bool:
        """Whether a dry run of this depth, or of one that trains no more, found no room in memory."""
        return any(depth.trainable >= other.trainable for other, _ in self._refused)

    def _dose(self, visits: list[Visit]) -> Dose:
        """What goes through these depths on a machine of this speed."""
        models, train = self.models, self.data.train
        rate = 1e9 * REACHED * self._read_pace()
        per_step = Schedule.of(self.config, len(train)).pairs_per_step
        policy = models.engine.policy
        inside = sum(p.numel() for name, p in policy.named_parameters() if layer_of(name) >= 0)
        head = policy.get_output_embeddings().weight.numel()
        return choose_dose(train, per_step, inside, head, visits, rate)

    def _try(self, visit: Visit, dose: Dose, loaded: bool) -> None:
        """One dry run; a depth that may not fit into memory, or does not, is left out.

        Args:
            loaded: whether it is the one that the models were loaded for.
        """
        if loaded:
            models = self.models
        else:
            self._let_go()
            if not self._may_fit(visit.depth):
                return
            models = load_models(
                self._at(visit.depth), self._raw, self.models.computing["kernels"] or None
            )
        samples = step_samples(self.data.train, dose.pairs)
        try:
            run = DryRun(self.config, models, visit, self.data.train, samples, dose, self.sizes)
            found = run.go(first=not self._measured, between=self._read_pace)
        except Exception as error:
            refused = isinstance(error, SmoldpoError) and "memory" in str(error)
            if not (refused or is_out_of_memory(error)):
                raise
            # Without its traceback, which holds every tensor of the attempt.
            self._refused.append((visit.depth, error.with_traceback(None)))
            return
        if self._measured and found.tried is not None:
            there = self.tried[0].rest  # kernels and threads of the first depth were there already
            seen = {
                name: getattr(found.tried, name) + there for name in ("other", "rest", "passing")
            }
            found.tried = replace(found.tried, **seen)
        self._measured.append(found)

    def _let_go(self) -> None:
        """The first depth's engine is not needed any more; what was decided for it stays."""
        self.models = replace(self.models, engine=None)
        gc.collect()
        trim_memory()

    def _may_fit(self, depth: Depth) -> bool:
        """Whether a step at this depth is safe to try."""
        if self.refused(depth):
            return False
        if not self._measured:  # nothing is known of a step yet; the dry run looks before its first
            return True
        wanted = need(self.sizes, self.tried, depth, self.counts.steps(self.packing).longest)
        most = wanted.parts["backward"] / 2 + max(
            wanted.phases[p] for p in ("loading", "first pass", "training")
        )
        return most - self.sizes.libraries <= self.free

    def _at(self, depth: Depth) -> TrainConfig:
        """The same configuration at another depth, computing in the same way."""
        decided: dict[str, Any] = self.models.computing
        return self.config.model_copy(
            update={
                "freeze_layers": None if self.config.train_layers else depth.frozen,
                "cache": "memory",
                "dtype": str(self.models.dtype).removeprefix("torch."),
                "engine": decided["engine"],
                "compile": "on" if decided["compiled"] else "off",
            }
        )

    def _packing(self) -> Packing:
        """How the run's pairs are laid out where memory is no matter."""
        budget = self.models.engine.budget
        if self.fast:
            return FastPacking(budget, self.shared)
        return PlainPacking(budget, self.config.per_device_eval_batch_size)


# What comes after training, measured: the model put together and saved, answers of both models, the disk.


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


def measure_ends(config: TrainConfig, models: PolicyAndReference, data: TokenizedData) -> Ends:
    """Loads models as at the end of a run, and draws a few tokens of the run's own answers."""
    asked = choose_prompts(
        data.eval_pairs, data.eval, config.generate_prompts, models.positions, config.max_new_tokens
    )
    sample = tokenize_sample_prompt(config, models)
    begun = time.perf_counter()
    trained = models.trained()
    if models.adapter is not None and config.merge:
        models.adapter.merged(trained)
    del trained
    loading = time.perf_counter() - begun
    trim_memory()
    begun = time.perf_counter()
    model = cast_frozen(models.reference(), models.dtype)
    read_in(model)
    beginning = time.perf_counter() - begun
    before = resident()
    batches = [
        asked[start : start + GENERATION_BATCH_SIZE]
        for start in range(0, len(asked), GENERATION_BATCH_SIZE)
    ]
    batches += [[sample]] if sample else []
    with height() as seen:
        drawing = _drawing(config, models, model, batches)
    size = bytes_of(model)
    del model
    gc.collect()
    trim_memory()
    beginning += 0.0 if models.shares else loading
    answering = beginning + 2 * drawing if batches else 0.0
    prompts = [len(question.ids) for batch in batches for question in batch]
    return Ends(loading, answering, float(size), float(seen.bytes - before), prompts)


def _drawing(
    config: TrainConfig,
    models: PolicyAndReference,
    model: PreTrainedModel,
    batches: list[list[EvalPrompt]],
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
    models: PolicyAndReference,
    model: PreTrainedModel,
    batch: Sequence[EvalPrompt],
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
