"""smoldpo: Direct Preference Optimization for small language models.

As a library (docs/library.md; the code is in smoldpo/library/):

    result = smoldpo.train(data="pairs.jsonl", freeze_layers=25, beta=0.2)
    print(result.evaluation["headline"])

Names are loaded when they are first used, so `import smoldpo` brings no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from smoldpo.config import TrainConfig
    from smoldpo.errors import ConfigError, DataError, ModelError, SmoldpoError, UsageError
    from smoldpo.interrupts import InterruptedRunError
    from smoldpo.library.logps import sequence_logps, tokenize_pairs
    from smoldpo.library.loss import dpo_loss
    from smoldpo.library.measuring import Figures, evaluate
    from smoldpo.library.pairs import Pairs, load_pairs
    from smoldpo.library.training import train
    from smoldpo.run import RunResult
    from smoldpo.types import PairLogps, PreferencePair, TokenizedPair

_HOMES = {
    "train": "smoldpo.library.training",
    "evaluate": "smoldpo.library.measuring",
    "load_pairs": "smoldpo.library.pairs",
    "tokenize_pairs": "smoldpo.library.logps",
    "sequence_logps": "smoldpo.library.logps",
    "dpo_loss": "smoldpo.library.loss",
    "TrainConfig": "smoldpo.config",
    "RunResult": "smoldpo.run",
    "Figures": "smoldpo.library.measuring",
    "Pairs": "smoldpo.library.pairs",
    "PreferencePair": "smoldpo.types",
    "TokenizedPair": "smoldpo.types",
    "PairLogps": "smoldpo.types",
    "SmoldpoError": "smoldpo.errors",
    "UsageError": "smoldpo.errors",
    "ConfigError": "smoldpo.errors",
    "DataError": "smoldpo.errors",
    "ModelError": "smoldpo.errors",
    "InterruptedRunError": "smoldpo.interrupts",
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
