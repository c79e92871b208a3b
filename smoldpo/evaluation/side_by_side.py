"""Two models put side by side: their answers to the same prompts, where they differ word by word, judges.

load both -> both answer, with the same random numbers -> both score, token by token,
the answers (log π - log π_ref: samples.jsonl, KL) and the pairs worth reading (evaluation.json)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smoldpo.engine.autotune import KernelChoice
from smoldpo.engine.logprobs import Sides, token_logps
from smoldpo.engine.precision import cast_frozen
from smoldpo.evaluation.judges.base import Judge, compare_all, win_rate
from smoldpo.evaluation.metrics import PairScore
from smoldpo.evaluation.statistics import mean_interval
from smoldpo.models.generate import Answer, generate_answers
from smoldpo.types import Advance, PreferencePair, Prompt, TokenizedPair
from smoldpo.utils import progress
from smoldpo.utils.errors import SmoldpoError
from smoldpo.utils.memory import trim_memory

AT_ONCE = 16
"""Prompts answered side by side."""


@dataclass(frozen=True)
class Question:
    """A prompt to be answered, as text and as tokens."""

    id: str
    prompt: Prompt
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Reading:
    """A pair worth reading, and its margins log π(chosen) - log π(rejected) in nats."""

    kind: str
    pair: PreferencePair
    tokenized: TokenizedPair
    before: float
    after: float


@dataclass
class SideBySide:
    """What came of it: rows of samples.jsonl, and parts of evaluation.json."""

    samples: list[dict[str, Any]] = field(default_factory=list)
    generation: dict[str, Any] | None = None
    judges: list[dict[str, Any]] = field(default_factory=list)
    notable: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def in_evaluation(self) -> dict[str, Any]:
        """Its parts of evaluation.json."""
        return {"generation": self.generation, "judges": self.judges, "notable": self.notable}


@dataclass(frozen=True)
class Settings:
    """How the answers are drawn."""

    max_new_tokens: int
    temperature: float
    seed: int


def choose_questions(
    pairs: Sequence[PreferencePair],
    tokenized: Sequence[TokenizedPair],
    count: int,
    room: int | None,
    max_new_tokens: int,
) -> list[Question]:
    """Up to `count` distinct prompts, evenly over the pairs, that leave room for their answers."""
    distinct: dict[tuple[int, ...], Question] = {}
    for pair, tokens in zip(pairs, tokenized, strict=True):
        fits = room is None or len(tokens.prompt_ids) + max_new_tokens <= room
        if fits and tokens.prompt_ids not in distinct:
            distinct[tokens.prompt_ids] = Question(pair.id, pair.prompt, tokens.prompt_ids)
    found = list(distinct.values())
    if count and not found:
        progress.say(
            f"no held-out prompt leaves room for {max_new_tokens:,} tokens in the model's "
            f"{room:,} positions: none is answered"
        )
    count = min(count, len(found))
    return [found[number * len(found) // count] for number in range(count)]


def readings(
    pairs: Sequence[PreferencePair],
    tokenized: Sequence[TokenizedPair],
    before: Sequence[PairScore],
    after: Sequence[PairScore],
) -> list[Reading]:
    """The pairs worth reading, by how their log-probabilities moved."""
    return [
        Reading(
            kind,
            pairs[index],
            tokenized[index],
            before[index].margins["logp"] or 0.0,
            after[index].margins["logp"] or 0.0,
        )
        for kind, indices in notable(before, after).items()
        for index in indices
    ]


class Comparison:
    """Reference and policy, loaded to answer and to be compared token by token.

    Args:
        load: gives the reference as it was loaded, then the policy, which may be made of the reference
            that it is given; both will compute in `dtype`.
        sample: a prompt that both answer greedily; it is in no measure.
    """

    def __init__(
        self,
        load: tuple[Callable[[], PreTrainedModel], Callable[[PreTrainedModel], PreTrainedModel]],
        tokenizer: PreTrainedTokenizerBase,
        dtype: torch.dtype,
        kernels: KernelChoice,
        settings: Settings,
        questions: Sequence[Question],
        sample: Question | None,
        readings: Sequence[Reading],
    ):
        self._load, self._tokenizer = load, tokenizer
        self._dtype, self._kernels, self._settings = dtype, kernels, settings
        self._questions, self._sample, self._readings = list(questions), sample, readings
        self._asked = self._questions + ([sample] if sample else [])

    @property
    def units(self) -> int:
        """How far `run` advances."""
        return 2 * (2 * len(self._asked) + len(self._readings))

    def run(self, judges: Sequence[Judge], advance: Callable[[int], None]) -> SideBySide:
        """Load, answer, score, and let the judges compare."""
        if not (self._asked or self._readings):
            return SideBySide()
        load_reference, load_policy = self._load
        trim_memory()  # what evaluation kept for its next batch
        reference = cast_frozen(load_reference(), self._dtype)
        answers = [self._answers(reference, advance)]
        trim_memory()
        policy = cast_frozen(load_policy(reference), self._dtype, share_with=reference)
        answers.append(self._answers(policy, advance))
        pairs = self._scored_pairs(*answers)
        sides = [token_logps(model, pairs, self._kernels, advance) for model in (reference, policy)]
        del reference, policy
        ratios = [_ratios(*both) for both in zip(*sides, strict=True)]
        said = ratios[: len(self._asked)]
        texts = self._readable(pairs, ratios)
        measured = [side[: len(self._questions)] for side in answers]  # without the sample
        return SideBySide(
            samples=[
                self._sample_row(question, *(side[i] for side in answers), *texts[i])
                for i, question in enumerate(self._asked)
            ],
            generation=self._measured(measured, said),
            judges=self._judged(judges, *measured, lambda: advance(0)),
            notable=self._notable(texts[len(self._asked) :]),
        )

    def _answers(self, model: PreTrainedModel, advance: Callable[[int], None]) -> list[Answer]:
        def ask(questions: Sequence[Question], temperature: float) -> list[Answer]:
            return generate_answers(
                model,
                self._tokenizer,
                [question.ids for question in questions],
                max_new_tokens=self._settings.max_new_tokens,
                temperature=temperature,
                seed=self._settings.seed,
                batch_size=AT_ONCE,
                advance=advance,
            )

        answers = ask(self._questions, self._settings.temperature) if self._questions else []
        return answers + (ask([self._sample], 0.0) if self._sample else [])

    def _scored_pairs(
        self, reference: Sequence[Answer], policy: Sequence[Answer]
    ) -> list[TokenizedPair]:
        """Both answers to each prompt as a pair (the policy's as chosen), then the pairs worth reading."""
        answered = [
            TokenizedPair(question.id, question.ids, ours.ids, theirs.ids)
            for question, theirs, ours in zip(self._asked, reference, policy, strict=True)
        ]
        return answered + [reading.tokenized for reading in self._readings]

    def _readable(
        self, pairs: Sequence[TokenizedPair], ratios: Sequence[Sides]
    ) -> list[list[list[list[Any]]]]:
        """For each pair and side, [text, log ratio] of each token."""
        return [
            [
                _with_texts(self._tokenizer, ids, values)
                for ids, values in zip((pair.chosen_ids, pair.rejected_ids), both, strict=True)
            ]
            for pair, both in zip(pairs, ratios, strict=True)
        ]

    def _sample_row(
        self,
        question: Question,
        reference: Answer,
        policy: Answer,
        policy_tokens: list[Any],
        reference_tokens: list[Any],
    ) -> dict[str, Any]:
        return {
            "id": question.id,
            "prompt": question.prompt,
            "reference": reference.text,
            "policy": policy.text,
            "reference_ended": reference.ended,
            "policy_ended": policy.ended,
            "reference_tokens": reference_tokens,
            "policy_tokens": policy_tokens,
        }

    def _measured(
        self, answers: Sequence[Sequence[Answer]], ratios: Sequence[Sides]
    ) -> dict[str, Any] | None:
        if not self._questions:
            return None
        reference, policy = map(measures, answers)
        return {
            "prompts": len(self._questions),
            "temperature": self._settings.temperature,
            "max_new_tokens": self._settings.max_new_tokens,
            "reference": reference,
            "policy": policy,
            "kl_per_token": self._kl([ours for ours, _ in ratios[: len(self._questions)]]),
        }

    def _kl(self, ratios: Sequence[Sequence[float]]) -> dict[str, float | None] | None:
        """KL(π || π_ref) per token: the mean of log π - log π_ref over tokens that π itself drew.

        Only answers drawn at temperature 1 come from π; for others there is no estimate.
        """
        if self._settings.temperature != 1:
            return None
        sums, tokens = [math.fsum(row) for row in ratios], [len(row) for row in ratios]
        groups = [question.id for question in self._questions]
        low, high = mean_interval(sums, groups, self._settings.seed, tokens) or (None, None)
        return {"value": math.fsum(sums) / sum(tokens), "low": low, "high": high}

    def _judged(
        self,
        judges: Sequence[Judge],
        reference: Sequence[Answer],
        policy: Sequence[Answer],
        check: Callable[[], None],
    ) -> list[dict[str, Any]]:
        found = []
        prompts = [question.prompt for question in self._questions]
        for judge in judges if prompts else ():
            with progress.bar(f"judge {judge.name}", len(prompts)) as advance:

                def judged(units: int, advance: Advance = advance) -> None:
                    advance(units)
                    check()  # a slow judge is no reason not to stop

                ours, theirs = ([a.text for a in side] for side in (policy, reference))
                found.append({"judge": judge.name} | _asked(judge, prompts, ours, theirs, judged))
        return found

    def _notable(self, texts: Sequence[Any]) -> dict[str, list[dict[str, Any]]]:
        found: dict[str, list[dict[str, Any]]] = {"changed": [], "best": [], "worst": []}
        for reading, (chosen, rejected) in zip(self._readings, texts, strict=True):
            found[reading.kind].append(
                {
                    "id": reading.pair.id,
                    "prompt": reading.pair.prompt,
                    "chosen": reading.pair.chosen,
                    "rejected": reading.pair.rejected,
                    "margin_before": reading.before,
                    "margin_after": reading.after,
                    "chosen_tokens": chosen,
                    "rejected_tokens": rejected,
                }
            )
        return found


def _asked(
    judge: Judge,
    prompts: Sequence[Prompt],
    ours: Sequence[str],
    theirs: Sequence[str],
    advance: Callable[[int], None],
) -> dict[str, Any]:
    """The judge's figures; where it fails, `error` says why: a run does not end on a judge out of reach."""
    try:
        return win_rate(compare_all(judge, prompts, ours, theirs, advance))
    except SmoldpoError as error:
        progress.say(f"judge {judge.name}: {error}; its win rate is missing")
        return win_rate([]) | {"error": str(error)}


def _ratios(reference: Sides, policy: Sides) -> Sides:
    """log π - log π_ref of each token of both sides."""
    return tuple(
        [ours - theirs for ours, theirs in zip(new, old, strict=True)]
        for new, old in zip(policy, reference, strict=True)
    )


def _with_texts(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], values: Sequence[float]
) -> list[list[Any]]:
    """[text, value] of each token; tokens that are parts of one character are joined, their values added."""
    found: list[list[Any]] = []
    waiting: list[int] = []
    total = 0.0
    for token, value in zip(ids, values, strict=True):
        waiting.append(token)
        total += value
        text = tokenizer.decode(waiting, clean_up_tokenization_spaces=False)
        if "\ufffd" not in text or len(waiting) >= 4:
            found.append([text, round(total, 4)])
            waiting, total = [], 0.0
    if waiting:
        found.append([tokenizer.decode(waiting), round(total, 4)])
    return found


# How a model answers: length, ends, variety, repetition.
#
# A word is a run of characters without white space, in lower case; an n-gram is n words in a row within one
# answer. Text that is written without spaces has few words by this, and its figures say little.


Gram = tuple[str, ...]


def measures(answers: Sequence[Answer]) -> dict[str, float | None]:
    """Figures of a model's answers; at least one answer.

    tokens        mean number of tokens, the end-of-turn token included
    words         mean number of words
    ended         share of answers that ended of themselves
    distinct_n    distinct n-grams over all n-grams, of all answers together; None where there are none. From
                  Li et al. 2016, who divide by the number of words instead; by n-grams, 1 means that none
                  comes twice. It falls as there is more text: compare models on the same prompts.
    repetition    mean over answers of the share of 4-grams that stood in the answer before: seq-rep-4 of
                  Welleck et al. 2019, 1 - distinct / all. An answer of fewer than four words counts 0.

    Raises:
        ValueError: there are no answers.
    """
    if not answers:
        raise ValueError("no answers to measure")
    words = [answer.text.lower().split() for answer in answers]
    return {
        "tokens": _mean(len(answer.ids) for answer in answers),
        "words": _mean(map(len, words)),
        "ended": _mean(answer.ended for answer in answers),
        **{f"distinct_{size}": _distinct(_all_grams(words, size)) for size in (1, 2, 3)},
        "repetition": _mean(map(repetition, words)),
    }


def repetition(words: Sequence[str]) -> float:
    """Share of an answer's 4-grams that stood in it before."""
    distinct = _distinct(_grams(words, 4))
    return 0.0 if distinct is None else 1.0 - distinct


def _distinct(grams: Sequence[Gram]) -> float | None:
    return len(set(grams)) / len(grams) if grams else None


def _all_grams(answers: Iterable[Sequence[str]], size: int) -> list[Gram]:
    return [gram for words in answers for gram in _grams(words, size)]


def _grams(words: Sequence[str], size: int) -> list[Gram]:
    return [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / len(values)


# Pairs worth reading: those that changed sides, and those that the policy moved most.


MOST = 4
"""Pairs of each kind."""


def notable(before: Sequence[PairScore], after: Sequence[PairScore]) -> dict[str, list[int]]:
    """Indices of pairs by kind; the margin is log π(chosen) - log π(rejected), in nats.

    changed: where the margin's sign is another than before, the furthest moved first
    best, worst: where the margin grew most, and where it fell most
    """
    old, new = ([s.margins["logp"] or 0.0 for s in scores] for scores in (before, after))
    moved = [b - a for a, b in zip(old, new, strict=True)]
    order = sorted(range(len(moved)), key=lambda i: -moved[i])
    changed = [i for i in order if (old[i] > 0) != (new[i] > 0)]
    changed.sort(key=lambda i: -abs(moved[i]))
    return {
        "changed": changed[:MOST],
        "best": [i for i in order if moved[i] > 0][:MOST],
        "worst": [i for i in reversed(order) if moved[i] < 0][:MOST],
    }
