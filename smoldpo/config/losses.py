"""What each loss is and which settings it reads, for the configuration's checks. No torch.

The losses themselves are in losses/, one function a name; a test holds that both list the same
names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from smoldpo.utils.errors import nearest


@dataclass(frozen=True)
class Facts:
    """What must be known of a loss without computing it."""

    options: tuple[str, ...] = ()
    """Settings besides beta that its function takes."""
    beta: bool = True
    """Whether β is in it."""
    needs_reference: bool = True
    whole_step: bool = False
    """Whether it is more than a sum over pairs: it needs all log-probabilities of a step."""
    by_difference: bool = False
    """Whether chosen and rejected enter by the difference of their scores alone.

    Only then does the normaliser β log Z(x) cancel, so only these have a meaning with other
    f-divergences (Wang et al. 2023, https://arxiv.org/abs/2309.16240).
    """
    unpaired: bool = False
    """Whether it takes single answers that people liked or did not, and no pairs."""
    margin: bool = False
    """Whether a pair's own margin has a place in it."""
    likelihood: bool = False
    """Whether it holds the negative log-likelihood of the chosen answer already."""
    ld_alpha: bool = True
    """Whether the tokens by which one answer is longer may count for less in it.

    Not in a likelihood, and not in an average per token without a reference: divided by all its
    tokens, a sum of which some were left out makes the longer answer the likelier one.
    """


WEIGHTS = ("desirable_weight", "undesirable_weight")
FACTS: dict[str, Facts] = {
    "sigmoid": Facts(("label_smoothing",), by_difference=True, margin=True),
    "sigmoid_norm": Facts(by_difference=True),
    "robust": Facts(("label_smoothing",), by_difference=True, margin=True),
    "hinge": Facts(by_difference=True, margin=True),
    "ipo": Facts(by_difference=True),
    "ipo_sum": Facts(by_difference=True),
    "exo_pair": Facts(("label_smoothing",), by_difference=True),
    "discopop": Facts(("discopop_tau",), by_difference=True),
    "dpop": Facts(("dpop_lambda",)),
    "nca_pair": Facts(),
    "bco_pair": Facts(),
    "sppo_hard": Facts(),
    "apo_zero": Facts(),
    "apo_down": Facts(),
    "aot": Facts(("label_smoothing",), whole_step=True),
    "aot_unpaired": Facts(("label_smoothing",), whole_step=True),
    "kto": Facts(WEIGHTS, whole_step=True, unpaired=True, ld_alpha=False),
    "apo_zero_unpaired": Facts(WEIGHTS, unpaired=True, ld_alpha=False),
    "sft": Facts(
        beta=False, needs_reference=False, by_difference=True, likelihood=True, ld_alpha=False
    ),
    "simpo": Facts(("label_smoothing", "simpo_gamma"), needs_reference=False, ld_alpha=False),
    "cpo": Facts(("label_smoothing", "cpo_alpha"), needs_reference=False, likelihood=True),
    "orpo": Facts(needs_reference=False, likelihood=True, ld_alpha=False),
}
"""By their names in TRL where TRL has them. `sft` may stand beside any f-divergence."""

OPTIONS = tuple(dict.fromkeys(option for facts in FACTS.values() for option in facts.options))
"""Every setting that some loss takes besides beta."""


def needs_reference(names: Sequence[str]) -> bool:
    """Whether any of these losses compares with a reference."""
    return any(FACTS[name].needs_reference for name in names)


def is_unpaired(names: Sequence[str]) -> bool:
    """Whether these losses take single answers; the configuration holds that all or none do."""
    return any(FACTS[name].unpaired for name in names)


RENAMED = {"aot_pair": "aot_unpaired"}
"""Names in earlier versions of TRL."""


def known_losses(names: Any) -> Any:
    """The same, unless it is a list with a name of no loss.

    Raises:
        ValueError: with the nearest name, and all of them.
    """
    unknown = [name for name in names if name not in FACTS] if isinstance(names, list) else []
    if unknown:
        problems = ", ".join(f"no loss {name!r}{_suggestion(str(name))}" for name in unknown)
        raise ValueError(f"{problems}; there are {', '.join(FACTS)}")
    return names


def _suggestion(name: str) -> str:
    return f" (now called {RENAMED[name]})" if name in RENAMED else nearest(name, FACTS)
