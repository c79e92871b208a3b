"""The trial: a run's parts, loaded as the run will, and dry runs at a few freeze depths."""

from __future__ import annotations

import gc
import time
from dataclasses import replace
from pathlib import Path

import torch

from smoldpo.config.losses import needs_reference
from smoldpo.config.schema import TrainConfig
from smoldpo.engine.autotune import NAMES, dtype_name, earlier_rates, matmul_rate
from smoldpo.engine.batch_budget import with_memory_errors
from smoldpo.engine.batching import TokenBatching
from smoldpo.engine.compile import REACHED
from smoldpo.engine.packing import common_prefix
from smoldpo.engine.precision import master_dtype
from smoldpo.engine.trunk import head_weight
from smoldpo.models.freeze import layer_of
from smoldpo.models.mapped_weights import file_page_bytes
from smoldpo.models.save import SHARD_BYTES
from smoldpo.plan.cache_lookup import NOTHING_CACHED, CacheLookup, CacheMisses
from smoldpo.plan.cost_model import MachineSpeed, Rates, fit_rates
from smoldpo.plan.depths import FreezeDepth, TrialDepth, all_depths, depths_to_try
from smoldpo.plan.dry_run import DryRun, Measurements, TrialSize, choose_trial_size
from smoldpo.plan.measure import (
    DiskSpeed,
    RunEnd,
    bytes_of,
    measure_disk,
    measure_run_end,
    page_in,
    resident,
)
from smoldpo.plan.memory import ModelSizes, ObservedMemory, forecast_memory
from smoldpo.plan.workload import RunCounter
from smoldpo.training.sampler import Schedule
from smoldpo.training.setup import load_data, load_models, tokenize
from smoldpo.utils import progress
from smoldpo.utils.core_use import CoreUse, CoreWatch
from smoldpo.utils.errors import OutOfMemoryError
from smoldpo.utils.memory import free_memory, trim_memory


class Trial:
    """What a forecast is made from.

    Args:
        imports: seconds that the process took before, which a run takes too.

    Attributes:
        start: seconds to the end of tokenising.
        free: bytes of memory free before the models were loaded.
        depths, misses: every freeze depth, and what the cache lacks at each, by frozen layers.
        cached_in: disk, memory, or off.
        models: loaded as the run will; without their engine once `run` has used it.
        workers: that compute streams at once.
        disk, run_end, rates: measured by `run`.
    """

    disk: DiskSpeed
    run_end: RunEnd
    rates: Rates
    _use: CoreUse | None = None

    def __init__(self, config: TrainConfig, imports: float):
        self.config = config
        self._measured: list[Measurements] = []
        self._refused: list[tuple[FreezeDepth, Exception]] = []
        self._readings: list[float] = []
        self._watch = CoreWatch()
        begun = time.perf_counter()
        earlier = {dtype: earlier_rates(dtype, "cpu") for dtype in NAMES.values()}
        self._raw = load_data(config)
        libraries, self.free = resident(), free_memory(torch.device("cpu"))
        # With a cache in memory nothing is written; the one on disk is looked up apart.
        self.models = load_models(config.model_copy(update={"cache": "memory"}), self._raw)
        self.data = tokenize(config, self.models, self._raw)
        self.start = imports + time.perf_counter() - begun
        self._earlier = earlier[self.models.facts.dtype]
        fast = self.models.computing.engine == "fast"
        self.depths = all_depths(config, self.models)
        self.sizes = self._sizes(fast, libraries)
        pairs = self.data.train + self.data.eval
        self.misses: dict[int, CacheMisses] = {d.frozen: NOTHING_CACHED for d in self.depths}
        self.cached_in = "off"
        self.batching = self.models.engine.batching
        if isinstance(self.batching, TokenBatching):
            self.batching = replace(self.batching, prefix=common_prefix(pairs))
            lookup = CacheLookup(config, self.models, self.free, pairs, self.batching)
            self.cached_in = lookup.location
            self.misses = {d.frozen: lookup.misses(d.below) for d in self.depths}
        self.workers = self.models.engine.workers.count
        self.counter = RunCounter(config, self.data.train, self.data.eval)

    def _sizes(self, fast: bool, libraries: float) -> ModelSizes:
        """Of the models as loaded; whatever else loading left counts with the libraries."""
        models, config = self.models, self.config
        engine = models.engine
        dtype, full_bytes = models.facts.dtype, models.trainable.policy_bytes
        master, compute = master_dtype(dtype).itemsize, dtype.itemsize
        parameters = full_bytes / master
        loaded = parameters * models.facts.stored_dtype.itemsize
        released, separate_masters = 0, fast and compute != master
        if fast:
            weights = parameters * compute
            if engine.reference is not None:
                weights += bytes_of(engine.reference)
                released = file_page_bytes(engine.reference.parameters())
        else:  # all in full precision; the policy without adapters may be the reference
            own = config.reference is not None or not config.use_peft
            weights = full_bytes * (1 + (needs_reference(config.loss_type) and own))
        page_in(engine.policy, engine.reference)
        trainable = sum(p.numel() for _, p in engine.trainable_parameters())
        here = next(d for d in self.depths if d.frozen == models.trainable.frozen_layers)
        counted = weights - here.unconverted_bytes + trainable * master * separate_masters
        return ModelSizes(
            libraries=libraries + max(0.0, resident() - libraries - counted),
            loaded=loaded,
            loaded_item=models.facts.stored_dtype.itemsize,
            shard=min(SHARD_BYTES, full_bytes) if loaded < full_bytes else 0.0,
            weights=weights,
            compute_item=compute,
            master=master,
            separate_masters=separate_masters,
            released=released,
            answers=bool(config.generate_prompts or config.sample_prompt),
            shares=models.shares,
            merges=config.use_peft and config.merge,
        )

    def run(self) -> None:
        """The end of a run first, while the policy is unchanged; then the dry runs.

        Raises:
            SmoldpoError: none of the depths tried fits into memory.
        """
        tried = depths_to_try(self.depths, self.models.trainable.frozen_layers)
        size = self._choose_size(tried)
        with progress.bar("dry run", len(tried) + 1) as advance:
            with progress.silenced():
                self.disk = measure_disk(Path(self.config.output_dir or "runs").expanduser())
                self.run_end = measure_run_end(self.config, self.models, self.data)
            advance(1)
            for number, each in enumerate(tried):
                with progress.silenced():
                    self._try(each, size, loaded=number == 0)
                if number == 0:
                    del self.models.engine  # every other depth loads its own
                advance(1)
        if not self._measured:
            raise self._refused[-1][1]
        self.sizes = replace(
            self.sizes,
            answering_model=self.run_end.model_bytes,
            answering=self.run_end.answering_bytes,
        )
        self._use = self._watch.use()
        self.rates = fit_rates(
            [timed for found in self._measured for timed in found.passes],
            [timed for found in self._measured for timed in found.steps],
        )

    @property
    def speed(self) -> MachineSpeed:
        """The machine's during the trial."""
        return MachineSpeed(self._readings, self._earlier, self._use, self.workers)

    def _read_speed(self) -> float:
        """GFLOP/s of one thread now; read between what is timed."""
        self._readings.append(matmul_rate(self.models.facts.dtype, "cpu"))
        return self._readings[-1]

    @property
    def observed(self) -> list[ObservedMemory]:
        return [found.memory for found in self._measured if found.memory is not None]

    def refused(self, depth: FreezeDepth) -> bool:
        """Whether a dry run here, or at a depth that trains no more, did not fit into memory."""
        return any(depth.trainable >= other.trainable for other, _ in self._refused)

    def _choose_size(self, tried: list[TrialDepth]) -> TrialSize:
        """The size of the dry runs on a machine of this speed."""
        policy = self.models.engine.policy
        inside = sum(p.numel() for name, p in policy.named_parameters() if layer_of(name) >= 0)
        return choose_trial_size(
            self.data.train,
            Schedule.of(self.config, len(self.data.train)).pairs_per_step,
            inside,
            head_weight(policy).numel(),
            tried,
            1e9 * REACHED * self.workers * self._read_speed(),
        )

    def _try(self, tried: TrialDepth, size: TrialSize, loaded: bool) -> None:
        """One dry run; a depth that may not fit into memory, or does not, is left out.

        Args:
            loaded: whether the models were loaded for this depth.
        """
        if loaded:
            models = self.models
        else:
            gc.collect()
            trim_memory()
            if not self._may_fit(tried.depth):
                return
            config, kernels = self._at(tried.depth), self.models.computing.kernels
            models = load_models(config, self._raw, kernels or None)
        try:
            run = DryRun(self.config, models, tried, self.data.train, size)
            first = not self._measured
            found = with_memory_errors(lambda: run.run(first, self._read_speed))
        except OutOfMemoryError as error:
            # Without its traceback, which holds every tensor of the attempt.
            self._refused.append((tried.depth, error.with_traceback(None)))
            return
        memory = found.memory
        if self._measured and memory is not None:
            # Kernels and threads of the first depth are running already.
            started = self.observed[0].rest
            parts = ("other", "rest", "first_pass")
            more = {part: getattr(memory, part) + started for part in parts}
            found.memory = replace(memory, **more)
        self._measured.append(found)

    def _may_fit(self, depth: FreezeDepth) -> bool:
        """Whether a step at this depth is safe to try."""
        if self.refused(depth):
            return False
        if not self._measured:  # the dry run itself looks before its first step
            return True
        rows = self.counter.steps(self.batching, self.workers).longest
        memory = forecast_memory(self.sizes, self.observed, depth, rows)
        most = max(memory.phases[phase] for phase in ("loading", "first pass", "training"))
        return memory.parts["backward"] / 2 + most - self.sizes.libraries <= self.free

    def _at(self, depth: FreezeDepth) -> TrainConfig:
        """The same configuration at another depth, computing in the same way."""
        computing = self.models.computing
        return self.config.model_copy(
            update={
                "freeze_layers": None if self.config.train_layers else depth.frozen,
                "cache": "memory",
                "dtype": dtype_name(self.models.facts.dtype),
                "engine": computing.engine,
                "compile": "on" if computing.compiled else "off",
            }
        )
