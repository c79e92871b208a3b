"""What is voted on: prompts with two answers each, from a run, a file of answers, or pairs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smoldpo.data.cleaning.text import hash64
from smoldpo.data.dialogue import as_messages
from smoldpo.data.load import load_pairs
from smoldpo.data.sources import open_source
from smoldpo.evaluation.schema import Sample
from smoldpo.types import Prompt
from smoldpo.utils.errors import UsageError


@dataclass(frozen=True)
class Ballot:
    """A prompt and two answers, with the names that the voter does not see."""

    prompt: Prompt
    a: str
    b: str
    model_a: str = "a"
    model_b: str = "b"

    @property
    def id(self) -> str:
        """The same for the same texts, whatever file they stand in."""
        return f"{hash64(json.dumps(self.prompt, sort_keys=True), self.a, self.b):016x}"

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The prompt as messages."""
        return [dict(message) for message in as_messages(self.prompt)]


def read_ballots(source: Path) -> tuple[list[Ballot], int]:
    """The ballots of a run's samples.jsonl, of rows with `prompt`, `a` and `b`, or of any pairs.

    Returns them, each once, and how many were left out because both answers are the same.

    Raises:
        UsageError: nothing to vote on.
        DataError: a file that cannot be read.
    """
    found = {ballot.id: ballot for ballot in _read(source)}.values()
    different = [ballot for ballot in found if ballot.a.strip() != ballot.b.strip()]
    if not different:
        raise UsageError(f"{source}: holds no two different answers to a prompt")
    return different, len(found) - len(different)


def _read(source: Path) -> Iterator[Ballot]:
    samples = source / "samples.jsonl"
    if source.is_dir() and not samples.is_file():
        raise UsageError(
            f"{source}: has no answers (samples.jsonl); train with --generate-prompts, or give a "
            "file of answers, which smoldpo evaluate --generate or smoldpo pairs make writes"
        )
    if source.is_dir():
        for line in samples.read_text(encoding="utf-8").splitlines():
            sample = Sample.model_validate_json(line)
            yield Ballot(sample.prompt, sample.reference, sample.policy, "reference", "policy")
        return
    first = next(iter(open_source(str(source)).train.rows()), None)
    if first is None or not {"prompt", "a", "b"} <= first.values.keys():
        for pair in load_pairs(str(source)).pairs:
            yield Ballot(pair.prompt, pair.chosen, pair.rejected, "chosen", "rejected")
        return
    for row in open_source(str(source)).train.rows():
        values = row.values
        prompt, a, b = (values.get(name) for name in ("prompt", "a", "b"))
        if not (isinstance(a, str) and isinstance(b, str) and isinstance(prompt, str | list)):
            raise UsageError(
                f"{row.file}, row {row.row}: needs 'prompt' (text or messages), and the texts 'a' "
                "and 'b'"
            )
        yield Ballot(
            prompt if isinstance(prompt, str) else tuple(prompt),
            a,
            b,
            str(values.get("model_a") or "a"),
            str(values.get("model_b") or "b"),
        )
