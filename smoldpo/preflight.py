"""What can be refused before anything is read or loaded, in one place for all that train or forecast."""

from __future__ import annotations

from smoldpo.config import TrainConfig
from smoldpo.evaluation.gate import parse_gates
from smoldpo.evaluation.judges import Judge, parse_judge
from smoldpo.loggers import require_loggers
from smoldpo.optim import require_optimizer


def preflight(config: TrainConfig) -> tuple[list[Judge], dict[str, float]]:
    """The judges and the gates that a configuration names; cheap, so that a wrong one costs no minutes.

    Raises:
        UsageError: a logger or an optimizer that is not installed or cannot run here, no such judge, or no
            such gate.
        ModelError: a judge's model that is not there.
    """
    require_loggers(config.report_to)
    judges = [parse_judge(spec) for spec in config.judges]
    gates = parse_gates(config.fail_under)
    require_optimizer(config)
    return judges, gates
