"""train: a whole run from Python, with the settings, results and run folder of `smoldpo train`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from smoldpo.api.pairs import in_memory_pairs, source_names
from smoldpo.config.load import build_config, load_yaml
from smoldpo.config.schema import TrainConfig
from smoldpo.engine.kernels.elementwise import restored
from smoldpo.plan.planner import settle_depth
from smoldpo.training.run import RunResult, run_training
from smoldpo.training.run_folder import choose_folder
from smoldpo.utils import progress, rng
from smoldpo.utils.distributed import require_one_rank
from smoldpo.utils.errors import UsageError
from smoldpo.utils.rank_group import joined
from smoldpo.utils.signals import Interruption

PLACEHOLDERS = {"data": ["data.jsonl"], "eval_data": "eval_data.jsonl"}
"""Names for pairs in memory while the settings are checked, before anything is written."""


def train(
    config: TrainConfig | Mapping[str, Any] | str | Path | None = None,
    *,
    verbose: bool = True,
    **settings: Any,
) -> RunResult:
    """Tune a policy on preference pairs, and measure it before and after on held-out pairs.

    Args:
        config: a TrainConfig, a dictionary of settings, or a YAML file; by default the demo's
            settings.
        verbose: whether messages and progress go to standard error.
        settings: what `smoldpo train --help` lists, such as `beta=0.2`; they win over `config`.
            `data` and `eval_data` may also be the pairs themselves: dictionaries in any schema that
            smoldpo reads, or PreferencePairs. They are written to `given/` in the run folder, so
            that the run can be resumed.

    Returns:
        The run's folder, its evaluation (`result.evaluation["headline"]` is the answer in one
        sentence; None without held-out pairs), and what the command line would print.

    Raises:
        ConfigError: everything that is wrong with the settings, at once.
        SmoldpoError: data, model, memory or disk that will not do; the text says what to do.
        InterruptedRunError: by Ctrl-C or SIGTERM, after a checkpoint was saved. Handlers that the
            program set for these signals itself stay in force instead.
    """
    asked = _settings(config) | settings
    asked = {k: str(v) if isinstance(v, Path) else v for k, v in asked.items()}
    given = {name: asked.pop(name) for name in ("data", "eval_data") if _holds_pairs(asked, name)}
    built = build_config(asked | {name: PLACEHOLDERS[name] for name in given})
    with inside_host(verbose):
        if not given:
            return train_settled(built, Interruption(embedded=True))
        require_one_rank("smoldpo.train over pairs in memory")
        folder = choose_folder(built)
        with in_memory_pairs(folder, given) as files:
            return train_settled(_reading(built, folder, files), Interruption(embedded=True))


def train_settled(
    config: TrainConfig,
    interruption: Interruption | None = None,
    command: list[str] | None = None,
    started: float = 0.0,
) -> RunResult:
    """Plan first where freeze_layers is auto, then train; the arguments of run_training.

    Args:
        started: seconds that the start of the program took, as a part of the `budget`.
    """
    with joined() as ranks:
        # A folder that cannot be is refused before time goes into planning.
        ranks.on_first(lambda: choose_folder(config))
        config, picked = settle_depth(config, started)
        return run_training(config, interruption, command, picked)


def _settings(config: TrainConfig | Mapping[str, Any] | str | Path | None) -> dict[str, Any]:
    if config is None:
        return {}
    if isinstance(config, TrainConfig):
        return config.model_dump()
    settings = load_yaml(Path(config)) if isinstance(config, str | Path) else config
    if not isinstance(settings, Mapping):
        raise UsageError(
            f"config is {type(config).__name__}; give a TrainConfig, a dictionary, or a YAML file"
        )
    return {str(key).replace("-", "_"): value for key, value in settings.items()}


def _holds_pairs(settings: dict[str, Any], name: str) -> bool:
    """Whether a setting holds pairs; names are put into the form that the configuration has."""
    value = settings.get(name)
    if value is None or isinstance(value, str):  # commas and the word none are the configuration's
        return False
    names = source_names(value)
    if names is None:
        return True
    settings[name] = names if name == "data" else ",".join(names)
    return False


def _reading(
    config: TrainConfig, folder: Path, files: Mapping[str, tuple[str, list[str]]]
) -> TrainConfig:
    """The configuration of a run in `folder` that reads these files and their numeric columns."""
    changed: dict[str, Any] = {"output_dir": str(folder)}
    for name, (path, numbers) in files.items():
        changed[name] = [path] if name == "data" else path
        if name == "data":
            known = {item.partition("=")[0].strip() for item in config.columns}
            columns = [f"{number}={number}" for number in numbers if number not in known]
            changed["columns"] = [*config.columns, *columns]
    return build_config(config.model_dump() | changed)


@contextlib.contextmanager
def inside_host(verbose: bool) -> Iterator[None]:
    """A block after which the host program's state is as it was: random generators, compiling.

    Args:
        verbose: whether messages and progress go to standard error meanwhile.
    """
    tensors, numbers = rng.capture()
    try:
        with restored(), contextlib.nullcontext() if verbose else progress.silenced():
            yield
    finally:
        rng.restore(tensors, numbers)
