"""Two models side by side: answers to the same prompts, judges, token-by-token differences.

load both -> both answer, with the same random numbers -> both score, token by token,
the answers (log π - log π_ref: samples.jsonl, KL) and the pairs that moved most (evaluation.json)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smoldpo.engine.autotune import KernelChoice
from smoldpo.engine.logprobs import token_logps
from smoldpo.engine.precision import cast_frozen
from smoldpo.evaluation.answer_alarms import answer_alarms
from smoldpo.evaluation.answer_metrics import answer_metrics
from smoldpo.evaluation.judges.base import Judge, compare_all, judgement
from smoldpo.evaluation.metrics import PairScore
from smoldpo.evaluation.schema import (
    Estimate,
    Evaluation,
    Generation,
    Judgement,
    ModelEvaluation,
    Notable,
    NotablePair,
    Sample,
    TokenRatio,
)
from smoldpo.evaluation.statistics import mean_interval
from smoldpo.models.generate import Answer, generate_answers
from smoldpo.types import Advance, Completion, PreferencePair, Prompt, TokenizedPair
from smoldpo.utils import progress
from smoldpo.utils.errors import SmoldpoError
from smoldpo.utils.memory import trim_memory

GENERATION_BATCH_SIZE = 8
MAX_NOTABLE = 4
"""Notable pairs of each kind."""


@dataclass(frozen=True)
class EvalPrompt:
    """A prompt to be answered, as text and as tokens."""

    id: str
    prompt: Prompt
    ids: tuple[int, ...]


@dataclass
class SideBySide:
    """The rows of samples.jsonl, and the parts of evaluation.json that need the models."""

    samples: list[Sample] = field(default_factory=list)
    generation: Generation | None = None
    judges: list[Judgement] = field(default_factory=list)
    notable: Notable = field(default_factory=Notable)

    def add_to(self, evaluation: Evaluation | ModelEvaluation) -> None:
        """Set these parts of a record."""
        evaluation.generation, evaluation.judges = self.generation, self.judges
        evaluation.notable = self.notable


@dataclass(frozen=True)
class GenerationSettings:
    """How the answers are drawn."""

    max_new_tokens: int
    temperature: float
    seed: int


def choose_prompts(
    pairs: Sequence[PreferencePair],
    tokenized: Sequence[TokenizedPair],
    count: int,
    max_positions: int | None,
    max_new_tokens: int,
) -> list[EvalPrompt]:
    """Up to `count` distinct prompts, evenly over the pairs, that leave room for their answers."""
    distinct: dict[tuple[int, ...], EvalPrompt] = {}
    for pair, tokens in zip(pairs, tokenized, strict=True):
        if max_positions is None or len(tokens.prompt_ids) + max_new_tokens <= max_positions:
            prompt = EvalPrompt(pair.id, pair.prompt, tokens.prompt_ids)
            distinct.setdefault(tokens.prompt_ids, prompt)
    found = list(distinct.values())
    if count and not found:
        progress.say(
            f"no held-out prompt leaves room for {max_new_tokens:,} tokens in the model's "
            f"{max_positions:,} positions: none is answered"
        )
    count = min(count, len(found))
    return [found[number * len(found) // count] for number in range(count)]


def most_moved(before: Sequence[PairScore], after: Sequence[PairScore]) -> dict[str, list[int]]:
    """Indices of the notable pairs by kind; the margin is log π(chosen) - log π(rejected), in nats.

    changed: where the margin's sign is another than before, the furthest moved first
    best, worst: where the margin grew most, and where it fell most
    """
    old, new = ([score.logp_margin for score in scores] for scores in (before, after))
    moved = [b - a for a, b in zip(old, new, strict=True)]
    order = sorted(range(len(moved)), key=lambda i: -moved[i])
    changed = [i for i in order if (old[i] > 0) != (new[i] > 0)]
    changed.sort(key=lambda i: -abs(moved[i]))
    return {
        "changed": changed[:MAX_NOTABLE],
        "best": [i for i in order if moved[i] > 0][:MAX_NOTABLE],
        "worst": [i for i in reversed(order) if moved[i] < 0][:MAX_NOTABLE],
    }


@dataclass(frozen=True)
class MovedPair:
    """A notable pair of one kind, still without the log-ratios of its tokens."""

    kind: str
    pair: PreferencePair
    tokenized: TokenizedPair
    before: float
    after: float


def moved_pairs(
    pairs: Sequence[PreferencePair],
    tokenized: Sequence[TokenizedPair],
    before: Sequence[PairScore],
    after: Sequence[PairScore],
) -> list[MovedPair]:
    """The pairs of `most_moved`."""
    return [
        MovedPair(kind, pairs[i], tokenized[i], before[i].logp_margin, after[i].logp_margin)
        for kind, indices in most_moved(before, after).items()
        for i in indices
    ]


@dataclass(frozen=True)
class Comparison:
    """Reference and policy, loaded to answer prompts and to be compared token by token.

    Attributes:
        load_reference: gives the reference.
        load_policy: gives the policy, which may be made of the reference that it is given; both
            models will compute in `dtype`.
        sample: a prompt that both answer greedily; it is in no measure.
    """

    load_reference: Callable[[], PreTrainedModel]
    load_policy: Callable[[PreTrainedModel], PreTrainedModel]
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype
    kernels: KernelChoice
    settings: GenerationSettings
    prompts: Sequence[EvalPrompt]
    sample: EvalPrompt | None
    moved: Sequence[MovedPair]

    @property
    def all_prompts(self) -> list[EvalPrompt]:
        """The prompts, and the sample prompt after them."""
        return [*self.prompts, *([self.sample] if self.sample else [])]

    @property
    def units(self) -> int:
        """How far `run` advances."""
        return 2 * (2 * len(self.all_prompts) + len(self.moved))

    def run(self, judges: Sequence[Judge], advance: Advance) -> SideBySide:
        """Load, answer, score, and let the judges compare."""
        prompts, measured = self.all_prompts, len(self.prompts)  # the sample is not measured
        if not self.units:
            return SideBySide()
        trim_memory()  # what evaluation kept for its next batch
        reference = cast_frozen(self.load_reference(), self.dtype)
        theirs = self._answers(reference, advance)
        trim_memory()
        policy = cast_frozen(self.load_policy(reference), self.dtype, share_with=reference)
        ours = self._answers(policy, advance)
        pairs = [  # the policy's answer as chosen
            TokenizedPair(prompt.id, prompt.ids, a.ids, b.ids)
            for prompt, a, b in zip(prompts, ours, theirs, strict=True)
        ] + [moved.tokenized for moved in self.moved]
        logps = [token_logps(model, pairs, self.kernels, advance) for model in (policy, reference)]
        del reference, policy
        ratios = [
            (_differences(new[0], old[0]), _differences(new[1], old[1]))
            for new, old in zip(*logps, strict=True)
        ]
        with_texts = partial(token_ratios, self.tokenizer)
        tokens = [
            (with_texts(pair.completions[0], a), with_texts(pair.completions[1], b))
            for pair, (a, b) in zip(pairs, ratios, strict=True)
        ]
        samples = [
            Sample(
                id=prompt.id,
                prompt=prompt.prompt,
                reference=b.text,
                policy=a.text,
                reference_ended=b.ended,
                policy_ended=a.ended,
                reference_tokens=reference_tokens,
                policy_tokens=policy_tokens,
            )
            for prompt, a, b, (policy_tokens, reference_tokens) in zip(
                prompts, ours, theirs, tokens[: len(prompts)], strict=True
            )
        ]
        ours, theirs = ours[:measured], theirs[:measured]
        generation = None
        if measured:
            most, seed = self.settings.max_new_tokens, self.settings.seed
            ended, repeats, alarms = answer_alarms(ours, theirs, most, seed)
            generation = Generation(
                prompts=measured,
                temperature=self.settings.temperature,
                max_new_tokens=self.settings.max_new_tokens,
                reference=answer_metrics(theirs),
                policy=answer_metrics(ours),
                kl_per_token=self._kl([policy for policy, _ in ratios[:measured]]),
                ended_change=ended,
                repetition_change=repeats,
                alarms=alarms,
            )
        judgements = self.judge(judges, ours, theirs, lambda: advance(0)) if measured else []
        return SideBySide(samples, generation, judgements, self._notable(tokens[len(prompts) :]))

    def _answers(self, model: PreTrainedModel, advance: Advance) -> list[Answer]:
        def answer(prompts: Sequence[EvalPrompt], temperature: float) -> list[Answer]:
            return generate_answers(
                model,
                self.tokenizer,
                [prompt.ids for prompt in prompts],
                max_new_tokens=self.settings.max_new_tokens,
                temperature=temperature,
                seed=self.settings.seed,
                batch_size=GENERATION_BATCH_SIZE,
                advance=advance,
            )

        answers = answer(self.prompts, self.settings.temperature) if self.prompts else []
        return answers + (answer([self.sample], 0.0) if self.sample else [])

    def _kl(self, ratios: Sequence[Sequence[float]]) -> Estimate | None:
        """KL(π || π_ref) per token: the mean of log π - log π_ref over tokens that π itself drew.

        Only answers drawn at temperature 1 come from π; for others there is no estimate.
        """
        if self.settings.temperature != 1:
            return None
        sums, tokens = [math.fsum(row) for row in ratios], [len(row) for row in ratios]
        groups = [prompt.id for prompt in self.prompts]
        interval = mean_interval(sums, groups, self.settings.seed, tokens)
        return Estimate.of(math.fsum(sums) / sum(tokens), interval)

    def judge(
        self,
        judges: Sequence[Judge],
        ours: Sequence[Answer],
        theirs: Sequence[Answer],
        check: Callable[[], None],
    ) -> list[Judgement]:
        """What each judge makes of the policy's answers (ours) and the reference's.

        Where a judge fails, its `error` says why: a run does not end on a judge out of reach.
        """
        prompts = [prompt.prompt for prompt in self.prompts]
        texts = ([answer.text for answer in side] for side in (ours, theirs))
        a, b = texts
        found = []
        for judge in judges:
            with progress.bar(f"judge {judge.name}", len(prompts)) as advance:

                def judged(units: int, advance: Advance = advance) -> None:
                    advance(units)
                    check()  # a slow judge is no reason not to stop

                try:
                    found.append(judgement(judge.name, compare_all(judge, prompts, a, b, judged)))
                except SmoldpoError as error:
                    progress.say(f"judge {judge.name}: {error}; its win rate is missing")
                    found.append(judgement(judge.name, []))
                    found[-1].error = str(error)
        return found

    def _notable(self, tokens: Sequence[tuple[list[TokenRatio], list[TokenRatio]]]) -> Notable:
        found: dict[str, list[NotablePair]] = {"changed": [], "best": [], "worst": []}
        for moved, (chosen, rejected) in zip(self.moved, tokens, strict=True):
            found[moved.kind].append(
                NotablePair(
                    id=moved.pair.id,
                    prompt=moved.pair.prompt,
                    chosen=moved.pair.chosen,
                    rejected=moved.pair.rejected,
                    margin_before=moved.before,
                    margin_after=moved.after,
                    chosen_tokens=chosen,
                    rejected_tokens=rejected,
                )
            )
        return Notable(**found)


def token_ratios(
    tokenizer: PreTrainedTokenizerBase, completion: Completion, values: Sequence[float]
) -> list[TokenRatio]:
    """(text, value) of each token; parts of one character are joined, their values added.

    `values` are of the scored tokens; the others have none.
    """
    found: list[TokenRatio] = []
    waiting: list[int] = []
    total = 0.0
    left = iter(values)
    tokens = list(zip(completion.ids, completion.scored, strict=True))
    for (token, scored), (_, next_scored) in zip(tokens, [*tokens[1:], (0, None)], strict=True):
        waiting.append(token)
        total += next(left) if scored else 0.0
        text = str(tokenizer.decode(waiting, clean_up_tokenization_spaces=False))
        if "\ufffd" not in text or len(waiting) >= 4 or scored != next_scored:
            found.append((text, round(total, 4) if scored else None))
            waiting, total = [], 0.0
    return found


def _differences(new: Sequence[float], old: Sequence[float]) -> list[float]:
    return [b - a for a, b in zip(old, new, strict=True)]
