"""A step whose loss or gradient is not finite: its pairs are kept for a look."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from smoldpo.errors import SmoldpoError
from smoldpo.files import write_json
from smoldpo.trainer import NotFiniteError

FILE = "not_finite.json"


def keep_not_finite(folder: Path, error: NotFiniteError, tokenizer: Any) -> SmoldpoError:
    """Write the step's pairs, with texts and token ids, to not_finite.json; returns what to raise."""
    pairs = [
        {
            "id": pair.id,
            "prompt": tokenizer.decode(pair.prompt_ids),
            "chosen": tokenizer.decode(pair.chosen_ids),
            "rejected": tokenizer.decode(pair.rejected_ids),
            "prompt_ids": pair.prompt_ids,
            "chosen_ids": pair.chosen_ids,
            "rejected_ids": pair.rejected_ids,
        }
        for pair in error.pairs
    ]
    write_json(folder / FILE, error.facts | {"pairs": pairs})
    return SmoldpoError(f"{error}\ntheir texts and tokens are in {folder / FILE}")
