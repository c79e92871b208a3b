"""What a sweep found, in sentences. No torch here."""

from __future__ import annotations

from typing import Any

from smoldpo.evaluation.metrics import METRICS
from smoldpo.evaluation.statistics import LEVEL
from smoldpo.utils.text import percent


def headline(results: dict[str, Any]) -> str:
    """Which trial is the best, and what it is worth on pairs that no trial has seen."""
    winner, final = results["winner"], results["final"]
    if winner is None:
        return f"None of {results['planned']} trials came to its end."
    trial = results["trials"][winner - 1]
    said = f"Trial {winner} is the best of {results['done']}: {in_words(trial['settings'])}."
    if final is None:
        return said
    accuracy = final["accuracy"][results["metric"]]
    after = accuracy["after"]
    said += (
        f" On {final['n']:,} final pairs, which no trial saw, it prefers the human-preferred answer in "
        f"{percent(after['value'])}{_interval(after)}, before {percent(accuracy['before']['value'])}"
    )
    return f"{said}; {accuracy['words']}."


def explanations(results: dict[str, Any]) -> list[str]:
    """Which others are as good, what the correction means, and why the final figure is another."""
    if results["winner"] is None:
        return []
    done, worse, as_good = results["done"], results["worse"], results["as_good"]
    lines = []
    if done > 1:
        lines.append(_rivals(worse, as_good))
        lines.append(_correction(done, results["comparisons"]))
    if results["final"] is not None:
        lines.append(_two_figures(results))
    lines.append(
        f"Accuracy is by {METRICS[results['metric']]}; intervals hold {LEVEL:.0%} each and draw whole "
        "prompts. They and the tests are about these trained models; another seed would train others."
    )
    return lines


def _two_figures(results: dict[str, Any]) -> str:
    """Why the final figure is another than that by which the winner won."""
    trial = results["trials"][results["winner"] - 1]
    said = (
        f"On the {results['validation']['pairs']:,} validation pairs the winner has "
        f"{percent(trial['accuracy']['value'])}. "
    )
    if results["done"] > 1:
        said += (
            f"The highest of {results['done']} figures is too high on average, because chance has a say in "
            "which one that is; the final pairs took no part in the choice, so believe the figure on those."
        )
    return said.strip()


def _rivals(worse: list[int], as_good: list[int]) -> str:
    if not as_good:
        return "Every other trial is shown to be worse on the validation pairs."
    others = f"{_trials(as_good)} {_is(as_good)} as good as far as these pairs can tell"
    if not worse:
        return f"None of the others is shown to be worse: {others}."
    first = _trials(worse)
    return f"{first[0].upper()}{first[1:]} {_is(worse)} shown to be worse; {others}."


def _is(numbers: list[int]) -> str:
    return "is" if len(numbers) == 1 else "are"


def _trials(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return f"trial {numbers[0]}"
    return f"trials {', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"


def _correction(trials: int, comparisons: int) -> str:
    return (
        f"Of {trials} equally good trials one always comes out first, and may seem far ahead. So the "
        f"p-values are corrected (Holm) for all {comparisons:,} pairs of trials that could have been first "
        "and other: if all were equally good, at most one sweep in twenty would call any of them worse "
        "than the first."
    )


def _interval(part: dict[str, Any]) -> str:
    if part["low"] is None:
        return ""
    return f" ({percent(part['low'])} to {percent(part['high'])})"


# Settings of a trial, in words.


def in_words(settings: dict[str, Any]) -> str:
    """A trial's settings in one line."""
    return ", ".join(f"{name} {value_in_words(value)}" for name, value in settings.items())


def value_in_words(value: Any) -> str:
    """One value, as it would be written on the command line."""
    if isinstance(value, list):
        return ",".join(map(value_in_words, value)) or "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    return "none" if value is None else str(value)
