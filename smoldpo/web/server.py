"""`smoldpo web`: which rooms there are, and the server on this machine alone."""

from __future__ import annotations

import contextlib
import secrets
import socket
from pathlib import Path

import uvicorn

from smoldpo.utils import progress
from smoldpo.utils.errors import UsageError
from smoldpo.web.app import make_app
from smoldpo.web.booth import Booth
from smoldpo.web.guard import Guard

LOOPBACK = "127.0.0.1"


def serve(source: Path, votes: Path | None, port: int) -> None:
    """Serve the rooms of a run, a folder of runs, or a file, until the process is told to stop.

    Args:
        votes: the file of votes; by default in the run's folder, and else beside the file.
        port: 0 for any that is free.

    Raises:
        UsageError: nothing to show, or a port that is taken.
    """
    runs, booths = rooms(source, votes)
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((LOOPBACK, port))
    except OSError as error:
        raise UsageError(f"--port {port}: {error.strerror}; give another, or 0 for any") from None
    listener.listen()
    port, token = listener.getsockname()[1], secrets.token_urlsafe(24)
    app = Guard(make_app(runs, booths), port, token)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, lifespan="off"
    )
    progress.say("Open this address in a browser; Ctrl-C stops:")
    print(f"http://{LOOPBACK}:{port}/?token={token}", flush=True)
    uvicorn.Server(config).run([listener])


def rooms(source: Path, votes: Path | None) -> tuple[dict[str, Path], dict[str, Booth]]:
    """Run folders and booths by the names in their addresses.

    Raises:
        UsageError: nothing to show, or --votes with several runs.
    """
    if not source.exists():
        raise UsageError(f"{source}: does not exist; give a run, a folder of runs, or a file")
    if source.is_file():
        return {}, {"file": Booth("file", source, votes or source.with_name("votes.jsonl"))}
    inside = sorted(path for path in source.iterdir() if _is_run(path))
    folders = [source] if _is_run(source) else inside
    if not folders:
        raise UsageError(f"{source}: is no run and holds none; give a run, or a file of answers")
    if votes is not None and len(folders) > 1:
        raise UsageError(f"--votes {votes}: needs one run; give its folder")
    runs = {str(number): folder for number, folder in enumerate(folders, 1)}
    booths = {}
    for name, folder in runs.items():
        with contextlib.suppress(UsageError):  # a run without answers, or with equal ones
            booths[name] = Booth(name, folder, votes or folder / "votes.jsonl")
    return runs, booths


def _is_run(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("config.yaml", "environment.json"))
