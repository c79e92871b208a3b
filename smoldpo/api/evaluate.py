"""evaluate: what a model is worth on pairs, or what two models are, pair by pair."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

from smoldpo.api.pairs import Source, source_names, write_in_memory_pairs
from smoldpo.api.train import inside_host
from smoldpo.config.evaluate_options import evaluate_options
from smoldpo.evaluation.evaluate import evaluate_models
from smoldpo.utils.errors import UsageError


class Figures(dict[str, Any]):
    """What `smoldpo evaluate --json` prints, as a dictionary (docs/cli.md).

    Attributes:
        pairs: one row a pair, as `smoldpo evaluate --rows` writes them.
        failed_gates: what `fail_under` asks for and the models do not have, in words.
    """

    def __init__(
        self, figures: dict[str, Any], pairs: list[dict[str, Any]], failed_gates: list[str]
    ):
        super().__init__(figures)
        self.pairs = pairs
        self.failed_gates = failed_gates


def evaluate(
    model: str | Path | Sequence[str | Path],
    data: Source,
    reference: str | Path | None = None,
    *,
    verbose: bool = True,
    **options: Any,
) -> Figures:
    """Preference accuracy of a model on pairs, with intervals; of two, the test of the difference.

    Args:
        model: `builtin`, a folder, a run, a .gguf file or a hub id; two of them are compared, the
            first being the reference unless another is given.
        data: a source as training reads it, or the pairs themselves.
        reference: for the implicit reward.
        verbose: whether progress goes to standard error.
        options: beta, seed, subset, split, max_samples, max_length, batch_size, dtype, device,
            engine, format, columns (a dictionary), generate_prompts, temperature, max_new_tokens,
            judges, fail_under; see `smoldpo evaluate --help`.

    Raises:
        ConfigError: options that do not exist, or values that they cannot have.
        SmoldpoError: data or models that will not do.
    """
    named = {"reference": None if reference is None else str(reference)}
    settings = evaluate_options(named | options)
    names = [str(model)] if isinstance(model, str | Path) else [str(name) for name in model]
    if len(names) not in (1, 2):
        raise UsageError(f"evaluate takes one model, or two to compare, not {len(names)}")
    with inside_host(verbose), tempfile.TemporaryDirectory() as folder:
        found = evaluate_models(names, _source(data, Path(folder)), settings)
        return Figures(found.summary(), found.rows(), found.failed_gates)


def _source(data: Source, folder: Path) -> str:
    names = source_names(data)
    if names is None:
        path = folder / "pairs.jsonl"
        write_in_memory_pairs(cast("Iterable[Any]", data), path)
        return str(path)
    if len(names) != 1:
        raise UsageError(f"evaluate takes one source of pairs, not {len(names)}")
    return names[0]
