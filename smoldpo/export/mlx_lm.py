"""mlx-lm, where it is installed: quantises and unpacks weights, and says what it computes."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import resource
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers.utils import CONFIG_NAME

from smoldpo.data.tokenize import Tokenization
from smoldpo.export.verify import Measured, Verification, VerificationError, Witness, token_ids
from smoldpo.types import Completion, TokenizedPair
from smoldpo.utils import progress
from smoldpo.utils.errors import whole_reason

PAIRS, PAIRS_WITHOUT_GPU = 4, 2
"""So many pairs, the shortest ones, does it read."""


def is_installed() -> bool:
    """Whether there is an mlx-lm to ask."""
    return all(importlib.util.find_spec(name) is not None for name in ("mlx", "mlx_lm"))


@contextlib.contextmanager
def _utils() -> Iterator[Any]:
    """mlx_lm.utils, silent; importing it lowers the limit of open files, which is put back."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.redirect_stdout(io.StringIO()):
        from mlx_lm import utils

        with contextlib.suppress(ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        yield utils


def quantize(plain: Path, folder: Path, bits: int, group: int) -> None:
    """Write a folder of plain weights as a quantised one, as mlx_lm.convert does."""
    with _utils() as utils:
        model, config = utils.load_model(plain, lazy=True)
        model, config = utils.quantize_model(model, config, group, bits)
        utils.save_model(folder, model)
        utils.save_config(config, folder / CONFIG_NAME)


def unpacked(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a quantised folder in float32, by name.

    Raises:
        VerificationError: mlx-lm does not load the folder.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten

    with _utils() as utils:
        model, _ = _loaded(utils.load_model, folder)
        weights: Any = tree_flatten(utils.dequantize_model(model).parameters())
    return {
        name: torch.from_numpy(numpy.array(weight.astype(mx.float32))) for name, weight in weights
    }


def _loaded(load: Any, folder: Path | str) -> Any:
    try:
        return load(folder)
    except Exception as error:  # mlx and mlx-lm raise without a common base
        reason = whole_reason(error)
        raise VerificationError(f"mlx-lm does not load the folder: {reason}") from None


def asked(tokens: Sequence[TokenizedPair]) -> list[int]:
    """Which of the pairs it is asked about: the shortest, fewer where there is no GPU of Apple's.

    On other CPUs mlx multiplies matrices a hundred times slower than torch.
    """
    with _utils() as utils:
        count = PAIRS if utils.can_run_metal() else PAIRS_WITHOUT_GPU
    return sorted(range(len(tokens)), key=lambda place: tokens[place].longest)[:count]


def measure(
    folder: Path,
    tokens: Sequence[TokenizedPair],
    how: Tokenization,
    specials: Iterable[str],
    adapter: Path | None = None,
) -> Measured:
    """What mlx-lm makes of the folder: token ids and log-probabilities, in float32 without a GPU.

    Args:
        adapter: a folder with what is added to the weights.

    Raises:
        VerificationError: it does not load the folder.
    """
    import mlx.core as mx

    with _utils() as utils:
        model, tokenizer = _loaded(partial(utils.load, adapter_path=adapter), str(folder))
        if not utils.can_run_metal():
            model = utils.dequantize_model(model)
            model.set_dtype(mx.float32)
        logps = []
        with progress.bar("mlx-lm", len(tokens)) as advance:
            for pair in tokens:
                chosen, rejected = (_logps(model, pair, side) for side in pair.completions)
                logps.append((chosen, rejected))
                advance(1)
    ids = token_ids(tokenizer._tokenizer, how, specials)
    return Measured(ids, list(tokens), logps, [])


def _logps(model: Any, pair: TokenizedPair, side: Completion) -> list[float]:
    """log π of each scored token; the head reads no more states than it must."""
    import mlx.core as mx

    ids = mx.array([[*pair.prompt_ids, *side.ids]])
    start = len(pair.prompt_ids)
    scored = [start + place for place, counts in enumerate(side.scored) if counts]
    states = model.model(ids[:, :-1])[0][mx.array(scored) - 1]
    head = model.lm_head if "lm_head" in model else model.model.embed_tokens.as_linear
    logits = head(states).astype(mx.float32)
    taken = mx.take_along_axis(logits, ids[0][mx.array(scored)][:, None], axis=1)[:, 0]
    found: Any = (taken - mx.logsumexp(logits, axis=1)).tolist()
    return list(found)


def witness(found: Verification) -> Witness:
    """What mlx-lm found, as the second witness."""
    return Witness(
        program="mlx-lm",
        version=version("mlx-lm"),
        texts=found.texts,
        tokens=found.tokens,
        mean=found.mean,
        largest=found.largest,
    )
