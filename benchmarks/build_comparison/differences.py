"""The first difference between two outputs, but for times, rates, memory and versions."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml

FREE = {
    "seconds", "planning_seconds", "started",  # metrics.jsonl, plan, trials, environment.json
    "rates", "pace", "notes",  # plan: the machine's speed, and remarks on it
    "peak_bytes", "free_bytes", "memory_by_phase", "libraries", "other",  # plan: of the process
    "smoldpo",  # environment.json: the version
    "folder",  # sweep.json: where the sweep began
    "description",  # config schema: words for people
}  # fmt: skip
"""Keys whose values are not compared. They must be there in both."""
NOT_COMPARED = {"timings.json", "resume.json", "computing.json"}
"""Files of which only the presence is compared, as of pages; these hold times or private state."""


def first_difference(before: Any, after: Any, where: str = "") -> str | None:
    """Where two JSON values differ first, with both values; None where they are equal."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in dict.fromkeys([*before, *after]):
            place = f"{where}.{key}" if where else key
            if key not in before or key not in after:
                return f"{place}: only {'after' if key in after else 'before'}"
            if key not in FREE and (found := first_difference(before[key], after[key], place)):
                return found
        return None
    if isinstance(before, list) and isinstance(after, list):
        for number, (one, other) in enumerate(zip(before, after, strict=False)):
            if found := first_difference(one, other, f"{where}[{number}]"):
                return found
        if len(before) != len(after):
            return f"{where}: {len(before)} and {len(after)} items"
        return None
    if type(before) is type(after) and before == after:
        return None
    return f"{where}: {_short(before)} and {_short(after)}"


def text_difference(before: str, after: str) -> str | None:
    """The same for text: as JSON where both are JSON, else by lines, versions of smoldpo left
    out.
    """
    try:
        return first_difference(_json(before), _json(after))
    except ValueError:
        pairs = zip_longest(*(_without_version(text).splitlines() for text in (before, after)))
        differing = (
            f"line {number}: {_short(one)} and {_short(other)}"
            for number, (one, other) in enumerate(pairs, 1)
            if one != other
        )
        return next(differing, None)


def file_difference(before: Path, after: Path) -> str | None:
    """The same for two files: JSON, YAML, CSV and text by content, all others byte for byte."""
    if before.read_bytes() == after.read_bytes():
        return None
    if before.suffix == ".safetensors":
        return _tensor_difference(before, after)
    texts = [path.read_text(encoding="utf-8") for path in (before, after)]
    if before.suffix == ".jsonl":
        return first_difference(*([_json(line) for line in text.splitlines()] for text in texts))
    if before.suffix == ".yaml":
        return first_difference(*map(yaml.safe_load, texts))
    if before.suffix == ".csv":
        return first_difference(*(list(csv.DictReader(io.StringIO(text))) for text in texts))
    return text_difference(*texts)


def folder_differences(before: Path, after: Path) -> Iterator[tuple[str, str | None]]:
    """The files of two folders, or one file: each name, and the first difference.

    Of pages and of what stands in NOT_COMPARED only the names are compared; checkpoints are left
    out.
    """
    if before.is_file():
        there = file_difference(before, after) if after.is_file() else "not there after"
        yield before.name, there
        return
    names = [
        {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
        for root in (before, after)
    ]
    names = [{name for name in some if "checkpoints/" not in name} for some in names]
    odd = sorted(names[0] ^ names[1])
    yield "names of files", f"{_short(odd)}: on one side only" if odd else None
    for name in sorted(names[0] & names[1]):
        if Path(name).name not in NOT_COMPARED and not name.endswith(".html"):
            yield name, file_difference(before / name, after / name)


def _tensor_difference(before: Path, after: Path) -> str | None:
    """The tensors that differ; the format has a JSON header behind its own length, then the
    values.
    """
    tensors: list[dict[str, Any]] = []
    for path in (before, after):
        content = path.read_bytes()
        begin = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:begin])
        header.pop("__metadata__", None)
        tensors.append({})
        for name, about in header.items():
            start, end = (begin + offset for offset in about["data_offsets"])
            tensors[-1][name] = about["dtype"], about["shape"], content[start:end]
    one, other = tensors
    names = sorted(name for name in one | other if one.get(name) != other.get(name))
    if not names:
        return "the same tensors, in another order or with another header"
    return f"{len(names)} of {len(one | other)} tensors, the first {names[0]}"


def _json(text: str) -> Any:
    return json.loads(text, parse_constant=str)  # NaN, which is unequal to itself, as text


def _without_version(text: str) -> str:
    return re.sub(r"smoldpo \d[\w.+]*", "smoldpo", text)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
