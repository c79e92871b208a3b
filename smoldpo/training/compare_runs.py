"""Whether two runs of the same configuration came out equal, to the last bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from smoldpo.training.checkpoint import load_checkpoint, saved_steps
from smoldpo.utils.files import sha256_of

CLOCKED = {"seconds"}
"""What a row of metrics says about time."""
CHECKPOINT_STATE = ("best", "budget", "rng", "reference_sha256", "reference_syncs")


def differences(one: Path, other: Path) -> list[str]:
    """How two finished runs, each with a last checkpoint, differ, in words; empty if they do not.

    Compared are the weights that train, the optimizer's state, the random generators, every row of
    the metrics but its seconds, the evaluation, and the bytes of the saved model.
    """
    found = _checkpoints(one, other)
    first, second = metrics(one), metrics(other)
    if len(first) != len(second):
        found.append(f"metrics.jsonl has {len(first)} rows and {len(second)}")
    for number, (ours, theirs) in enumerate(zip(first, second, strict=False), 1):
        names = sorted(key for key in ours | theirs if ours.get(key) != theirs.get(key))
        if names:
            found.append(
                f"metrics.jsonl, row {number} (step {ours.get('step')}): {', '.join(names)}"
            )
    weights = {f"model/{path.name}" for run in (one, other) for path in _weights(run)}
    if not weights:
        found.append("model: neither run has saved one")
    for name in ("evaluation.json", *sorted(weights)):
        files = one / name, other / name
        exist = [file.is_file() for file in files]
        if exist[0] != exist[1] or (all(exist) and sha256_of(files[0]) != sha256_of(files[1])):
            found.append(name)
    return found


def _weights(run: Path) -> list[Path]:
    """The saved model's files; a large one has several."""
    return sorted((run / "model").glob("*.safetensors"))


def metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics, without what the clock says."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if k not in CLOCKED} for row in rows]


def last_steps_differ(run: Path) -> list[str]:
    """Which metrics of a run's last two steps differ: the comparison can find a difference."""
    rows = [row for row in metrics(run) if "loss" in row][-2:]
    return [key for key in rows[0] if rows[0][key] != rows[1].get(key)]


def _checkpoints(one: Path, other: Path) -> list[str]:
    steps = [saved_steps(run / "checkpoints")[-1:] for run in (one, other)]
    if steps[0] != steps[1] or not steps[0]:
        return [f"the last checkpoint is {steps[0] or 'none'} and {steps[1] or 'none'}"]
    first, second = (
        load_checkpoint(run / "checkpoints" / f"step-{steps[0][0]}") for run in (one, other)
    )
    found = []
    for part in first.tensors | second.tensors:
        ours, theirs = first.tensors.get(part, {}), second.tensors.get(part, {})
        names = [
            name
            for name in ours | theirs
            if name not in ours or name not in theirs or not torch.equal(ours[name], theirs[name])
        ]
        if names:
            found.append(
                f"{part}: {len(names)} of {len(ours | theirs)} tensors, such as {names[0]}"
            )
    found += [
        f"state.json: {key}"
        for key in CHECKPOINT_STATE
        if first.state.get(key) != second.state.get(key)
    ]
    return found
