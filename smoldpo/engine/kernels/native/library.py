"""The native kernels as a shared library: compiled where it runs, once, and loaded by ctypes.

The sources stand beside this file (source/), behind a plain C interface, so that neither torch's
version nor Python's is a part of it. The library is compiled at first use with the compiler of the
machine, for an instruction set that is named (never "whatever this processor has"), and kept in the
cache folder under a hash of sources, compiler and flags. Whatever is missing is told in one line by
a NativeError; callers then compute by torch's functions.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from smoldpo.utils import progress
from smoldpo.utils.errors import UsageError
from smoldpo.utils.files import cache_folder

SOURCE = Path(__file__).with_name("source")
_AVX512 = ("avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16")
NEEDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"amx": (*_AVX512, "amx_tile", "amx_bf16"), "avx512_bf16": _AVX512}
)
"""Instruction sets that the kernels are written for, the fastest first, and the processor's flags
that each needs, as Linux spells them."""
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-w")
SECONDS = 300
"""A compiler that takes longer is stopped."""
_XTILEDATA = 18
_ARCH_REQ_XCOMP_PERM = 0x1023
_SYS_ARCH_PRCTL = 158
_lock = threading.Lock()
_loaded: dict[str, Library | NativeError] = {}
"""Tried once a process, so that a failure costs its time once."""


class NativeError(UsageError):
    """Why native kernels cannot be had here, in one line."""

    def __init__(self, reason: str):
        super().__init__(f"native kernels: {reason}; say --kernels torch, or auto")
        self.reason = reason


class Library:
    """The compiled kernels of one instruction set.

    Args:
        path: the shared library.
    """

    def __init__(self, path: Path, instructions: str):
        self.path, self.instructions = path, instructions
        self._functions = ctypes.CDLL(str(path))

    def call(self, name: str, *arguments: torch.Tensor | int | float | None) -> None:
        """Call a function: tensors go as pointers to their first number, None as null.

        Raises:
            MemoryError: the kernel got no memory for what it keeps during the call.
        """
        if getattr(self._functions, name)(*map(_argument, arguments)):
            raise MemoryError(f"not enough memory for the native kernel {name}")


def _argument(value: torch.Tensor | int | float | None) -> object:
    if isinstance(value, torch.Tensor):
        assert value.is_contiguous() and value.device.type == "cpu"
        return ctypes.c_void_p(value.data_ptr())
    if value is None:
        return ctypes.c_void_p()
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_long(value)


def supported() -> list[str]:
    """Instruction sets of NEEDS that this processor and system have, the fastest first."""
    flags = _processor_flags()
    return [name for name, needs in NEEDS.items() if flags.issuperset(needs) and _permitted(name)]


def load(instructions: str) -> Library:
    """The library for an instruction set, compiled if it is not there yet.

    Raises:
        NativeError: processor, compiler or folder do not allow it.
    """
    with _lock:
        if instructions not in _loaded:
            _loaded[instructions] = _load(instructions)
        found = _loaded[instructions]
    if isinstance(found, NativeError):
        raise found
    return found


def in_words() -> str:
    """Which native kernels can be had here, or why none can; nothing is compiled for it."""
    names = supported()
    if not names:
        return "none for this processor"
    try:
        found = _loaded.get(names[0]) or _file(names[0])
    except NativeError as error:
        found = error
    if isinstance(found, NativeError):
        return f"none: {found.reason}"
    compiled = isinstance(found, Library) or found.is_file()
    return f"for {names[0]}{'' if compiled else ', to be compiled at first use'}"


def _load(instructions: str) -> Library | NativeError:
    if instructions not in supported():
        return NativeError(f"this processor or system does not offer {instructions}")
    try:
        path = _file(instructions)
        if not path.is_file():
            _compile(instructions, path)
        return Library(path, instructions)
    except NativeError as error:
        return error
    except (OSError, subprocess.SubprocessError) as error:
        return NativeError(f"they cannot be built: {error}")


def build_id(instructions: str) -> str:
    """What bits of results depend on, as a name: sources, compiler and flags.

    Raises:
        NativeError: there is no compiler.
    """
    digest = hashlib.sha256("\n".join([_compiler()[1], *_flags(instructions)]).encode())
    for path in sorted(SOURCE.iterdir()):
        digest.update(path.name.encode() + b"\n" + path.read_bytes())
    return f"{instructions}-{digest.hexdigest()[:16]}"


def _file(instructions: str) -> Path:
    return cache_folder() / "kernels" / f"{build_id(instructions)}.so"


def _flags(instructions: str) -> list[str]:
    names = (flag.replace("avx512_", "avx512").replace("_", "-") for flag in NEEDS[instructions])
    return [*FLAGS, *(f"-m{name}" for name in names)]


@functools.cache
def _compiler() -> tuple[str, str]:
    """The C++ compiler's command and its version."""
    for name in (os.environ.get("CXX", ""), "g++", "clang++", "c++"):
        command = shutil.which(name) if name else None
        if command is not None:
            asked = [command, "--version"]
            said = subprocess.run(asked, capture_output=True, text=True, timeout=30)
            if said.returncode == 0 and said.stdout:
                return command, said.stdout.splitlines()[0]
    raise NativeError("no C++ compiler is found (install g++ or clang)")


def _compile(instructions: str, target: Path) -> None:
    """Each source by itself, as many at once as there are cores; the library by one rename."""
    command, flags = _compiler()[0], _flags(instructions)
    target.parent.mkdir(parents=True, exist_ok=True)
    progress.say(f"kernels: compiling for {instructions}, once on this machine (about 10 s)")
    with tempfile.TemporaryDirectory(prefix=".build-", dir=target.parent) as folder:
        sources = sorted(SOURCE.glob("*.cpp"))
        objects = [str(Path(folder) / f"{source.stem}.o") for source in sources]
        running = [
            subprocess.Popen(
                [command, *flags, "-c", str(source), "-o", found],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for source, found in zip(sources, objects, strict=True)
        ]
        try:
            errors = [process.communicate(timeout=SECONDS)[1] for process in running]
        finally:
            for process in running:
                process.kill()
                process.wait()
        for process, error in zip(running, errors, strict=True):
            _require(process.returncode, command, error)
        staging = Path(folder) / target.name
        linked = subprocess.run(
            [command, "-shared", *objects, "-o", str(staging)],
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        _require(linked.returncode, command, linked.stderr)
        staging.replace(target)


def _require(code: int, command: str, said: str) -> None:
    if code != 0:
        line = next((line for line in said.splitlines() if "error" in line), f"ended with {code}")
        raise NativeError(f"{Path(command).name} cannot compile them: {line.strip()}")


def _processor_flags() -> frozenset[str]:
    """What Linux says of an x86-64 processor; of others and elsewhere nothing."""
    info = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not info.is_file():
        return frozenset()
    lines = info.read_text(errors="replace").splitlines()
    found = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(found.partition(":")[2].split())


def _permitted(instructions: str) -> bool:
    """Whether the system lets this process use the tiles of AMX, which it must ask for."""
    if instructions != "amx":
        return True
    libc = ctypes.CDLL(None, use_errno=True)
    return bool(libc.syscall(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILEDATA) == 0)
