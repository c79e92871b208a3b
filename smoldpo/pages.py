"""HTML pages from templates: everything escaped, numbers written in one way."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smoldpo.durations import words
from smoldpo.redact import redact

if TYPE_CHECKING:
    import jinja2

TEMPLATES = Path(__file__).parent / "templates"
NONE = "–"
"""Stands where there is no number."""


def render(template: str, **values: Any) -> str:
    """The page, as text that can be written as UTF-8 whatever the values hold."""
    text = environment().get_template(template).render(**values)
    # Commands, configurations and file names can hold tokens; a page is made to be passed on.
    return redact(re.sub("[\ud800-\udfff]", "\ufffd", text))


@functools.cache
def environment() -> jinja2.Environment:
    """The templates, each read when first asked for, which takes longer than filling one in."""
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    made.filters |= {
        "percent": percent,
        "points": points,
        "signed": signed,
        "number": number,
        "count": count,
        "p_value": p_value,
        "duration": duration,
    }
    return made


def _missing(value: float | None) -> bool:
    return value is None or not -1e300 < value < 1e300  # nan and infinity are not


def _minus(text: str) -> str:
    return text.replace("-", "−")


def percent(value: float | None, digits: int = 1) -> str:
    """0.612 as 61.2%."""
    return NONE if _missing(value) else f"{value:.{digits}%}"


def points(value: float | None) -> str:
    """A difference of two shares, 0.112, as +11.2."""
    return NONE if _missing(value) else _minus(f"{100 * value:+.1f}")


def signed(value: float | None, digits: int = 2) -> str:
    """With its sign, and a true minus."""
    return NONE if _missing(value) else _minus(f"{value:+,.{digits}f}")


def number(value: float | None, digits: int = 2) -> str:
    """With a true minus, and commas between thousands."""
    return NONE if _missing(value) else _minus(f"{value:,.{digits}f}")


def count(value: float | None) -> str:
    """A whole number, with commas between thousands."""
    return NONE if _missing(value) else f"{value:,.0f}"


def p_value(value: float | None) -> str:
    """As people print it: two digits that count, and no bare zero."""
    if _missing(value):
        return NONE
    if value < 0.0001:
        return "< 0.0001"
    return f"{value:.2g}" if value < 0.095 else f"{value:.2f}"


def duration(seconds: float | None) -> str:
    """As durations.words; but pages show what was measured, so below a minute the tenths as well."""
    if _missing(seconds):
        return NONE
    return f"{seconds:.1f} s" if seconds < 60 else words(seconds)
