"""The records of a sweep, the ranking of its trials, results.json and results.csv; no torch.

The best of many trials looks better than it is, because chance has chosen it too. So its lead over
each other trial is tested pair by pair (statistics.paired_test, whole prompts at once), and the
p-values are corrected for every two trials that could have come out as winner and rival: Holm's
correction (1979) over all k(k-1)/2 pairs of trials. Corrected for the winner's own k-1 comparisons
alone, twenty equal trials would yield a false "better" far more often than once in twenty sweeps
(tests/sweep/test_sweep_winner.py counts it).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from smoldpo.evaluation.metrics import METRICS, mean, wins
from smoldpo.evaluation.schema import (
    Accuracy,
    Drift,
    Estimate,
    Judgement,
    PairRow,
    Record,
)
from smoldpo.evaluation.statistics import LEVEL, SIGNIFICANT, all_pairs_p, holm
from smoldpo.sweep.space import settings_text, value_text
from smoldpo.utils.errors import SmoldpoError
from smoldpo.utils.files import write_json, write_text
from smoldpo.utils.text import percent

FORMAT = 1
RUNNING, DONE, FAILED = "running", "done", "failed"


class SplitFile(Record):
    """How many pairs and distinct prompts a split has, and the digest of its file."""

    pairs: int
    prompts: int
    sha256: str = ""


class SplitFiles(Record):
    """The splits of a sweep; `numbers`: which of weight, margin and beta the pairs bring."""

    numbers: list[str]
    train: SplitFile
    validation: SplitFile
    final: SplitFile


class SweepRecord(Record):
    """sweep.json: what a sweep began with.

    Attributes:
        spec: the whole description, SweepSpec.as_plain().
        folder: the working folder, in which relative names mean what they meant.
        data: None until the pairs are written.
    """

    format: int
    spec: dict[str, Any]
    folder: str
    data: SplitFiles | None


class TrialRecord(Record):
    """trial.json.

    Attributes:
        number: from 1.
        value: the accuracy on the validation pairs by the sweep's metric, where the trial is done.
        accuracy: by each metric, before and after.
        steps: optimizer steps behind the policy that was measured.
        seconds: since the trial last began or went on.
        error: why it failed.
    """

    number: int
    settings: dict[str, Any]
    status: str = RUNNING
    value: float | None = None
    accuracy: dict[str, Accuracy | None] = Field(default_factory=dict)
    steps: int | None = None
    seconds: float | None = None
    error: str | None = None

    def estimate(self, metric: str) -> Estimate | None:
        """The accuracy on the validation pairs; None where the trial is not done."""
        accuracy = self.accuracy.get(metric)
        return accuracy.after if accuracy else None


class FinalResult(Record):
    """final.json: the winner on the final pairs, as best/evaluation.json has it."""

    trial: int
    n: int
    prompts: int
    metric: str
    headline: str
    verdict: str
    accuracy: dict[str, Accuracy | None]
    baselines: dict[str, float | None]
    drift: Drift
    judges: list[Judgement]


class RankedTrial(Record):
    """A trial in results.json; the last four fields are those of trials that are done."""

    number: int
    status: str
    settings: dict[str, Any]
    accuracy: Estimate | None
    steps: int | None
    seconds: float | None
    error: str | None
    behind: float | None = None
    p: float | None = None
    p_corrected: float | None = None
    standing: Literal["winner", "as good", "worse"] | None = None


class SweepResults(Record):
    """results.json."""

    format: int = FORMAT
    name: str
    metric: str
    method: str
    planned: int
    train: SplitFile
    validation: SplitFile
    final_pairs: SplitFile
    done: int
    failed: list[int]
    winner: int | None
    as_good: list[int]
    worse: list[int]
    comparisons: int
    correction: str
    trials: list[RankedTrial]
    final: FinalResult | None
    headline: str = ""
    explanations: list[str] = Field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """The settings that are tried."""
        return list(self.trials[0].settings) if self.trials else []


class _TrialEvaluation(Record):
    """Of a trial's evaluation.json, what the ranking reads."""

    pairs: list[PairRow]


def read_scores(folder: Path, metric: str) -> tuple[list[float], list[str], list[str]]:
    """From a trial's evaluation: 0, ½ or 1 for each pair, the pairs' prompts, and their ids.

    Raises:
        SmoldpoError: the file is damaged.
    """
    path = folder / "evaluation.json"
    advice = f"remove {folder}, and smoldpo resume makes the trial again"
    rows = _TrialEvaluation.read(path, advice).pairs
    after = [row.after for row in rows if row.after is not None]
    if len(after) < len(rows):
        raise SmoldpoError(f"{path}: cannot be read (a pair without a score); {advice}")
    return wins(after, metric), [row.prompt for row in rows], [row.id for row in rows]


def collect(
    about: Mapping[str, Any],
    records: Sequence[TrialRecord],
    folders: Mapping[int, Path],
    final: FinalResult | None,
) -> SweepResults:
    """What results.json holds.

    Args:
        about: name, metric, method, planned and the splits, by their names in results.json.
        records: the trials that have begun, in order.
        folders: of the trials that are done.
        final: of the winner, once it is known.
    """
    metric = about["metric"]
    read = {number: read_scores(folder, metric) for number, folder in folders.items()}
    if len({tuple(ids) for _, _, ids in read.values()}) > 1:
        raise SmoldpoError("the trials were not judged on the same pairs; sweep anew")
    winner: int | None = None
    ranking: dict[int, Standing] = {}
    if read:
        groups = next(iter(read.values()))[1]
        winner, ranking = rank_trials({n: scores for n, (scores, _, _) in read.items()}, groups)
    others = [number for number in ranking if number != winner]
    results = SweepResults(
        format=FORMAT,
        **about,
        done=len(read),
        failed=[record.number for record in records if record.status == FAILED],
        winner=winner,
        as_good=[number for number in others if ranking[number].as_good],
        worse=[number for number in others if not ranking[number].as_good],
        comparisons=comparisons(len(read)),
        correction="Holm, over all pairs of trials",
        trials=[_ranked(r, metric, ranking.get(r.number), winner) for r in records],
        final=final,
    )
    results.headline, results.explanations = headline(results), explanations(results)
    return results


def _ranked(
    record: TrialRecord, metric: str, standing: Standing | None, winner: int | None
) -> RankedTrial:
    """The trial's row; a trial that is not done has no standing."""
    row: dict[str, Any] = record.model_dump(exclude={"value", "accuracy"})
    if standing is not None:
        others = "as good" if standing.as_good else "worse"
        row |= {name: getattr(standing, name) for name in ("behind", "p", "p_corrected")}
        row["standing"] = "winner" if record.number == winner else others
    return RankedTrial(accuracy=record.estimate(metric), **row)


@dataclass(frozen=True)
class Standing:
    """A trial beside the winner.

    Attributes:
        behind: the winner's accuracy minus this one's.
        p, p_corrected: of no difference; 1 for the winner itself.
        as_good: not shown to be worse than the winner.
    """

    number: int
    behind: float
    p: float
    p_corrected: float
    as_good: bool


def best_trial(scores: Mapping[int, Sequence[float]]) -> int:
    """The trial with the highest mean; of equal ones the first."""
    return max(sorted(scores), key=lambda number: sum(scores[number]) / len(scores[number]))


def rank_trials(
    scores: Mapping[int, Sequence[float]], groups: Sequence[str]
) -> tuple[int, dict[int, Standing]]:
    """The winner, and every trial beside it.

    Args:
        scores: for each trial 0, ½ or 1 for each pair, in the same order.
        groups: each pair's prompt.
    """
    winner, numbers = best_trial(scores), sorted(scores)
    p = all_pairs_p([scores[number] for number in numbers], groups)
    two = list(combinations(range(len(numbers)), 2))
    corrected = dict(zip(two, holm([p[both] for both in two]), strict=True))
    at = numbers.index(winner)
    best = mean(scores[winner])
    found = {}
    for index, number in enumerate(numbers):
        last = corrected[min(at, index), max(at, index)] if index != at else 1.0
        behind = best - mean(scores[number])
        found[number] = Standing(number, behind, float(p[at, index]), last, last >= SIGNIFICANT)
    return winner, found


def comparisons(trials: int) -> int:
    """How many p-values are corrected for."""
    return trials * (trials - 1) // 2


def write_results(folder: Path, results: SweepResults) -> None:
    """Write both files."""
    write_json(folder / "results.json", results.as_json())
    write_text(folder / "results.csv", as_csv(results))


def as_csv(results: SweepResults) -> str:
    """One row a trial. Text that a spreadsheet would run as a formula gets a ' before it."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["trial", "status", "standing", *results.names, "accuracy", "low", "high", "behind", "p",
         "p_corrected", "steps", "seconds", "error"]
    )  # fmt: skip
    for trial in results.trials:
        accuracy = trial.accuracy
        bounds = (accuracy.value, accuracy.low, accuracy.high) if accuracy else (None,) * 3
        row = [trial.number, trial.status, trial.standing]
        row += [value_text(trial.settings[name]) for name in results.names]
        row += [*bounds, trial.behind, trial.p, trial.p_corrected]
        row += [trial.steps, trial.seconds, trial.error]
        writer.writerow(map(_cell, row))
    return text.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return f"'{value}"
    return "" if value is None else value


def headline(results: SweepResults) -> str:
    """Which trial is the best, and its accuracy on pairs that no trial has seen."""
    winner, final = results.winner, results.final
    if winner is None:
        return f"None of {results.planned} trials came to its end."
    settings = settings_text(results.trials[winner - 1].settings)
    sentence = f"Trial {winner} is the best of {results.done}: {settings}."
    accuracy = final and final.accuracy[results.metric]
    if not (final and accuracy):
        return sentence
    after = accuracy.after
    interval = "" if after.low is None else f" ({percent(after.low)} to {percent(after.high)})"
    return (
        f"{sentence} On {final.n:,} final pairs, which no trial saw, it prefers the "
        f"human-preferred answer in {percent(after.value)}{interval}, before "
        f"{percent(accuracy.before.value)}; {accuracy.words}."
    )


def explanations(results: SweepResults) -> list[str]:
    """Which others are as good, what the correction means, and why the final figure is another."""
    if results.winner is None:
        return []
    done, lines = results.done, []
    if done > 1:
        lines = [
            _about_rivals(results.worse, results.as_good),
            f"Of {done} equally good trials one always comes out first, and may seem far ahead. So "
            f"the p-values are corrected (Holm) for all {results.comparisons:,} pairs of trials "
            "that could have been first and other: if all were equally good, at most one sweep in "
            "twenty would call any of them worse than the first.",
        ]
    accuracy = results.trials[results.winner - 1].accuracy
    if results.final is not None and accuracy is not None:
        sentence = (
            f"On the {results.validation.pairs:,} validation pairs the winner has "
            f"{percent(accuracy.value)}."
        )
        if done > 1:
            sentence += (
                f" The highest of {done} figures is too high on average, because chance has a say "
                "in which one that is; the final pairs took no part in the choice, so believe the "
                "figure on those."
            )
        lines.append(sentence)
    lines.append(
        f"Accuracy is by {METRICS[results.metric]}; intervals hold {LEVEL:.0%} each and draw whole "
        "prompts. They and the tests are about these trained models; another seed would train "
        "others."
    )
    return lines


def _about_rivals(worse: list[int], as_good: list[int]) -> str:
    if not as_good:
        return "Every other trial is shown to be worse on the validation pairs."
    others = f"{_trials_are(as_good)} as good as far as these pairs can tell"
    if not worse:
        return f"None of the others is shown to be worse: {others}."
    first = _trials_are(worse)
    return f"{first[0].upper()}{first[1:]} shown to be worse; {others}."


def _trials_are(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return f"trial {numbers[0]} is"
    return f"trials {', '.join(map(str, numbers[:-1]))} and {numbers[-1]} are"
