"""What a run begins with: data, models and tokens, and that all its ranks have the same."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from smoldpo.config.checks import require_sync
from smoldpo.config.schema import TrainConfig
from smoldpo.data.load import TrainingData
from smoldpo.training.final_evaluation import FinalEvaluation, tokenize_sample_prompt
from smoldpo.training.fingerprint import CONTENTS, Fingerprint, fingerprint
from smoldpo.training.policy_and_reference import PolicyAndReference
from smoldpo.training.sampler import Schedule
from smoldpo.training.setup import TokenizedData, load_data, load_models, preflight, tokenize
from smoldpo.utils.distributed import Ranks, world
from smoldpo.utils.errors import UsageError


@dataclass
class RunInputs:
    """Everything that a run works with, and the fingerprint of it (fingerprint.py)."""

    models: PolicyAndReference
    data: TokenizedData
    final_evaluation: FinalEvaluation
    gates: dict[str, float]
    fingerprint: Fingerprint


def load_inputs(
    config: TrainConfig,
    kernels: dict[str, bool | str] | None = None,
    read: Callable[..., TrainingData] = load_data,
    encode: Callable[..., TokenizedData] = tokenize,
) -> RunInputs:
    """Data, models and tokens.

    Args:
        kernels: of an interrupted run; by default whichever are faster here.
        read, encode: do what `load_data` and `tokenize` do; the trials of a sweep share theirs.
    """
    if config.freeze_layers == "auto":
        raise UsageError(
            "freeze_layers auto is settled by smoldpo train alone, one run at a time: give a "
            "number here, such as the one that smoldpo plan shows"
        )
    judges, gates = preflight(config)
    data = read(config)
    require_sync(config, Schedule.of(config, len(data.train)).total_steps)
    models = load_models(config, data, kernels)
    tokenized = encode(config, models, data)
    sample = tokenize_sample_prompt(config, models)
    final_evaluation = FinalEvaluation(config, models, tokenized, sample, judges)
    known = fingerprint(config, models, data, tokenized)
    require_same(world(), known)
    return RunInputs(models, tokenized, final_evaluation, gates, known)


def require_same(ranks: Ranks, own: Fingerprint) -> None:
    """Refuse ranks that would not compute the same run.

    Raises:
        UsageError: naming a rank whose files, settings or precision are not the first one's.
    """
    if ranks.size == 1:
        return
    first, *others = (
        _facts(Fingerprint.model_validate(each)) for each in ranks.share(own.model_dump)
    )
    for rank, theirs in enumerate(others, start=1):
        other = [name for name in first | theirs if first.get(name) != theirs.get(name)]
        if other:
            raise UsageError(
                f"rank {rank} would not compute the same run as rank 0: it has other values of "
                f"{', '.join(other)}; give all ranks the same files and settings"
            )


def _facts(known: Fingerprint) -> dict[str, object]:
    """By names for people."""
    contents = {CONTENTS[name]: value for name, value in known.contents.items()}
    computing = known.computing.model_dump(exclude={"threads"})
    return contents | known.settings | computing


def require_seen(ranks: Ranks, folder: Path) -> None:
    """Refuse a run folder that lies on a disk of the first rank's machine alone.

    Raises:
        UsageError: naming a machine that does not see it.
    """
    seen = ranks.share(lambda: [socket.gethostname(), folder.is_dir()])
    blind = [host for host, sees in seen if not sees]
    if blind:
        raise UsageError(
            f"output_dir {folder}: {blind[0]} does not see it; all ranks read checkpoints there, "
            "so put it on a disk that all machines share"
        )
