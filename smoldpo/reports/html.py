"""The report of one run, or of several side by side: one HTML file; without torch.

The page runs no script and asks for nothing: plots are SVG inside it, and every text is escaped.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from smoldpo.data.account import DataAccount, Finding, SourceAccount
from smoldpo.data.cleaning.cleaner import RULES
from smoldpo.evaluation.schema import SAMPLE_PROMPT, Evaluation, Group, Sample, all_alarms
from smoldpo.reports import plots
from smoldpo.reports.plots import CSS_COLOURS, METRIC_WORDS, Plot
from smoldpo.reports.run_files import Environment, RunFiles
from smoldpo.reports.samples import Colouring, dialogue, shown_sample
from smoldpo.reports.templating import render
from smoldpo.utils.errors import SmoldpoError, UsageError
from smoldpo.utils.files import write_text

MAX_SAMPLES = 12
MAX_PAIRS = 6
"""Pairs that each list of notable ones shows."""
MAX_SLICES = 30
FOLDER_SETTINGS = {"output_dir", "overwrite"}
"""Settings in which two runs differ without being different."""


def write_report(runs: Sequence[RunFiles], path: Path) -> None:
    """Write the page of one run, or of several side by side.

    Raises:
        UsageError: no run was given.
        SmoldpoError: the file cannot be written.
    """
    text = html_report(runs)
    try:
        write_text(path, text)
    except OSError as error:
        raise SmoldpoError(f"{path}: cannot be written: {error.strerror or error}") from None


def html_report(runs: Sequence[RunFiles]) -> str:
    """The page.

    Raises:
        UsageError: no run was given.
    """
    if not runs:
        raise UsageError("a report needs at least one run folder")
    return _single_run_page(runs[0]) if len(runs) == 1 else _comparison_page(runs)


def _single_run_page(run: RunFiles) -> str:
    evaluation = run.evaluation
    colouring = Colouring.of(_all_tokens(run))
    return render(
        "report.html",
        run=run,
        evaluation=evaluation,
        names=_column_names(evaluation),
        accuracies=plots.in_order(evaluation) if evaluation else {},
        model=_model(run),
        metric_words=METRIC_WORDS,
        loss=plots.loss_name(run.config),
        curves=plots.curves(run),
        window=plots.window(len(run.steps)),
        plots=_evaluation_plots(evaluation) if evaluation else {},
        length_groups=_length_groups(evaluation),
        slices=_slices(evaluation),
        samples=[shown_sample(sample, colouring) for sample in _samples(run)],
        notable=_notable(evaluation, colouring),
        colouring=colouring,
        sources=_sources(run.data),
        last=run.steps[-1],
        command=shlex.join(run.environment.command),
        machine=_machine(run.environment),
    )


def _all_tokens(run: RunFiles) -> list[Any]:
    """Every list of tokens that the page may colour."""
    found = [side for s in run.samples for side in (s.reference_tokens, s.policy_tokens)]
    if run.evaluation:
        notable = run.evaluation.notable
        pairs = [*notable.changed, *notable.best, *notable.worst]
        found += [side for pair in pairs for side in (pair.chosen_tokens, pair.rejected_tokens)]
    return found


def _samples(run: RunFiles) -> list[Sample]:
    """Those that the page shows: the sample prompt, then the first of the others."""
    in_order = sorted(run.samples, key=lambda sample: sample.id != SAMPLE_PROMPT)
    return in_order[:MAX_SAMPLES]


def _column_names(evaluation: Evaluation | None) -> dict[str, str]:
    """Titles of the two columns; of a run, as the words they are."""
    if evaluation is None or evaluation.kind == "run":
        return {"before": "Before", "after": "After"}
    return evaluation.names.model_dump()


def _model(run: RunFiles) -> str:
    name = run.config.get("model", "")
    return "SmolLM2-135M-Instruct (built in)" if name == "builtin" else str(name)


def _evaluation_plots(evaluation: Evaluation) -> dict[str, Plot]:
    drawn = {"accuracies": plots.accuracies(evaluation)}
    if evaluation.margins:
        drawn["margins"] = plots.margin_histogram(
            "Margins of implicit rewards", "margin, β × nats", evaluation.margins, evaluation.names
        )
    if evaluation.logp_margins:
        drawn["logp_margins"] = plots.margin_histogram(
            "Margins of log-probabilities",
            "log π(chosen) − log π(rejected), nats",
            evaluation.logp_margins,
            evaluation.names,
        )
    if evaluation.by_length_difference:
        bins = evaluation.by_length_difference
        drawn["by_length"] = plots.by_length_difference(bins)
    if evaluation.calibration and evaluation.calibration.bins:
        drawn["calibration"] = plots.calibration(evaluation.calibration.bins)
    return drawn


def _length_groups(evaluation: Evaluation | None) -> list[tuple[str, Group]]:
    if evaluation is None or evaluation.by_length is None:
        return []
    groups = evaluation.by_length
    return [
        ("chosen is the longer", groups.chosen_longer),
        ("chosen is the shorter", groups.chosen_shorter),
        ("equally long", groups.equal),
    ]


def _slices(evaluation: Evaluation | None) -> list[dict[str, Any]]:
    """Tables by source and category; one that holds a single group says nothing."""
    if evaluation is None:
        return []
    found = {"Source": evaluation.slices.source, "Category": evaluation.slices.category}
    return [
        {
            "title": title,
            "groups": [(group.name or "(none)", group) for group in groups[:MAX_SLICES]],
            "left_out": len(groups[MAX_SLICES:]),
        }
        for title, groups in found.items()
        if len(groups) > 1
    ]


def _notable(evaluation: Evaluation | None, colouring: Colouring) -> list[dict[str, Any]]:
    if evaluation is None:
        return []
    lists = {
        "Changed sides": evaluation.notable.changed,
        "Improved most": evaluation.notable.best,
        "Worsened most": evaluation.notable.worst,
    }
    return [
        {
            "title": title,
            "of": len(pairs),
            "pairs": [
                {
                    "pair": pair,
                    "prompt": dialogue(pair.prompt),
                    "sides": [
                        ("Chosen", colouring.answer(pair.chosen, pair.chosen_tokens), None),
                        ("Rejected", colouring.answer(pair.rejected, pair.rejected_tokens), None),
                    ],
                }
                for pair in pairs[:MAX_PAIRS]
            ],
        }
        for title, pairs in lists.items()
        if pairs
    ]


def _sources(data: DataAccount) -> list[dict[str, Any]]:
    """What was read, source by source, each with what its rules did."""
    words = {"train": "to train on", "eval": "held out"}
    return [
        {"read": source, "use": words[use], "rules": _rules(source)} for use, source in data.read()
    ]


def _rules(source: SourceAccount) -> list[dict[str, Any]]:
    examples: dict[str, Finding] = {}
    for item in source.touched:
        examples.setdefault(item.rule, item)
    return [
        {
            "action": action,
            "name": name,
            "about": RULES[name].about if name in RULES else "the row holds no pair",
            "rows": rows,
            "example": examples.get(name),
        }
        for action, counts in source.by_action().items()
        for name, rows in counts.items()
    ]


MACHINE = (
    "platform", "processor", "cores", "threads", "device", "dtype", "engine", "compiled", "started"
)  # fmt: skip


def _machine(environment: Environment) -> dict[str, str]:
    known = environment.model_dump()
    return {name: str(known[name]) for name in MACHINE if known.get(name) is not None}


def _comparison_page(runs: Sequence[RunFiles]) -> str:
    labels = _labels(runs)
    rows = [_row(index, run, labels[index]) for index, run in enumerate(runs)]
    return render(
        "report_compare.html",
        runs=rows,
        best=_best(rows) if _same_pairs(runs) else None,
        metric_words=METRIC_WORDS,
        curves=plots.overlaid_curves(runs),
        differences=_differences(runs),
        same_pairs=_same_pairs(runs),
    )


def _labels(runs: Sequence[RunFiles]) -> list[str]:
    """Folder names, or whole paths where two folders are called alike."""
    names = [run.name for run in runs]
    return [
        name if names.count(name) == 1 else str(run.folder)
        for name, run in zip(names, runs, strict=True)
    ]


def _row(index: int, run: RunFiles, label: str) -> dict[str, Any]:
    colour, style = plots.run_style(index)
    return {
        "files": run,
        "label": label,
        "evaluation": run.evaluation,
        "accuracy": run.evaluation and run.evaluation.accuracy.get("reward"),
        "alarms": all_alarms(run.evaluation) if run.evaluation else [],
        "why_not": _why_not(run),
        "loss": plots.loss_name(run.config),
        "colour": CSS_COLOURS[colour],
        "dash": {"-": "none", "--": "6 3", ":": "1.5 3", "-.": "6 3 1.5 3"}[style],
        "last": run.steps[-1],
    }


def _why_not(run: RunFiles) -> str:
    """Why a run has no accuracy by implicit reward, and which it has instead."""
    if run.evaluation is None:
        return run.absent.get("evaluation.json", "")
    known = [
        f"{METRIC_WORDS[name].lower()} {accuracy.after.value:.1%}"
        for name, accuracy in run.evaluation.accuracy.items()
        if accuracy and accuracy.after.value is not None
    ]
    return "The loss compares with no reference, so there is no implicit reward; by " + ", ".join(
        known
    )


def _best(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Of the runs that were judged, the one with the highest accuracy by implicit reward."""

    judged = [row for row in rows if row["accuracy"] and row["accuracy"].after.value is not None]
    return max(judged, key=lambda row: row["accuracy"].after.value, default=None)


def _differences(runs: Sequence[RunFiles]) -> dict[str, list[str]]:
    """Settings that are not the same in all runs, each with its value in every run."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    values = {
        str(key): [_in_words(run.config.get(key)) for run in runs]
        for key in keys
        if key not in FOLDER_SETTINGS
    }
    return {key: row for key, row in values.items() if len(set(row)) > 1}


def _in_words(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")


def _same_pairs(runs: Sequence[RunFiles]) -> bool:
    """Whether the evaluated runs were judged on the same pairs."""
    judged = [run.evaluation for run in runs if run.evaluation]
    return len({frozenset(pair.id for pair in evaluation.pairs) for evaluation in judged}) <= 1
