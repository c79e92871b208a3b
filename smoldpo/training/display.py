"""A run's display on a terminal; elsewhere the plain line of utils/progress.py.

    loss 0.4210  accuracy 0.88  margin 1.207  3.4 pairs/s
    memory 2.1 GB, at most 3.0 GB
    evaluated at step 40: loss 0.5031, accuracy 0.81, margin 0.912
    training ━━━━━━━━━━━━╸━━━━━━━━━━━━━━━━━ 48/128 left 0:01:12

What the run says meanwhile stands above it, whole; the view itself is gone when training ends.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import psutil
from rich.console import Console, ConsoleOptions
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from smoldpo.training.phases import peak_megabytes
from smoldpo.types import Advance
from smoldpo.utils import progress

STEPS = 10
"""Steps over which the speed is averaged."""
Figures = Mapping[str, float]


@contextlib.contextmanager
def training(
    title: str,
    total: int,
    step: Callable[[], Figures] = dict,
    evaluation: Callable[[], Figures] = dict,
) -> Iterator[Advance]:
    """A bar over `total` steps with their figures around it; yields the function that advances it.

    Args:
        step: what the last step found: `loss`, `rewards/accuracies`, ..., `pairs` and `seconds`.
        evaluation: the last evaluation's row of metrics (`step`, `eval_loss`, ...); empty before
            any.
    """
    if not progress.on_terminal() or progress.is_drawing():
        with progress.bar(title, total) as advance:
            yield advance
        return
    view = View(title, total, step, evaluation)
    with progress.framed(view.bars, view):
        yield view.advance


class View:
    """Figures of the last step, of the last evaluation, and of the process, above the bars."""

    def __init__(
        self,
        title: str,
        total: int,
        step: Callable[[], Figures],
        evaluation: Callable[[], Figures],
    ):
        self._newest, self._evaluated = step, evaluation
        self._now: Figures = {}
        self._steps: deque[tuple[float, float]] = deque(maxlen=STEPS)
        self._process = psutil.Process()
        self._total, self._done = total, 0
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[count]}"),
            TextColumn("{task.fields[left]}"),
            TimeRemainingColumn(),
            console=progress.console(),
            expand=True,
        )
        self._task = self.bars.add_task(title, total=total, count="", note="", left="left")

    def advance(self, units: int, note: str = "") -> None:
        """So many more steps are done. The note is for plainer displays."""
        self._done += units
        count = f"{self._done:,}/{self._total:,}"
        self.bars.update(self._task, completed=self._done, count=count)
        now = self._newest()
        if now:
            self._steps.append((now["pairs"], now["seconds"]))
        # Last, for another thread draws: what it reads has its place in the speed already.
        self._now = now

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterable[Any]:
        for items in (self._step(), self._memory(), self._evaluation()):
            for line in flowed(items, options.max_width):
                yield Text(line, no_wrap=True, overflow="ellipsis")
        if progress.notice():
            yield Text(progress.notice(), style="bold")
        yield self.bars

    def _step(self) -> list[str]:
        if not self._now:
            return []
        pairs, seconds = (sum(column) for column in zip(*self._steps, strict=True))
        return [*_figures(self._now, ""), f"{pairs / max(seconds, 1e-9):.1f} pairs/s"]

    def _memory(self) -> list[str]:
        now, peak = self._process.memory_info().rss / 1e9, peak_megabytes()
        most = "" if peak is None else f", at most {peak / 1e3:.1f} GB"
        return [f"memory {now:.1f} GB{most}"]

    def _evaluation(self) -> list[str]:
        row = self._evaluated()
        if "eval_loss" not in row:
            return []
        first, *others = _figures(row, "eval_")
        return [f"evaluated at step {row['step']:,}: {first}", *others]


def _figures(row: Figures, prefix: str) -> list[str]:
    """Loss, accuracy and margin, the latter two by implicit reward if there is a reference."""
    kind = "rewards" if f"{prefix}rewards/accuracies" in row else "logps"
    items = [f"loss {row[f'{prefix}loss']:.4f}"]
    for name, title, form in (("accuracies", "accuracy", ".2f"), ("margins", "margin", ".3f")):
        value = row.get(f"{prefix}{kind}/{name}")
        items += [] if value is None else [f"{title} {value:{form}}"]
    return items


def flowed(items: Sequence[str], width: int) -> list[str]:
    """Items side by side in lines of at most `width`, two spaces apart; no item is broken."""
    lines: list[str] = []
    for item in items:
        if lines and len(lines[-1]) + 2 + len(item) <= width:
            lines[-1] += f"  {item}"
        else:
            lines.append(item)
    return lines
