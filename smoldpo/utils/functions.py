"""Functions of other libraries with some helpers replaced; the libraries stay unchanged."""

from __future__ import annotations

import types
from typing import Any


def uses_global(function: Any, name: str) -> bool:
    """Whether a Python function reads this global name in its own body."""
    return name in getattr(getattr(function, "__code__", None), "co_names", ())


def with_globals(function: Any, **replaced: Any) -> Any:
    """A copy of a Python function that finds these objects under the global names that it reads.

    Raises:
        ValueError: it does not read one of the names, so that the copy would do as the original
            does.
    """
    for name in replaced:
        if not uses_global(function, name):
            raise ValueError(f"{function.__qualname__} does not use {name}")
    names = function.__globals__ | replaced
    defaults, closure = function.__defaults__, function.__closure__
    own = types.FunctionType(function.__code__, names, function.__name__, defaults, closure)
    own.__kwdefaults__ = function.__kwdefaults__
    return own
