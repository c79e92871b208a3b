"""One process writes into a run folder at a time."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from smoldpo.utils.errors import UsageError


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Within the block no other run of this user on this machine goes into `folder`.

    The lock lies in the folder of temporary files, so that nothing stays in the run folder; the
    system gives it back however the process ends.

    Raises:
        UsageError: a run is being written there.
    """
    name = hashlib.sha256(os.fsencode(folder.expanduser().resolve())).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"smoldpo-run-{os.getuid()}-{name}.lock"
    with path.open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(
                f"output_dir {folder}: another run is being written there; wait for its end, or "
                "choose another folder"
            ) from None
        yield
