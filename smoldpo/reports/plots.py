"""The plots of a report: each is a title, a line of explanation, and an SVG.

They are small enough to read on a phone. No text that people wrote goes into a plot: names of runs
and files belong in the page around it.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from smoldpo.evaluation.metrics import METRICS
from smoldpo.evaluation.schema import Accuracy, CalibrationBin, Evaluation, LengthBin, Margins
from smoldpo.reports.run_files import Row, RunFiles

BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"
)  # fmt: skip
"""Okabe and Ito's palette, which people with any kind of colour vision can tell apart."""


RUN_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY)
MAX_POINTS = 400
"""Steps that a curve shows; of more, neighbours are drawn as their mean."""
METRIC_WORDS = {name: words[0].upper() + words[1:] for name, words in METRICS.items()}


@dataclass(frozen=True)
class Plot:
    """A figure of the page."""

    title: str
    svg: str
    note: str = ""


@dataclass(frozen=True)
class Panel:
    """A curve against the step: which columns of metrics.jsonl, and how they are shown."""

    title: str
    unit: str
    columns: tuple[str, ...]
    scale: float = 1.0
    level: float | None = None
    """A horizontal line: what no learning would look like."""


PANELS = (
    Panel("Loss", "loss, nats", ("loss",), level=math.log(2)),
    Panel("Implicit-reward accuracy", "accuracy, %", ("rewards/accuracies",), 100, level=50),
    Panel("Implicit-reward margin", "margin, β × nats", ("rewards/margins",), level=0),
    Panel("Log-probability accuracy", "accuracy, %", ("logps/accuracies",), 100, level=50),
    Panel("Log-probability margin", "margin, nats", ("logps/margins",), level=0),
    Panel("Log-probabilities", "log-probability, nats", ("logps/chosen", "logps/rejected")),
    Panel("Learning rate", "learning rate", ("learning_rate",)),
    Panel("Gradient norm", "norm before clipping", ("grad_norm",)),
)
NOT_SMOOTHED = {"learning_rate"}
"""Columns without noise: drawn as they are."""


def curves(run: RunFiles) -> list[Plot]:
    """The training curves of one run."""
    return [
        Plot(panel.title, svg(partial(_draw_panel, panel=panel, run=run), panel.title))
        for panel in _panels([run])
    ]


def overlaid_curves(runs: Sequence[RunFiles]) -> list[Plot]:
    """The curves of several runs, each in its colour; the page says which is whose."""
    return [
        Plot(panel.title, svg(partial(_draw_overlaid, panel=panel, runs=runs), panel.title))
        for panel in _panels(runs)
    ]


def _panels(runs: Sequence[RunFiles]) -> list[Panel]:
    """The panels of which there is something to show; ln 2 is marked where every loss is DPO's."""
    known = {column for run in runs for row in run.steps for column in row}
    found = [panel for panel in PANELS if known & set(panel.columns)]
    if all(loss_name(run.config) == "sigmoid" for run in runs):
        return found
    return [replace(panel, level=None) if panel.title == "Loss" else panel for panel in found]


def loss_name(config: Mapping[str, Any]) -> str:
    """The loss of a run in words; a list, or a name in runs of the first versions."""
    names = config.get("loss_type", "sigmoid")
    names = [names] if isinstance(names, str) else list(map(str, names or ()))
    parts = " + ".join([*names, *(["rpo"] if config.get("rpo_alpha") else [])])
    return f"{parts}, weighted" if config.get("use_weighting") else parts


def run_style(index: int) -> tuple[str, str]:
    """Colour and line style of the run at `index`: no two of the first 24 are alike."""
    styles = ("-", "--", ":", "-.")
    return RUN_COLOURS[index % 6], styles[index // 6 % 4]


def _draw_panel(axes: Any, panel: Panel, run: RunFiles) -> None:
    colours = (BLUE, ORANGE) if len(panel.columns) > 1 else (BLUE,)
    for column, colour in zip(panel.columns, colours, strict=True):
        steps, values = _series(run.steps, column, panel.scale)
        label = column.rpartition("/")[2]
        if column in NOT_SMOOTHED:
            axes.plot(steps, values, color=colour, linewidth=1.8)
            continue
        axes.plot(*_thinned(steps, values), color=colour, linewidth=0.8, alpha=0.35)
        smooth = _thinned(steps, smoothed(values))
        axes.plot(*smooth, color=colour, linewidth=1.9, label=label)
        at, held_out = _series(run.checks, f"eval_{column}", panel.scale)
        axes.plot(at, held_out, "o", color=colour, markersize=5, markeredgecolor=INK, clip_on=False)
    _finish_panel(axes, panel)
    if len(panel.columns) > 1:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0)


def _draw_overlaid(axes: Any, panel: Panel, runs: Sequence[RunFiles]) -> None:
    for index, run in enumerate(runs):
        colour, style = run_style(index)
        for column in panel.columns:
            steps, values = _series(run.steps, column, panel.scale)
            smooth = values if column in NOT_SMOOTHED else smoothed(values)
            width = 1.1 if column.endswith("rejected") else 1.9
            axes.plot(*_thinned(steps, smooth), style, color=colour, linewidth=width)
    _finish_panel(axes, panel)


def _finish_panel(axes: Any, panel: Panel) -> None:
    if panel.level is not None:
        axes.axhline(panel.level, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(panel.unit)
    axes.margins(x=0.02)
    axes.locator_params(nbins=5)


def _series(rows: Sequence[Row], column: str, scale: float) -> tuple[Any, Any]:
    """Steps and values of a column; what is no finite number is left out."""
    found = [(row["step"], row.get(column)) for row in rows]
    found = [(step, value) for step, value in found if value is not None and math.isfinite(value)]
    table = np.array(found, float).reshape(-1, 2)
    return table[:, 0], table[:, 1] * scale


def window(steps: int) -> int:
    """How many steps the thick line averages over: an odd number, about a fifteenth."""
    return max(1, steps // 30) * 2 + 1 if steps >= 10 else 1


def smoothed(values: Any) -> Any:
    """A centred moving average; towards the ends it averages over what there is."""
    kernel = np.ones(window(len(values)))
    if len(kernel) == 1:
        return values
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def _thinned(steps: Any, values: Any) -> tuple[Any, Any]:
    """At most MAX_POINTS points: of more, the means of neighbours."""
    if len(values) <= MAX_POINTS:
        return steps, values
    groups = np.array_split(np.arange(len(values)), MAX_POINTS)
    steps, values = (np.array([c[group].mean() for group in groups]) for c in (steps, values))
    return steps, values


def in_order(evaluation: Evaluation) -> dict[str, Accuracy]:
    """The accuracies, that of the headline first."""
    first = (evaluation.metric, *evaluation.accuracy)
    found = {name: evaluation.accuracy.get(name) for name in first}
    return {name: accuracy for name, accuracy in found.items() if accuracy}


def accuracies(evaluation: Evaluation) -> Plot:
    """Before and after with their intervals, one line for each way of preferring."""
    names = evaluation.names
    title = f"Accuracy with {evaluation.level:.0%} intervals"

    def draw(axes: Any) -> None:
        rows = in_order(evaluation)
        keys = list(rows)[::-1]
        for row, key in enumerate(keys):
            found = rows[key]
            for part, shift, colour in ((found.before, 0.14, GREY), (found.after, -0.14, BLUE)):
                _dot(axes, part, row + shift, colour)
        axes.axvline(50, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_yticks(range(len(keys)), [_short_metric(key) for key in keys])
        axes.set_ylim(-0.6, len(keys) - 0.4)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("pairs in which chosen is preferred, %")
        axes.locator_params(axis="x", nbins=6)

    note = f"Grey: {names.before}. Blue: {names.after}. Dashed: a coin."
    return Plot(title, svg(draw, title, (4.8, 2.1)), note)


def _short_metric(key: str) -> str:
    return {"logp": "log-prob.", "logp_per_token": "per token", "reward": "reward"}.get(key, "")


def _dot(axes: Any, part: Any, height: float, colour: str) -> None:
    if part.value is None:
        return
    if part.low is not None and part.high is not None:
        axes.plot([100 * part.low, 100 * part.high], [height] * 2, color=colour, linewidth=2.2)
    axes.plot(100 * part.value, height, "o", color=colour, markersize=7)


def margin_histogram(title: str, unit: str, margins: Margins, names: Any) -> Plot:
    """How pairs' margins are spread before and after."""
    note = f"Grey: {names.before}. Blue: {names.after}. Right of 0 the chosen answer is preferred."
    flat = sum(count > 0 for count in margins.before.counts) <= 1
    if flat:
        note += f" The dashed line: {names.before}, all pairs lie there."

    def draw(axes: Any) -> None:
        after, before = margins.after, margins.before
        axes.stairs(after.counts, after.edges, fill=True, color=BLUE, alpha=0.3)
        axes.stairs(after.counts, after.edges, color=BLUE, linewidth=1.6)
        if flat:
            axes.axvline(_middle_of_mass(before), color=INK, linewidth=1.4, linestyle=(0, (4, 3)))
        else:
            axes.stairs(before.counts, before.edges, color=GREY, linewidth=1.8)
            axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_xlim(*_filled_range(margins))
        axes.set_xlabel(unit)
        axes.set_ylabel("pairs")

    return Plot(title, svg(draw, title), note)


def _filled_range(margins: Margins) -> tuple[float, float]:
    """From the first bin that holds something to the last, and 0."""
    filled = [
        edge
        for part in (margins.before, margins.after)
        for index, count in enumerate(part.counts)
        if count
        for edge in part.edges[index : index + 2]
    ] or [-1.0, 1.0]
    low, high = min(0.0, *filled), max(0.0, *filled)
    return low - 0.03 * (high - low), high + 0.03 * (high - low)


def _middle_of_mass(histogram: Any) -> float:
    """Where the only bin that holds something lies: 0 if it reaches there."""
    filled = next((i for i, count in enumerate(histogram.counts) if count), 0)
    low, high = histogram.edges[filled], histogram.edges[filled + 1]
    return 0.0 if low <= 0 <= high else (low + high) / 2


def by_length_difference(bins: Sequence[LengthBin]) -> Plot:
    """Accuracy from much shorter to much longer chosen answers."""
    title = "Accuracy by length difference"
    note = "Points: after, in bins of equally many pairs. Dashed: a coin."
    befores = [100 * part.before for part in bins if part.before is not None]
    flat = set(befores) <= {50.0}
    if not flat:
        note += " Grey: before."

    def draw(axes: Any) -> None:
        if not flat:
            places = [at for at, part in enumerate(bins) if part.before is not None]
            axes.plot(places, befores, "o", color=GREY, markersize=5)
        for position, part in enumerate(bins):
            _with_interval(axes, position, part.value, part.low_ci, part.high_ci)
        edges = [part.low for part in bins] + [bins[-1].high]
        stride = math.ceil(len(edges) / 7)
        shown = range(0, len(edges), stride)
        axes.set_xticks(
            [at - 0.5 for at in shown], [f"{edges[at]:.0f}".replace("-", "−") for at in shown]
        )
        axes.set_xlim(-0.6, len(bins) - 0.4)
        _share_axis(axes)
        axes.set_xlabel("chosen minus rejected, tokens")

    return Plot(title, svg(draw, title), note)


def calibration(bins: Sequence[CalibrationBin]) -> Plot:
    """How often the policy's preferences are right, against how sure it is."""
    title = "Predicted against observed accuracy"
    bins = [part for part in bins if part.predicted is not None and part.observed is not None]

    def draw(axes: Any) -> None:
        reach = max([60.0, *(100 * part.predicted for part in bins)])
        axes.plot([50, reach], [50, reach], color=GREY, linewidth=1.2, linestyle=(0, (4, 3)))
        for part in bins:
            _with_interval(axes, 100 * part.predicted, part.observed, part.low, part.high)
        axes.set_xlabel("predicted by the margin, %")
        axes.set_ylabel("observed, %")

    return Plot(title, svg(draw, title), "On the dashed line, it is as often right as it is sure.")


def _with_interval(
    axes: Any, x: float, value: float | None, low: float | None, high: float | None
) -> None:
    if value is None:
        return
    if low is not None and high is not None:
        axes.plot([x, x], [100 * low, 100 * high], color=BLUE, linewidth=1.6, alpha=0.55)
    axes.plot(x, 100 * value, "o", color=BLUE, markersize=6)


def _share_axis(axes: Any) -> None:
    axes.axhline(50, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    axes.margins(y=0.08)
    axes.set_ylabel("accuracy, %")


INK = "#010203"
"""Drawn in this colour, plots take on the page's own text colour."""
GREY = "#8a8f98"
CSS_COLOURS = {
    INK: "currentColor",
    GREY: "var(--grey)",
    BLUE: "var(--blue)",
    ORANGE: "var(--orange)",
    GREEN: "var(--green)",
    PURPLE: "var(--purple)",
    AMBER: "var(--amber)",
    SKY: "var(--sky)",
}
"""What each colour becomes in the page, so that common.css can lighten it in the dark."""
STYLE: Any = {
    "svg.fonttype": "none",  # texts stay texts: small, and readable aloud
    "svg.hashsalt": "smoldpo",
    "text.parse_math": False,
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 10.5,
    "legend.handlelength": 1.4,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    ),
}
SIZE = (4.8, 2.75)
"""Inches. At 72 units to one, text keeps its size on a screen 360 pixels wide; see common.css."""


def svg(draw: Callable[[Any], None], about: str, size: tuple[float, float] = SIZE) -> str:
    """What `draw(axes)` draws, as SVG text that a page may hold as it stands.

    Args:
        about: what a reader who cannot see it is told.
    """
    return _for_a_page(_drawn(draw, size), about)


def _drawn(draw: Callable[[Any], None], size: tuple[float, float]) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        draw(axes)
        written = io.StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(written, format="svg", metadata=metadata)
    return written.getvalue()


def _for_a_page(text: str, about: str) -> str:
    text = text[text.index("<svg") :]
    text = re.sub(r' id="[a-z][\w.]*_\d+"', "", text)  # the same in every plot: no ids at all
    for colour, name in CSS_COLOURS.items():
        text = text.replace(colour, name)
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(about)}" ', 1)
