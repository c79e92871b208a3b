"""How large the package is: files, lines, the core, and what is over its limit.

    python scripts/count_lines.py

A line is a line of a .py file, blank ones and comments included. The core is what computes and
trains: whoever has read it knows what the numbers of a run are. Exit code 1 where a limit is
passed.
"""

from __future__ import annotations

import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "smoldpo"
CORE = (
    "types.py",
    "data/load.py",
    "data/tokenize.py",
    "losses/*.py",
    "engine/*.py",
    "engine/kernels/*.py",
    *(f"training/{name}.py" for name in ("loop", "sampler", "optim", "state")),
    *(f"evaluation/{name}.py" for name in ("metrics", "statistics", "analysis")),
)
LIMITS = {
    "entries of smoldpo/": 18,
    "files": 175,
    "lines": 24_500,
    "lines of the core": 4_700,
    "lines of the longest file": 450,
}


def lines(path: Path) -> int:
    """Lines of a file."""
    return len(path.read_text(encoding="utf-8").splitlines())


def count() -> dict[str, int]:
    """What there is now, under the names of LIMITS."""
    files = {path: lines(path) for path in PACKAGE.rglob("*.py")}
    core = {path for pattern in CORE for path in PACKAGE.glob(pattern)}
    entries = [path for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    return {
        "entries of smoldpo/": len(entries),
        "files": len(files),
        "lines": sum(files.values()),
        "lines of the core": sum(files[path] for path in core),
        "lines of the longest file": max(files.values()),
    }


def main() -> int:
    """Print the table, wings by size below it."""
    found = count()
    for name, limit in LIMITS.items():
        print(f"{name:28}{found[name]:8,}  of at most {limit:,}")
    print()
    wings = {
        wing: sum(map(lines, wing.rglob("*.py"))) for wing in PACKAGE.iterdir() if wing.is_dir()
    }
    for wing, size in sorted(wings.items(), key=lambda item: -item[1]):
        if size:
            print(f"{wing.name:28}{size:8,}")
    return any(found[name] > limit for name, limit in LIMITS.items())


if __name__ == "__main__":
    sys.exit(main())
