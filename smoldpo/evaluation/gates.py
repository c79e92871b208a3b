"""`--fail-under METRIC=VALUE`: an evaluation as a gate. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from smoldpo.evaluation.metrics import METRICS
from smoldpo.utils.errors import UsageError, nearest

CHANGES = tuple(f"change/{name}" for name in METRICS)
KNOWN = (*METRICS, *CHANGES, "balanced", "win_rate")
MEANING = (
    "logp, logp_per_token, reward: accuracy after; change/reward and the like: after minus before; balanced: "
    "accuracy with chosen shorter and longer weighing alike; win_rate: of the first judge; all from 0 to 1"
)


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
                f"fail_under {item!r}: no metric {name!r}{nearest(name, KNOWN)}; there are {', '.join(KNOWN)}"
            )
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not -1 <= value <= 1:
            raise UsageError(f"fail_under {item!r}: the value must be a share, such as 0.55")
        gates[name] = value
    return gates


def failures(evaluation: dict[str, Any], gates: dict[str, float]) -> list[str]:
    """A sentence for each gate that is not passed; a figure that does not exist passes none."""
    found = []
    for name, least in gates.items():
        value = _value(evaluation, name)
        if value is None:
            found.append(f"{name} was not measured, and should be at least {least:g}")
        elif value < least:
            found.append(f"{name} is {value:.4f}, and should be at least {least:g}")
    return found


def _value(evaluation: dict[str, Any], name: str) -> float | None:
    if name == "win_rate":
        judges = evaluation.get("judges") or []
        return judges[0]["win_rate"]["value"] if judges else None
    if name == "balanced":
        balanced = evaluation["by_length"]["balanced"]
        return balanced["after"] if balanced else None
    change, _, metric = name.rpartition("/")
    accuracy = evaluation["accuracy"].get(metric)
    if not isinstance(accuracy, dict):  # of one model there is no change
        return None if change else accuracy
    return accuracy["change" if change else "after"]["value"]
