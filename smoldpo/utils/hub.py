"""Whether the Hugging Face hub answers: its clients retry for minutes before they say so."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

TIMEOUT = 5.0
"""Seconds to wait for the hub's first answer."""


def hub_is_unreachable(kind: Literal["model", "dataset"], name: str) -> bool:
    """Whether the hub does not answer at all; an answer of any kind, even "not found", is one."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    hub = huggingface_hub.HfApi()
    ask = hub.model_info if kind == "model" else hub.dataset_info
    try:
        ask(name, timeout=TIMEOUT)
    except HfHubHTTPError:
        return False
    except Exception:  # refused, unresolved, timed out, offline mode: each client has its own kinds
        return True
    return False


@contextlib.contextmanager
def cached_only(wanted: bool = True) -> Iterator[None]:
    """The hub's clients as if HF_HUB_OFFLINE were set, for as long as this lasts."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or wanted
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
