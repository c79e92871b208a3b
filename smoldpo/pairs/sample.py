"""Answers to prompts, by one model or several, each written down as it comes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from smoldpo.data.template_settings import replace_template, today, tokenization
from smoldpo.data.tokenize import PairTokenizer
from smoldpo.engine.autotune import compute_dtype, dtype_name
from smoldpo.engine.precision import cast_frozen, master_dtype
from smoldpo.models.families import FAMILIES
from smoldpo.models.generate import Answer, generate_answers
from smoldpo.models.load import find_model, load_model, load_tokenizer, positions
from smoldpo.models.weights import weights_sha256
from smoldpo.pairs.checks import GivenAnswer
from smoldpo.pairs.journal import Journal
from smoldpo.pairs.prompts import AskedPrompt, as_plain
from smoldpo.utils import progress
from smoldpo.utils.devices import pick_device
from smoldpo.utils.errors import DataError
from smoldpo.utils.memory import trim_memory


@dataclass(frozen=True)
class SamplingSettings:
    """How answers are drawn; see `smoldpo pairs make --help`.

    `template` holds the settings of the chat template that are given, by name.
    """

    models: Sequence[str] = ("builtin",)
    num_answers: int = 4
    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 42
    batch_size: int = 8
    dtype: str = "auto"
    device: str = "auto"
    template: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DrawnAnswer:
    """An answer, and which of the models' answers to its prompt it is."""

    model: int
    number: int
    """From 0; the random numbers follow from it, the prompt and the seed."""
    answer: Answer

    @property
    def given(self) -> GivenAnswer:
        """As checks see it."""
        return GivenAnswer(self.answer.text, self.answer.ended)


@dataclass
class DrawnAnswers:
    """Answers to prompts that all models had room for.

    Attributes:
        answers: of each prompt those of all models, in the models' order.
        models: name and SHA-256 of the weights of each.
        too_long: prompts that left no room for an answer.
        refused: prompts that a chat template refused.
    """

    prompts: list[AskedPrompt]
    answers: list[list[DrawnAnswer]]
    models: list[dict[str, str]]
    settings: dict[str, Any]
    too_long: int
    refused: int


def draw_answers(
    prompts: Sequence[AskedPrompt],
    settings: SamplingSettings,
    journal: Journal,
    overwrite: bool = False,
) -> DrawnAnswers:
    """Every model's answers to every prompt; those in the journal are not drawn again.

    A model is loaded, answers everything, and leaves before the next one comes.

    Raises:
        UsageError: the journal holds answers that were drawn otherwise.
        ModelError: as the loading of a model.
        DataError: no prompt is left that all models can answer.
    """
    before = journal.request or {}
    device = pick_device(settings.device)
    dtype = settings.dtype
    if dtype == "auto":  # which is measured: answers that are known decide for those to come
        dtype = before.get("dtype") or dtype_name(compute_dtype(dtype, device)[0])
    template = dict(settings.template)
    day = template.get("template_date") or before.get("template", {}).get("template_date")
    template["template_date"] = day or today()
    sources = [find_model(name) for name in settings.models]
    readers = []
    for source in sources:
        tokenizer = load_tokenizer(source)
        replace_template(tokenizer, template.get("chat_template"))
        readers.append(PairTokenizer(tokenizer, tokenization(1, template, source.location)))
    tokens, refused = _prompt_tokens(prompts, readers)
    request = _request(prompts, settings, dtype, device, template)
    hashes: list[str] = []
    found: list[list[DrawnAnswer]] = [[] for _ in prompts]
    too_long: set[int] = set()
    for number, (source, reader) in enumerate(zip(sources, readers, strict=True)):
        with progress.spinner(f"loading {source.name}"):
            compute = getattr(torch, dtype)
            model = load_model(source, master_dtype(compute), device, as_stored=FAMILIES)
            hashes.append(weights_sha256(model))
            model = cast_frozen(model, compute)
        if number == 0:  # nothing is written, or thrown away, before a model could be loaded
            journal.begin(request, overwrite)
        room = (positions(model) or 2**31) - settings.max_new_tokens
        too_long |= {at for at, ids in tokens.items() if len(ids[number]) > room}
        fits = {at: ids[number] for at, ids in tokens.items() if len(ids[number]) <= room}
        _answer_all(model, reader, fits, number, hashes[-1], settings, journal, found)
        del model
        trim_memory()
    kept = [at for at in tokens if at not in too_long]
    if not kept:
        why = "has room for none of the prompts" if too_long else "refuses every prompt"
        raise DataError(f"{', '.join(settings.models)}: {why}, so there is nothing to answer")
    return DrawnAnswers(
        [prompts[at] for at in kept],
        [found[at] for at in kept],
        [{"model": s.name, "sha256": h} for s, h in zip(sources, hashes, strict=True)],
        {name: request[name] for name in ("temperature", "top_p", "max_new_tokens", "dtype")},
        len(too_long),
        refused,
    )


def _answer_all(
    model: Any,
    reader: PairTokenizer,
    prompts: Mapping[int, Sequence[int]],
    model_number: int,
    sha256: str,
    settings: SamplingSettings,
    journal: Journal,
    found: list[list[DrawnAnswer]],
) -> None:
    """One model's answers, of which the journal may hold some."""
    asked = [(at, number) for at in prompts for number in range(settings.num_answers)]
    place = {each: index for index, each in enumerate(asked)}
    known = {}
    for row in journal.rows:
        at = place.get((row.get("prompt", -1), row.get("number", -1)))
        if at is not None and row.get("model") == model_number and row.get("sha256") == sha256:
            known[at] = Answer(tuple(row["ids"]), row["text"], row["ended"])

    def finished(some: Sequence[int], answers: Sequence[Answer]) -> None:
        journal.append(
            [
                {"model": model_number, "sha256": sha256, "prompt": asked[at][0]}
                | {"number": asked[at][1]}
                | asdict(answer)
                for at, answer in zip(some, answers, strict=True)
                if at not in known
            ]
        )

    with progress.bar(f"answers of {settings.models[model_number]}", len(asked)) as advance:
        if known:
            progress.say(f"{len(known):,} answers were drawn before")
        answers = generate_answers(
            model,
            reader.tokenizer,
            [prompts[at] for at, _ in asked],
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            seed=[answer_seed(settings.seed, number) for _, number in asked],
            batch_size=settings.batch_size,
            top_p=settings.top_p,
            known=known,
            finished=finished,
            advance=advance,
        )
    for (at, number), answer in zip(asked, answers, strict=True):
        found[at].append(DrawnAnswer(model_number, number, answer))


def answer_seed(seed: int, number: int) -> int:
    """The seed of a prompt's answer of this number, unlike that of any other number or seed."""
    digest = hashlib.sha256(f"answer {seed} {number}".encode()).digest()
    return int.from_bytes(digest[:6], "big")


def _prompt_tokens(
    prompts: Sequence[AskedPrompt], readers: Sequence[PairTokenizer]
) -> tuple[dict[int, list[list[int]]], int]:
    """Of each prompt that no template refuses its tokens for each model; and how many are not."""
    tokens, first = {}, None
    for at, asked in enumerate(prompts):
        try:
            tokens[at] = [reader.prompt_ids(asked.prompt, asked.arguments) for reader in readers]
        except DataError as error:
            first = first or DataError(str(error), asked.file or None, asked.row or None)
    if first is not None and not tokens:
        raise first
    return tokens, len(prompts) - len(tokens)


def _request(
    prompts: Sequence[AskedPrompt],
    settings: SamplingSettings,
    dtype: str,
    device: str,
    template: Mapping[str, Any],
) -> dict[str, Any]:
    """All that decides which answers are drawn, but for the weights."""
    texts = "\n".join(map(as_plain, prompts))
    resolved = {"dtype": dtype, "device": device, "template": dict(template)}
    return (
        asdict(settings)
        | resolved
        | {
            "models": list(settings.models),
            "prompts": len(prompts),
            "prompts_sha256": hashlib.sha256(texts.encode()).hexdigest(),
        }
    )
