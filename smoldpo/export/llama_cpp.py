"""llama.cpp as a second witness of a GGUF file, where the package xllamacpp is installed.

Its server, in this process and on the loopback address, tokenises texts and computes one next token
at a time. A bias as large as no logit lets it take the token that we ask about; the log-probability
that it reports with it is the one before the bias.
"""

from __future__ import annotations

import importlib.util
import json
import math
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from smoldpo.export import verify
from smoldpo.export.verify import Measured, VerificationError, Witness, require_equal
from smoldpo.utils import progress

BOUNDS = verify.BOUNDS | {"f32": 1e-3}
"""Of the mean |Δ log p| a token, in nats; measured: docs/export.md."""
PAIRS, POSITIONS = 4, 8
"""So many pairs, and so many scored tokens of each side, spread over it."""
BIAS = 1000.0
ANSWER_SECONDS = 300.0


def is_installed() -> bool:
    """Whether there is a llama.cpp to ask."""
    return importlib.util.find_spec("xllamacpp") is not None


def ask(
    file: Path,
    tokenizer: PreTrainedTokenizerBase,
    model: Measured,
    kind: str,
    threads: int,
    adapter: Path | None = None,
) -> Witness:
    """Hold llama.cpp's token ids and log-probabilities against the model's.

    Args:
        model: what the model that was exported made of texts and pairs, with this tokenizer.
        kind: the type of the file's matrices.
        adapter: a GGUF file with what is added to them.

    Raises:
        VerificationError: it does not load the file, or finds something else in it.
    """
    import xllamacpp

    longest = max(pair.longest for pair in model.tokens)
    try:
        server = _Server(file, longest + 8, threads, adapter)
    except RuntimeError as error:
        raise VerificationError(f"llama.cpp does not load the file: {error}") from None
    for name, ids in model.texts.items():
        text = tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        require_equal(f"{name} under llama.cpp", ids, server.token_ids(str(text)))
    questions = list(_questions(model))
    differences = []
    with progress.bar("llama.cpp", len(questions)) as advance:
        for ids, next_id, expected in questions:
            differences.append(abs(server.logp(ids, next_id) - expected))
            advance(1)
    found = Witness(
        program="llama.cpp",
        version=str(xllamacpp.__version__),
        texts=len(model.texts),
        tokens=len(differences),
        mean=sum(differences) / len(differences),
        largest=max(differences),
    )
    if not (math.isfinite(found.largest) and found.mean <= BOUNDS[kind]):
        raise VerificationError(
            f"llama.cpp computes something else from the file: mean |Δ log p| {found.mean:.2g} "
            f"nats a token, and {kind} may have {BOUNDS[kind]:g}; export a wider type"
        )
    return found


def _questions(model: Measured) -> Iterator[tuple[tuple[int, ...], int, float]]:
    """Ids to read, the id that follows, and its log-probability under the model."""
    for pair, sides in list(zip(model.tokens, model.logps, strict=True))[:PAIRS]:
        for completion, logps in zip(pair.completions, sides, strict=True):
            scored = [place for place, counts in enumerate(completion.scored) if counts]
            known = list(zip(scored, logps, strict=True))
            for place, logp in known[:: max(1, len(known) // POSITIONS)]:
                ids = pair.prompt_ids + completion.ids[:place]
                yield ids, completion.ids[place], logp


class _Server:
    """llama.cpp's server in this process, in float32 where the file is."""

    def __init__(self, file: Path, positions: int, threads: int, adapter: Path | None):
        import xllamacpp

        settings: Any = xllamacpp.CommonParams()
        settings.model.path = str(file)
        if adapter is not None:
            settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        settings.n_ctx = max(256, positions)
        settings.n_parallel = 1
        settings.n_gpu_layers = 0
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        kinds = xllamacpp.llama_flash_attn_type
        settings.flash_attn_type = kinds.LLAMA_FLASH_ATTN_TYPE_DISABLED
        settings.port = 0
        settings.warmup = False
        settings.verbosity = -1
        self._server = xllamacpp.Server(settings)
        # Never through a proxy: the address is this process's own.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def token_ids(self, text: str) -> list[int]:
        """Nothing is put before or behind the text; control tokens in it are control tokens."""
        asked = {"content": text, "add_special": False, "parse_special": True}
        request = urllib.request.Request(
            self._server.listening_address.rstrip("/") + "/tokenize",
            json.dumps(asked).encode(),
            {"Content-Type": "application/json"},
        )
        with self._opener.open(request, timeout=ANSWER_SECONDS) as answer:
            ids: list[int] = json.load(answer)["tokens"]
        return ids

    def logp(self, ids: Sequence[int], next_id: int) -> float:
        """log p(next_id | ids), in nats."""
        asked = {
            "prompt": list(ids), "n_predict": 1, "n_probs": 1, "cache_prompt": True,
            "logit_bias": [[next_id, BIAS]], "temperature": 1.0, "top_k": 0, "top_p": 1.0,
            "min_p": 0.0,
        }  # fmt: skip
        answer = self._server.handle_completions(asked)
        try:
            (said,) = answer["choices"][0]["logprobs"]["content"]
        except (KeyError, TypeError, ValueError):
            raise VerificationError(f"llama.cpp gave no log-probability: {answer}") from None
        if said["id"] != next_id:
            raise VerificationError(f"llama.cpp took token {said['id']} in place of {next_id}")
        return float(said["logprob"])
