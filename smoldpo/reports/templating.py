"""HTML pages from templates: everything escaped, numbers written in one way."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smoldpo.utils.text import count, duration, number, p_value, percent, points, redact, signed

if TYPE_CHECKING:
    import jinja2


TEMPLATES = Path(__file__).parent / "templates"


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
