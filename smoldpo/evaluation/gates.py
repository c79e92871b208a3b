"""`--fail-under METRIC=VALUE`: an evaluation as a gate. No torch here.

logp, logp_per_token and reward are the accuracy after; change/reward and the like are after minus
before; balanced is the accuracy with chosen shorter and longer weighing alike; win_rate is the
first judge's.
"""

from __future__ import annotations

from collections.abc import Sequence

from smoldpo.evaluation.metrics import METRICS
from smoldpo.evaluation.schema import Accuracy, Evaluation, ModelEvaluation
from smoldpo.utils.errors import UsageError, nearest

KNOWN = (*METRICS, *(f"change/{name}" for name in METRICS), "balanced", "win_rate")


def parse_gates(given: Sequence[str]) -> dict[str, float]:
    """METRIC=VALUE as a mapping.

    Raises:
        UsageError: an unknown metric, or a value that is no number from -1 to 1.
    """
    gates = {}
    for item in given:
        name, equals, text = (part.strip() for part in item.partition("="))
        if not equals:
            raise UsageError(f"fail_under {item!r}: write METRIC=VALUE, such as reward=0.55")
        if name not in KNOWN:
            raise UsageError(
                f"fail_under {item!r}: no metric {name!r}{nearest(name, KNOWN)}; there are "
                f"{', '.join(KNOWN)}"
            )
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not -1 <= value <= 1:
            raise UsageError(f"fail_under {item!r}: the value must be a share, such as 0.55")
        gates[name] = value
    return gates


def failures(evaluation: Evaluation | ModelEvaluation, gates: dict[str, float]) -> list[str]:
    """A sentence for each gate that is not passed; a figure that does not exist passes none."""
    found = []
    for name, least in gates.items():
        value = _value(evaluation, name)
        if value is None:
            found.append(f"{name} was not measured, and should be at least {least:g}")
        elif value < least:
            found.append(f"{name} is {value:.4f}, and should be at least {least:g}")
    return found


def _value(evaluation: Evaluation | ModelEvaluation, name: str) -> float | None:
    if name == "win_rate":
        return evaluation.judges[0].win_rate.value if evaluation.judges else None
    if name == "balanced":
        by_length = evaluation.by_length
        return by_length.balanced.after if by_length and by_length.balanced else None
    change, _, metric = name.rpartition("/")
    accuracy = evaluation.accuracy.get(metric)
    if isinstance(accuracy, Accuracy):
        return (accuracy.change if change else accuracy.after).value
    return None if change else accuracy  # one model's, which has no change
