"""Plots as SVG for pages: one style and one palette, small enough to read on a phone.

No text that people wrote goes into a plot; names of runs and files belong in the page around it.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable
from typing import Any

INK = "#010203"
"""Drawn in this colour, plots take on the page's own text colour."""
GREY = "#8a8f98"
BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"
)  # fmt: skip
"""Okabe and Ito's palette, which people with any kind of colour vision can tell apart."""
NAMES = {
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
STYLE = {
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
    for colour, name in NAMES.items():
        text = text.replace(colour, name)
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(about)}" ', 1)
