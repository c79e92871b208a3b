"""When a run saves checkpoints, and which of them stay."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from smoldpo.config.schema import TrainConfig
from smoldpo.training.checkpoint import (
    Checkpoint,
    load_checkpoint,
    prune,
    remove_partial,
    save_checkpoint,
)
from smoldpo.training.metrics_file import MetricsFile
from smoldpo.training.phases import checkpoint_due
from smoldpo.training.policy_and_reference import PolicyAndReference
from smoldpo.training.setup import TokenizedData
from smoldpo.training.state import TrainingState, checkpoint_bytes
from smoldpo.utils import progress
from smoldpo.utils.distributed import world
from smoldpo.utils.files import existing_parent, require_space


class Checkpointer:
    """Saves a run's state into `folder`.

    Args:
        extra_state: what else belongs into each checkpoint, as JSON; read when one is saved.
    """

    def __init__(
        self, folder: Path, config: TrainConfig, state: TrainingState, metrics: MetricsFile
    ):
        self.folder, self._config, self._state, self._metrics = folder, config, state, metrics
        self.extra_state: dict[str, Any] = {}
        self._saved: int | None = None
        self._rows_at_end: int | None = None
        self._when = time.monotonic()
        self._ranks = world()
        if self._ranks.first:
            remove_partial(folder)

    def save(self) -> None:
        """The state as it is now, and then the removal of older ones; the first rank writes it."""
        whole = self._state.capture() if self._state.shared_out else None
        self._ranks.on_first(lambda: self.write(whole))

    def write(self, captured: Checkpoint | None = None) -> None:
        """As `save`, by this process alone; by default what it can capture by itself."""
        state, config = self._state, self._config
        if self._saved != state.step:
            with progress.spinner(f"saving checkpoints/step-{state.step}"):
                rows = self._metrics.sync()
                rows = rows if self._rows_at_end is None else self._rows_at_end
                captured = captured or state.capture()
                captured.state.update(metrics_rows=rows, **self.extra_state)
                save_checkpoint(self.folder, captured)
            best = state.best.step if config.load_best_model_at_end else None
            prune(self.folder, state.step, config.keep_checkpoints, () if best is None else (best,))
        self._saved, self._when = state.step, time.monotonic()

    def end_training(self) -> None:
        """Log from now on outside of steps: a run resumed from here logs it again."""
        if self._ranks.first:
            self._rows_at_end = self._metrics.sync()

    def after_step(self, last: bool) -> None:
        """Save if it is time to: by steps, by minutes, or at the end.

        Ranks meet here after each step; where one was told to stop, all do.
        """
        if self._ranks.of_first(lambda: self._is_due(last)):
            self.save()

    def _is_due(self, last: bool) -> bool:
        config, step = self._config, self._state.step
        minutes = (time.monotonic() - self._when) / 60
        others = self.folder.exists()
        return checkpoint_due(config, step, minutes, last=last, others=others)

    def restore_best(self) -> int:
        """The policy becomes that of the best evaluation; returns its step.

        Raises:
            SmoldpoError: its checkpoint is damaged.
        """
        step = self._state.best.step
        assert step is not None, "there was an evaluation"
        self._state.restore_weights(load_checkpoint(self.folder / f"step-{step}"))
        return step


def require_disk(
    folder: Path, config: TrainConfig, models: PolicyAndReference, data: TokenizedData
) -> None:
    """Refuse a run for which the disk has no room: model, checkpoints, and what is computed once.

    Raises:
        SmoldpoError: naming the bytes that each takes, and the bytes free.
    """
    state = checkpoint_bytes(models.engine, config)
    saves = bool(config.save_steps or config.save_minutes or config.load_best_model_at_end)
    count = config.keep_checkpoints + 1 + config.load_best_model_at_end if saves else 1
    model = models.trainable.saved_bytes
    needed = model + count * state
    purpose = f"the model ({model:,} bytes) and {count} checkpoints ({count * state:,})"
    store = models.engine.disk_bytes(data.train + data.eval)
    if store and any(_same_disk(folder, cache_folder) for cache_folder in models.cache_folders):
        needed += store
        purpose += f", and the frozen layers' output ({store:,}; none with --cache memory)"
    require_space(folder, needed, purpose)


def _same_disk(one: Path, other: Path) -> bool:
    return existing_parent(one).stat().st_dev == existing_parent(other).stat().st_dev
