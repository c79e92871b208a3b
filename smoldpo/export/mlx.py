"""A model as a folder for mlx-lm, and mlx-lm itself, where it is installed, as its reader.

mlx-lm reads what transformers reads, but from config.json it takes what stands at its top, and of
what is not there its own defaults, without a word: 10,000 for the rotary base, tied embeddings.
So everything is said there. Quantised weights are mlx's own, made and read by it alone.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import resource
import shutil
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME

from smoldpo.data.tokenize import Tokenization
from smoldpo.export.verify import (
    ANSWER_TOKENS,
    Measured,
    Verification,
    VerificationError,
    Witness,
    answered,
    token_ids,
)
from smoldpo.models.families import FAMILIES
from smoldpo.models.hf_logging import quiet
from smoldpo.models.load import find_model, load_model, load_tokenizer
from smoldpo.models.older_readers import add_older_names
from smoldpo.models.save import model_bytes, save_in_full
from smoldpo.types import TokenizedPair
from smoldpo.utils import progress
from smoldpo.utils.errors import ModelError, UsageError, nearest, whole_reason

PLAIN = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
QUANTIZED = {"q8": 8, "q6": 6, "q4": 4}
"""Bits of a weight; 64 weights share a scale and an offset in float16."""
GROUP = 64
BOUNDS = {"f32": 1e-3, "bf16": 0.05, "f16": 6e-3, "q8": 0.1, "q6": 0.2, "q4": 0.6}
"""Of mlx-lm's mean |Δ log p| a token, in nats; measured: docs/export.md."""
PAIRS = 4
"""So many pairs does mlx-lm read, where it is the second witness."""


def is_installed() -> bool:
    """Whether there is an mlx-lm to ask."""
    return all(importlib.util.find_spec(name) is not None for name in ("mlx", "mlx_lm"))


def require_kind(name: str) -> str:
    """The type of the weights by its name.

    Raises:
        UsageError: none that there is; one that takes mlx, where that is not installed.
    """
    kind, every = name.lower(), (*PLAIN, *QUANTIZED)
    if kind not in every:
        raise UsageError(
            f"--quantize {name}: give one of {', '.join(every)}{nearest(kind, every)} for --to mlx"
        )
    if kind in QUANTIZED and not is_installed():
        raise UsageError(
            f"--quantize {name}: is made by mlx, which is not installed; "
            "pip install mlx mlx-lm (on Linux 'mlx[cpu]'), or export f16 and call "
            f"mlx_lm.convert --quantize --q-bits {QUANTIZED[kind]} on a Mac"
        )
    return kind


def require_exportable(model: PreTrainedModel) -> None:
    """Refuse what mlx-lm would compute otherwise.

    Raises:
        ModelError: why.
    """
    config: Any = model.config
    if config.model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ModelError(
            f"a model of type {config.model_type!r} cannot be exported for mlx-lm here; those of "
            f"type {known} can (others: mlx_lm.convert)"
        )
    if config.hidden_act != "silu":
        raise ModelError(f"its activation is {config.hidden_act!r}, and mlx-lm computes silu")
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if window and window < config.max_position_embeddings and kinds != {"full_attention"}:
        raise ModelError(f"its sliding window ({window} tokens) is not what mlx-lm computes")
    width = config.hidden_size // config.num_attention_heads
    if config.model_type == "qwen2" and (getattr(config, "head_dim", None) or width) != width:
        raise ModelError(
            "its heads have a width of their own (head_dim), which mlx-lm does not read"
        )
    _require_rope(dict(config.rope_parameters or {}))


def _require_rope(rope: dict[str, Any]) -> None:
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise ModelError(f"its rotary scaling is of type {kind!r}")
    if rope.get("partial_rotary_factor", 1) != 1:
        raise ModelError("only a part of each head is rotated (partial_rotary_factor)")
    unread = {"attention_factor": None, "mscale": None, "mscale_all_dim": None}
    for key, neutral in unread.items():
        if kind == "yarn" and rope.get(key) != neutral:
            raise ModelError(f"its rotary scaling (YaRN) has {key} {rope[key]}")
    if kind == "yarn" and rope.get("truncate") is False:
        raise ModelError("its rotary scaling (YaRN) has truncate false")


def folder_bytes(model: PreTrainedModel, kind: str) -> int:
    """About how many bytes the folder takes while it is made: weights, and a share for the rest."""
    plain = model_bytes(model, PLAIN.get(kind, torch.float16))
    return plain * (2 if kind in QUANTIZED else 1) + (16 << 20)


def write_mlx(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, kind: str
) -> None:
    """Write the whole folder.

    Args:
        kind: of PLAIN or QUANTIZED.

    Raises:
        ModelError: what `require_exportable` refuses.
        OSError, SafetensorError: the disk is full or not writable.
    """
    require_exportable(model)
    plain = folder if kind in PLAIN else folder.with_name(f"f16-{folder.name}")
    plain.mkdir(exist_ok=True)
    with progress.spinner(f"writing {kind}"), quiet():
        save_in_full(plain, model, PLAIN.get(kind, torch.float16))
        model.config.to_json_file(plain / CONFIG_NAME, use_diff=False)
        add_older_names(plain)
        if kind in QUANTIZED:
            _quantize(plain, folder, QUANTIZED[kind])
            shutil.rmtree(plain)
    tokenizer.save_pretrained(folder)
    add_older_names(folder)


def _quantize(plain: Path, folder: Path, bits: int) -> None:
    """As mlx_lm.convert does."""
    with _mlx_lm() as utils:
        model, config = utils.load_model(plain, lazy=True)
        model, config = utils.quantize_model(model, config, GROUP, bits)
        utils.save_model(folder, model)
        utils.save_config(config, folder / CONFIG_NAME)


@contextlib.contextmanager
def _mlx_lm() -> Iterator[Any]:
    """mlx_lm.utils, silent; importing it lowers the limit of open files, which is put back."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.redirect_stdout(io.StringIO()):
        from mlx_lm import utils

        with contextlib.suppress(ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        yield utils


def read_back(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a folder of plain weights, as transformers reads them."""
    source = find_model(str(folder))
    return load_model(source, torch.float32, as_stored=FAMILIES), load_tokenizer(source)


def measure(
    folder: Path, tokens: Sequence[TokenizedPair], how: Tokenization, specials: Iterable[str]
) -> Measured:
    """What mlx-lm makes of the folder: token ids, log-probabilities, first greedy tokens.

    Without a GPU of Apple's it computes in float32 with the weights unpacked: mlx has no fast
    products of others on a CPU.

    Raises:
        VerificationError: it does not load the folder.
    """
    import mlx.core as mx

    with _mlx_lm() as utils:
        try:
            model, tokenizer, config = utils.load(str(folder), return_config=True)
            if not utils.can_run_metal():
                model = utils.dequantize_model(model)
                model.set_dtype(mx.float32)
        except Exception as error:  # mlx and mlx-lm raise without a common base
            raise VerificationError(
                f"mlx-lm does not load the folder: {whole_reason(error)}"
            ) from None
        logps = []
        with progress.bar("mlx-lm", len(tokens)) as advance:
            for pair in tokens:
                chosen, rejected = (_logps(model, pair, side) for side in pair.completions)
                logps.append((chosen, rejected))
                advance(1)
        room = config.get("max_position_embeddings")
        ends = tokenizer.eos_token_ids
        answers = [_answer(model, ids, ends) for ids in answered(tokens, room)]
    plain = tokenizer._tokenizer
    return Measured(token_ids(plain, how, specials), list(tokens), logps, answers)


def _logps(model: Any, pair: TokenizedPair, side: Any) -> list[float]:
    """log π of each scored token."""
    import mlx.core as mx

    ids = mx.array([[*pair.prompt_ids, *side.ids]])
    start = len(pair.prompt_ids)
    scored = [place for place, counts in enumerate(side.scored) if counts]
    logits = model(ids[:, :-1])[0][mx.array([start + place - 1 for place in scored])]
    logits = logits.astype(mx.float32)
    taken = mx.take_along_axis(logits, ids[0, start:][mx.array(scored)][:, None], axis=1)[:, 0]
    found: list[float] = (taken - mx.logsumexp(logits, axis=1)).tolist()
    return found


def _answer(model: Any, prompt: tuple[int, ...], ends: set[int]) -> tuple[int, ...]:
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    ids: list[int] = []
    for token, _ in generate_step(mx.array(list(prompt)), model, max_tokens=ANSWER_TOKENS):
        ids.append(int(token))
        if ids[-1] in ends:
            break
    return tuple(ids)


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
