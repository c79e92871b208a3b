"""The three splits of a sweep's pairs, apart by prompt, as files in its folder.

    data/train.jsonl         what trials learn from
    data/validation.jsonl    what they are ranked on
    data/final.jsonl         what none of them sees: the winner is measured there, once

A trial reads these files as any run reads its data, so that its config.yaml does it again anywhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from smoldpo.config.schema import TrainConfig
from smoldpo.data.cleaning.text import prompt_key
from smoldpo.data.convert import LAYOUTS
from smoldpo.data.load import TrainingData, first_user_turn
from smoldpo.sweep.results import SplitFile, SplitFiles
from smoldpo.types import PairNumbers, PreferencePair
from smoldpo.utils.errors import SmoldpoError, UsageError
from smoldpo.utils.files import sha256_of, write_text

SPLITS = ("train", "validation", "final")
LAYOUT = "conversational"
"""Holds every pair without loss (data/convert.py)."""


@dataclass(frozen=True)
class SplitPairs:
    """The pairs of each split."""

    train: list[PreferencePair]
    validation: list[PreferencePair]
    final: list[PreferencePair]


def split_held_out(data: TrainingData, final_fraction: float) -> SplitPairs:
    """Split held-out pairs into validation and final pairs, by how their dialogues open.

    The split follows from a hash of the opening alone, as in `split_by_prompt`, with other digits:
    those have split training from held-out pairs already.

    Raises:
        UsageError: a split is left without pairs.
    """
    validation: list[PreferencePair] = []
    final: list[PreferencePair] = []
    for pair in data.eval:
        key = "final " + prompt_key(first_user_turn(pair.prompt))
        share = int(hashlib.sha256(key.encode()).hexdigest()[:15], 16) / 16**15
        (final if share < final_fraction else validation).append(pair)
    if not validation or not final:
        raise UsageError(
            f"{len(data.eval)} held-out pairs are too few to part: {len(validation)} to rank "
            f"trials on and {len(final)} for the end; give more, or another --eval-fraction or "
            "--final-fraction"
        )
    splits = SplitPairs(data.train, validation, final)
    _require_apart(splits)
    return splits


def _require_apart(splits: SplitPairs) -> None:
    """That no prompt is on two splits; the reading has left such pairs out already."""
    seen: dict[str, str] = {}
    for split in SPLITS:
        for pair in getattr(splits, split):
            other = seen.setdefault(prompt_key(pair.prompt), split)
            if other != split:
                raise SmoldpoError(
                    f"pair {pair.id}: its prompt is among the {other} and the {split} pairs, so "
                    "the final figures would not be of unseen prompts; this is a bug in smoldpo: "
                    "report it"
                )


def write_splits(folder: Path, splits: SplitPairs) -> SplitFiles:
    """Write the three files."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    used = _numbers_used(splits.train)
    files: dict[str, SplitFile] = {}
    for split in SPLITS:
        pairs = getattr(splits, split)
        path = split_file(folder, split)
        known = [name for name in used if all(_number(pair, name) is not None for pair in pairs)]
        write_text(path, "".join(json.dumps(_row(pair, known)) + "\n" for pair in pairs))
        prompts = len({prompt_key(pair.prompt) for pair in pairs})
        files[split] = SplitFile(pairs=len(pairs), prompts=prompts, sha256=sha256_of(path))
    return SplitFiles(numbers=used, **files)


def _numbers_used(train: Sequence[PreferencePair]) -> list[str]:
    """Which of weight, margin and beta training pairs bring: a source has a column for all or none.

    Held-out pairs of another file may lack it, as they may in any run (`fitting` in data/load.py).
    """
    plain = asdict(PairNumbers())
    return sorted(
        name
        for name in plain
        if any(_number(pair, name) != plain[name] for pair in train)
        and all(_number(pair, name) is not None for pair in train)
    )


def _number(pair: PreferencePair, name: str) -> float | None:
    return getattr(pair.numbers, name)


def _row(pair: PreferencePair, numbers: Sequence[str]) -> dict[str, Any]:
    named = {key: getattr(pair, key) for key in ("id", "source", "category") if getattr(pair, key)}
    return LAYOUTS[LAYOUT].write(pair) | named | {name: _number(pair, name) for name in numbers}


def split_file(folder: Path, split: str) -> Path:
    """Where a split's pairs lie."""
    return folder / "data" / f"{split}.jsonl"


def require_same_files(folder: Path, files: SplitFiles) -> None:
    """That the files are those that the sweep began with.

    Raises:
        UsageError: naming the file that is not.
    """
    for split in SPLITS:
        path = split_file(folder, split)
        if not path.is_file() or sha256_of(path) != getattr(files, split).sha256:
            raise UsageError(
                f"{path}: is not what the sweep began with; put it back, or sweep anew with "
                "--overwrite"
            )


def data_settings(folder: Path, files: SplitFiles, held_out: str) -> dict[str, Any]:
    """The data settings of a run on these files; `held_out` is validation or final."""
    fields = TrainConfig.model_fields
    defaults = ("data_weights", "data_subset", "data_split", "max_eval_samples", "eval_fraction")
    return {name: fields[name].get_default(call_default_factory=True) for name in defaults} | {
        "data": [str(split_file(folder, "train"))],
        "eval_data": str(split_file(folder, held_out)),
        "format": LAYOUTS[LAYOUT].format,
        "columns": [f"{name}={name}" for name in files.numbers],
    }
