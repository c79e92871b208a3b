"""Writing files so that a reader never sees half of one."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from smoldpo.utils.errors import DiskError, SmoldpoError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `target` by one rename when the block ends well.

    When the block fails, nothing is left behind and an existing `target` is untouched.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    staging.chmod(0o755)
    try:
        yield staging
        old = staging.with_name(f"{staging.name}-old")
        if target.exists():
            target.rename(old)
        staging.replace(target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write `path` whole or not at all."""
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        staging.write_text(text, encoding="utf-8")
        sync(staging)
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """In the block no other process is in such a block of this folder; where flock(2) is missing,
    as on Windows, any may be.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a disk of the network that knows no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Have a file's bytes, or a folder's names, on the disk itself before going on (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk_is_full(error: Exception) -> bool:
    """Whether a write failed for lack of room; safetensors and numpy say so in words alone."""
    return getattr(error, "errno", None) in NO_SPACE or any(
        word in str(error)
        for word in ("No space left", "File too large", "quota", " requested and ")
    )


def not_saved(path: Path, what: str, needed: int, error: Exception) -> SmoldpoError:
    """The error of a save that failed: for a full disk with the bytes needed and free."""
    if not disk_is_full(error):
        return SmoldpoError(f"{path}: {what} cannot be saved: {error}")
    return DiskError(
        f"{path}: the disk is full, so {what} was not saved; {needed:,} bytes needed, "
        f"{free_bytes(path.parent):,} free ({errno.errorcode[errno.ENOSPC]}); what was saved "
        "before is untouched"
    )


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write one JSON object a line, whole or not at all."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_bytes(folder: Path) -> int:
    """Bytes free on the disk that holds `folder`, or will hold it."""
    return shutil.disk_usage(existing_parent(folder)).free


def existing_parent(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def require_space(folder: Path, needed: int, purpose: str) -> None:
    """Refuse early when `folder`'s disk has less than `needed` bytes free.

    Raises:
        SmoldpoError: naming the bytes needed and the bytes free.
    """
    free = free_bytes(folder)
    if free < needed:
        raise DiskError(
            f"{folder}: not enough disk space for {purpose}: {needed:,} bytes needed, {free:,} "
            "free; free some space, or choose another disk with --output-dir"
        )


def cache_folder() -> Path:
    """Where unpacked models and caches lie: $XDG_CACHE_HOME/smoldpo, or ~/.cache/smoldpo."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "smoldpo"


def processor_name() -> str:
    """The processor, as the system names it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
