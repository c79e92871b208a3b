"""Rates of their own for some of the parameters: which parameters a pattern of `learning_rates` means."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from smoldpo.errors import UsageError
from smoldpo.models.freeze import parameters_of
from smoldpo.optim_settings import parse_rates


def rates_of(model: PreTrainedModel, items: Sequence[str]) -> dict[str, float]:
    """Peak rates by parameter name; parameters that no pattern fits are left out.

    Where several patterns fit a parameter, the first one counts.

    Args:
        model: with `requires_grad` set on what trains.
        items: pattern=rate, the patterns as for `freeze`.

    Raises:
        UsageError: a pattern fits nothing that trains, or nothing that an earlier one has not taken.
    """
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    rates: dict[str, float] = {}
    for pattern, rate in parse_rates(items).items():
        matched = parameters_of(model, "learning_rates", pattern)
        if not matched & trains:
            raise UsageError(
                f"learning_rates: {pattern!r} fits only what is frozen (what trains looks like "
                f"{sorted(trains)[0]})"
            )
        left = matched & trains - rates.keys()
        if not left:
            raise UsageError(
                f"learning_rates: patterns before {pattern!r} have taken all that it fits; put it before them"
            )
        rates |= dict.fromkeys(sorted(left), rate)
    return rates
