"""results.json and results.csv: every trial, the winner, and what the final pairs say. No torch here."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from smoldpo.evaluation.metrics import PairScore, wins
from smoldpo.evaluation.statistics import SIGNIFICANT, all_pairs_p, holm
from smoldpo.sweep.text import explanations, headline, value_in_words
from smoldpo.utils.errors import SmoldpoError
from smoldpo.utils.files import write_json, write_text

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
        final: of the winner, once it is known (trials.py).
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


# Which trial is the best on the validation pairs, and which others it is shown to be better than.
#
# The best of many trials looks better than it is, because chance has chosen it too. So its lead
# over each other is tested pair by pair (statistics.paired_test, whole prompts at once), and the
# p-values are corrected for every two trials that could have come out as winner and rival: Holm's
# correction (1979) over all k(k-1)/2 pairs of trials. Corrected for the winner's own k-1
# comparisons alone, twenty equal trials would yield a false "better" far more often than once in
# twenty sweeps (tests/sweep/test_sweep_winner.py counts it).


@dataclass(frozen=True)
class Standing:
    """A trial beside the winner.

    Attributes:
        behind: the winner's accuracy minus this one's.
        p, p_corrected: of no difference; of the winner itself 1.
        as_good: not shown to be worse than the winner.
    """

    number: int
    behind: float
    p: float
    p_corrected: float
    as_good: bool


def winner_of(scores: Mapping[int, Sequence[float]]) -> int:
    """The trial with the highest mean; of equal ones the first."""
    return max(sorted(scores), key=lambda number: sum(scores[number]) / len(scores[number]))


def standings(
    scores: Mapping[int, Sequence[float]], groups: Sequence[str]
) -> tuple[int, dict[int, Standing]]:
    """The winner, and every trial beside it.

    Args:
        scores: of each trial 0, ½ or 1 for each pair, in the same order.
        groups: of each pair, its prompt.
    """
    winner = winner_of(scores)
    numbers = sorted(scores)
    p = all_pairs_p([scores[number] for number in numbers], groups)
    two = list(combinations(range(len(numbers)), 2))
    corrected = dict(zip(two, holm([p[both] for both in two]), strict=True))
    at = numbers.index(winner)
    best = sum(scores[winner]) / len(groups)
    found = {}
    for index, number in enumerate(numbers):
        raw = float(p[at, index])
        last = corrected[min(at, index), max(at, index)] if index != at else 1.0
        behind = best - sum(scores[number]) / len(groups)
        found[number] = Standing(number, behind, raw, last, last >= SIGNIFICANT)
    return winner, found


def comparisons(trials: int) -> int:
    """How many p-values are corrected for."""
    return trials * (trials - 1) // 2
