"""smoldpo: Direct Preference Optimization for small language models.

As a library (docs/library.md; the code is in smoldpo/api/):

    result = smoldpo.train(data="pairs.jsonl", freeze_layers=25, beta=0.2)
    print(result.evaluation["headline"])

Names are loaded when they are first used, so `import smoldpo` brings no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from smoldpo._version import __version__

if TYPE_CHECKING:
    from smoldpo.api.evaluate import Figures, evaluate
    from smoldpo.api.logps import sequence_logps, tokenize_pairs
    from smoldpo.api.losses import dpo_loss
    from smoldpo.api.pairs import Pairs, load_pairs
    from smoldpo.api.train import train
    from smoldpo.config.schema import TrainConfig
    from smoldpo.training.run import RunResult
    from smoldpo.types import PairLogps, PreferencePair, TokenizedPair
    from smoldpo.utils.errors import ConfigError, DataError, ModelError, SmoldpoError, UsageError
    from smoldpo.utils.signals import InterruptedRunError

_HOMES = {
    "train": "smoldpo.api.train",
    "evaluate": "smoldpo.api.evaluate",
    "load_pairs": "smoldpo.api.pairs",
    "tokenize_pairs": "smoldpo.api.logps",
    "sequence_logps": "smoldpo.api.logps",
    "dpo_loss": "smoldpo.api.losses",
    "TrainConfig": "smoldpo.config.schema",
    "RunResult": "smoldpo.training.run",
    "Figures": "smoldpo.api.evaluate",
    "Pairs": "smoldpo.api.pairs",
    "PreferencePair": "smoldpo.types",
    "TokenizedPair": "smoldpo.types",
    "PairLogps": "smoldpo.types",
    "SmoldpoError": "smoldpo.utils.errors",
    "UsageError": "smoldpo.utils.errors",
    "ConfigError": "smoldpo.utils.errors",
    "DataError": "smoldpo.utils.errors",
    "ModelError": "smoldpo.utils.errors",
    "InterruptedRunError": "smoldpo.utils.signals",
}
"""Where each public name lives. What is not listed here may change without notice."""

__all__ = [
    "ConfigError",
    "DataError",
    "Figures",
    "InterruptedRunError",
    "ModelError",
    "PairLogps",
    "Pairs",
    "PreferencePair",
    "RunResult",
    "SmoldpoError",
    "TokenizedPair",
    "TrainConfig",
    "UsageError",
    "__version__",
    "dpo_loss",
    "evaluate",
    "load_pairs",
    "sequence_logps",
    "tokenize_pairs",
    "train",
]


def __getattr__(name: str) -> Any:
    """A public name, imported now (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
