"""Loading a run's parts as it will, and trying them at a few freeze depths: all that a forecast knows."""

from __future__ import annotations

import gc
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from smoldpo import progress
from smoldpo.config import TrainConfig
from smoldpo.engine.compiling import REACHED
from smoldpo.engine.memory import file_page_bytes, free_memory, give_back_freed_memory
from smoldpo.engine.out_of_memory import is_out_of_memory
from smoldpo.engine.packing import common_beginning
from smoldpo.engine.precision import NAMES, earlier_rates, master_dtype, matmul_rate
from smoldpo.errors import SmoldpoError
from smoldpo.loss_facts import needs_reference
from smoldpo.materials import load_data, load_models, tokenize
from smoldpo.models.freeze import layer_of
from smoldpo.plan.counting import FastPacking, Packing, PlainPacking
from smoldpo.plan.depths import Visit, depths_to_try, every_depth
from smoldpo.plan.dose import Dose, choose_dose
from smoldpo.plan.ends import Disk, Ends, measure_disk, measure_ends
from smoldpo.plan.forecast import Depth
from smoldpo.plan.kept import NOTHING, Cupboard
from smoldpo.plan.loads import Counts
from smoldpo.plan.measuring import DryRun, Measured
from smoldpo.plan.memory import Sizes, Tried, need
from smoldpo.plan.pace import Pace
from smoldpo.plan.rates import fit_rates
from smoldpo.plan.resident import bytes_of, read_in, resident
from smoldpo.plan.samples import step_samples
from smoldpo.saving import SHARD_BYTES
from smoldpo.trainer import Schedule


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
        self.fast = self.models.decided["engine"] == "fast"
        self.depths = every_depth(config, self.models)
        self.sizes = self._sizes(libraries)
        pairs = self.data.train + self.data.eval
        self.shared = common_beginning(pairs) if self.fast else ()
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
                self._at(visit.depth), self._raw, self.models.decided["kernels"] or None
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
        give_back_freed_memory()

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
        decided: dict[str, Any] = self.models.decided
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
