"""results.json and results.csv: every trial, the winner, and what the final pairs say. No torch here."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smoldpo.errors import SmoldpoError
from smoldpo.evaluation.metrics import PairScore, wins
from smoldpo.files import write_json, write_text
from smoldpo.sweep.winner import comparisons, standings
from smoldpo.sweep.wording import value_in_words
from smoldpo.sweep.words import explanations, headline

FORMAT = 1


def read_scores(folder: Path, metric: str) -> tuple[list[float], list[str], list[str]]:
    """Of a trial's evaluation: 0, ½ or 1 for each pair, the pairs' prompts, and their ids.

    Raises:
        SmoldpoError: the file is damaged.
    """
    path = folder / "evaluation.json"
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["pairs"]
        scores = wins([PairScore(**row["after"]) for row in rows], metric)
        return scores, [row["prompt"] for row in rows], [row["id"] for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SmoldpoError(
            f"{path}: cannot be read ({error}); remove {folder}, and smoldpo resume makes the trial again"
        ) from None


def collect(
    about: dict[str, Any],
    records: Sequence[Any],
    folders: Mapping[int, Path],
    final: dict[str, Any] | None,
) -> dict[str, Any]:
    """What results.json holds.

    Args:
        about: metric, method, planned, data: as sweep.json knows them.
        records: of the trials that have begun (trials.Record), in order.
        folders: of the trials that are done.
        final: of the winner, once it is known (final.py).
    """
    metric = about["metric"]
    read = {number: read_scores(folder, metric) for number, folder in folders.items()}
    pairs = {tuple(ids) for _, _, ids in read.values()}
    if len(pairs) > 1:
        raise SmoldpoError("the trials were not judged on the same pairs; sweep anew")
    winner, beside = None, {}
    if read:
        groups = next(iter(read.values()))[1]
        winner, beside = standings({n: scores for n, (scores, _, _) in read.items()}, groups)
    others = [number for number in beside if number != winner]
    results = {
        "format": FORMAT,
        **about,
        "done": len(read),
        "failed": [record.number for record in records if record.status == "failed"],
        "winner": winner,
        "as_good": [number for number in others if beside[number].as_good],
        "worse": [number for number in others if not beside[number].as_good],
        "comparisons": comparisons(len(read)),
        "correction": "Holm, over all pairs of trials",
        "trials": [_trial(record, metric, beside, winner) for record in records],
        "final": final,
    }
    results["headline"] = headline(results)
    results["explanations"] = explanations(results)
    return results


def _trial(
    record: Any, metric: str, beside: Mapping[int, Any], winner: int | None
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "number": record.number,
        "status": record.status,
        "settings": record.settings,
        "accuracy": record.accuracy[metric]["after"] if record.accuracy else None,
        "steps": record.steps,
        "seconds": record.seconds,
        "error": record.error,
    }
    standing = beside.get(record.number)
    if standing is not None:
        place = "as good" if standing.as_good else "worse"
        found |= {
            "behind": standing.behind,
            "p": standing.p,
            "p_corrected": standing.p_corrected,
            "standing": "winner" if record.number == winner else place,
        }
    return found


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """Write both files."""
    write_json(folder / "results.json", results)
    write_text(folder / "results.csv", as_csv(results))


def as_csv(results: dict[str, Any]) -> str:
    """One row a trial. Text that a spreadsheet would run as a formula gets a ' before it."""
    trials = results["trials"]
    names = list(trials[0]["settings"]) if trials else []
    columns = [
        "trial", "status", "standing", *names, "accuracy", "low", "high", "behind", "p", "p_corrected",
        "steps", "seconds", "error",
    ]  # fmt: skip
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for trial in trials:
        accuracy = trial["accuracy"] or {}
        row = {"trial": trial["number"], "accuracy": accuracy.get("value")}
        row |= {key: accuracy.get(key) for key in ("low", "high")}
        row |= {name: value_in_words(trial["settings"][name]) for name in names}
        known = trial | row
        writer.writerow([_cell(known.get(column)) for column in columns])
    return text.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return f"'{value}"
    return "" if value is None else value
