"""The sweep's report: one HTML file that runs no script and asks for nothing. No torch here.

Its plots are every trial as a line through its settings, and a map of two settings. Only numbers
and short words stand in a plot; a longer value (a model's folder, say) is a letter there, which the
page explains.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smoldpo.evaluation.metrics import METRICS
from smoldpo.reports.plots import BLUE, GREY, INK, ORANGE, Plot, svg
from smoldpo.reports.templating import render
from smoldpo.sweep.results import RankedTrial, SweepResults
from smoldpo.sweep.space import Choices, Range, Space, value_text
from smoldpo.utils.files import write_text


def html_page(results: SweepResults, space: Space, sweep_yaml: str) -> str:
    """The page of what `results.collect` gives."""
    plots = []
    if results.done:
        plots = [parallel_coordinates(results, space), settings_map(results, space)]
    return render(
        "sweep.html",
        results=results,
        trials=sorted(results.trials, key=lambda trial: _rank(trial, results.winner)),
        names=list(space),
        words=value_text,
        metric=METRICS[results.metric],
        plots=[plot for plot in plots if plot],
        final=results.final,
        accuracy=results.final.accuracy if results.final else {},
        metric_names=METRICS,
        sweep_yaml=sweep_yaml,
    )


def write_page(folder: Path, results: SweepResults, space: Space) -> None:
    """Write report.html."""
    text = (folder / "sweep.yaml").read_text(encoding="utf-8")
    write_text(folder / "report.html", html_page(results, space, text))


def _rank(trial: RankedTrial, winner: int | None) -> tuple[bool, bool, float, int]:
    """The winner first, then by accuracy; failed ones last."""
    accuracy = trial.accuracy
    value = accuracy.value if accuracy else 0.0
    return accuracy is None, trial.number != winner, -value, trial.number


MAX_LABELS = 30
"""Points whose accuracy is written on the map; with more of them, colour alone tells."""
SHORT = re.compile(r"[\w.+,-]{1,10}")


class Axis:
    """Where a setting's values lie between 0 and 1, and what is written there."""

    def __init__(self, name: str, part: Choices | Range):
        self.name = name
        values = part.values if isinstance(part, Choices) else tuple(map(part.at, (0, 0.5, 1)))
        self.numeric = all(
            isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)
            for v in values
        )
        self._values = sorted(values) if self.numeric else list(values)
        positive = self.numeric and self._values[0] > 0
        spans_decades = positive and self._values[-1] / self._values[0] >= 8
        self.log = part.log if isinstance(part, Range) else spans_decades
        self.letters: dict[str, str] = {}
        if not self.numeric:
            words = [value_text(value) for value in self._values]
            if not all(SHORT.fullmatch(word) for word in words):
                self.letters = {chr(97 + at % 26): word for at, word in enumerate(words)}

    def at(self, value: Any) -> float:
        """The height of a value."""
        if not self.numeric:
            return _share(self._values.index(value), 0, len(self._values) - 1)
        low, high = self._values[0], self._values[-1]
        if self.log:
            return _share(math.log(value), math.log(low), math.log(high))
        return _share(value, low, high)

    def ticks(self) -> list[tuple[float, str]]:
        """Heights and what is written there, at most six."""
        values = self._values
        if len(values) > 6:
            values = [values[round(k * (len(values) - 1) / 5)] for k in range(6)]
        if self.letters:
            return [(self.at(v), word) for word, v in zip(self.letters, values, strict=False)]
        return [(self.at(value), value_text(value)) for value in values]


def _share(value: float, low: float, high: float) -> float:
    return 0.5 if high == low else (value - low) / (high - low)


def _done(results: SweepResults) -> list[RankedTrial]:
    """The trials that are done, the winner last, so that it is drawn on top."""
    done = [trial for trial in results.trials if trial.accuracy]
    return sorted(done, key=lambda trial: (trial.number == results.winner, _percent(trial)))


def _percent(trial: RankedTrial) -> float:
    return 100 * trial.accuracy.value if trial.accuracy else 0.0


def _bounds(trials: Sequence[RankedTrial]) -> tuple[float, float]:
    values = [_percent(trial) for trial in trials]
    low, high = min(values), max(values)
    return (low - 1, high + 1) if low == high else (low, high)


def parallel_coordinates(results: SweepResults, space: Space) -> Plot:
    """Every trial as a line: through the value of each setting, to its accuracy at the right."""
    trials = _done(results)
    axes_of = [Axis(name, part) for name, part in space.items()]
    low, high = _bounds(trials)

    def draw(axes: Any) -> None:
        for trial in trials:
            heights = [axis.at(trial.settings[axis.name]) for axis in axes_of]
            share = _share(_percent(trial), low, high)
            wins = trial.number == results.winner
            axes.plot(
                range(len(heights) + 1),
                [*heights, share],
                color=ORANGE if wins else BLUE,
                linewidth=2.6 if wins else 1.3,
                alpha=1 if wins else 0.15 + 0.55 * share,
            )
        marks = [axis.ticks() for axis in axes_of]
        marks.append([(0, f"{low:.1f}%"), (1, f"{high:.1f}%")])
        for position, written in enumerate(marks):
            axes.plot([position, position], [0, 1], color=INK, linewidth=0.8)
            last = position == len(axes_of)
            for height, text in written:
                inner = 0 < position < len(axes_of)  # these are written left of their axis
                axes.annotate(
                    text, (position, height), (-4 if inner else 4, 0 if last else 3),
                    textcoords="offset points", ha="right" if inner else "left",
                    va="center" if last else "bottom", fontsize=9, color=INK,
                )  # fmt: skip
        names = [axis.name.replace("_", "\n", 1) for axis in axes_of]
        axes.set_xticks(range(len(marks)), [*names, "accuracy"])
        axes.set_xlim(-0.1, len(marks) - 1 + 0.35)
        axes.set_yticks([])
        axes.set_ylim(-0.06, 1.14)
        axes.grid(visible=False)
        axes.spines[["left", "bottom"]].set_visible(False)

    title = "Settings and accuracy of every trial"
    note = (
        "A line is a trial; the orange one is the winner, and the stronger a blue one, the better."
    )
    note += _letter_legend(axes_of)
    return Plot(title, svg(draw, title, (max(4.8, 1.1 * (len(axes_of) + 1)), 3.2)), note)


def _letter_legend(axes_of: Sequence[Axis]) -> str:
    parts = [
        f" {axis.name}: "
        f"{', '.join(f'{letter} is {word}' for letter, word in axis.letters.items())}."
        for axis in axes_of
        if axis.letters
    ]
    return "".join(parts)


def map_settings(space: Space) -> tuple[str, str] | None:
    """The settings of the map: β and rate where both are tried, else the first two numbers."""
    if "beta" in space and "learning_rate" in space:
        return "beta", "learning_rate"
    numbers = [name for name, part in space.items() if Axis(name, part).numeric]
    return (numbers[0], numbers[1]) if len(numbers) > 1 else None


def settings_map(results: SweepResults, space: Space) -> Plot | None:
    """Accuracy over two settings; None where no two of them are numbers."""
    names = map_settings(space)
    trials = _done(results)
    if names is None or not trials:
        return None
    across, up = (Axis(name, space[name]) for name in names)
    low, high = _bounds(trials)
    best: dict[tuple[float, float], RankedTrial] = {}
    for trial in trials:  # several trials at one place differ in other settings: the best is shown
        point = (across.at(trial.settings[across.name]), up.at(trial.settings[up.name]))
        if point not in best or _percent(trial) >= _percent(best[point]):
            best[point] = trial

    def draw(axes: Any) -> None:
        labelled: list[tuple[float, float]] = []  # the winner first, so that it is never left out
        for (x, y), trial in reversed(best.items()):
            share = _share(_percent(trial), low, high)
            wins = trial.number == results.winner
            axes.plot(
                x, y, "o", color=BLUE, alpha=0.15 + 0.85 * share, markersize=13, markeredgewidth=0
            )
            if wins:
                axes.plot(
                    x, y, "o", color=ORANGE, fillstyle="none", markersize=17, markeredgewidth=2
                )
            near = [1 for u, v in labelled if abs(u - x) < 0.12 and abs(v - y) < 0.13]
            if len(best) <= MAX_LABELS and not near:
                labelled.append((x, y))
                axes.annotate(
                    f"{_percent(trial):.1f}", (x, y), (0, 10), textcoords="offset points",
                    ha="center", fontsize=9, color=INK,
                )  # fmt: skip
        for axis, ticks, label in (
            (across, axes.set_xticks, axes.set_xlabel), (up, axes.set_yticks, axes.set_ylabel)
        ):  # fmt: skip
            written = axis.ticks()
            ticks([height for height, _ in written], [text for _, text in written])
            label(axis.name.replace("_", " ") + (", log scale" if axis.log else ""))
        axes.set_xlim(-0.12, 1.12)
        axes.set_ylim(-0.12, 1.22)
        axes.tick_params(color=GREY)

    title = f"Accuracy over {_word(across.name)} and {_word(up.name)}"
    note = f"In %, from {low:.1f} (pale) to {high:.1f}; the ring is the winner."
    if len(best) < len(trials):
        note += " Of trials at one place the best is shown."
    return Plot(title, svg(draw, title, (4.8, 3.4)), note)


def _word(name: str) -> str:
    return {"beta": "β", "learning_rate": "learning rate"}.get(name, name.replace("_", " "))
