"""Silencing transformers: its bars and notes would come between ours."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator

from transformers.utils import logging

_one_at_a_time = threading.RLock()  # else one thread would put back what another had set


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, no deprecations, nothing below an error, for the length of a block.

    These are settings of the whole program, so one thread at a time is in such a block.
    """
    with _one_at_a_time, warnings.catch_warnings():
        verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        warnings.simplefilter("ignore", FutureWarning)
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()
