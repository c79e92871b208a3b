"""What evaluation.json holds, as its readers see it. Numbers that could not be had are None.

Of the rows of single pairs only the ids are read here: they tell whether two runs may be compared.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, model_validator

Number = float | None
TokenRatio = tuple[str, Number]
"""A token's text, and log π - log π_ref of it in nats."""


class Interval(BaseModel):
    """An estimate and its interval, which is absent where it means nothing."""

    value: Number
    low: Number = None
    high: Number = None


class Accuracy(BaseModel):
    """One way of preferring, before and after, compared pair by pair."""

    before: Interval
    after: Interval
    change: Interval
    improved: int
    worsened: int
    test: str
    p: Number
    p_corrected: Number
    words: str


class Group(BaseModel):
    """Accuracy among some of the pairs."""

    name: str = ""
    n: int
    before: Number = None
    after: Interval | None


class Balanced(BaseModel):
    """The mean of two groups' accuracies, each counting the same."""

    before: Number
    after: Number


class ByLength(BaseModel):
    """Accuracy by which of the two answers is the longer."""

    metric: str
    chosen_shorter: Group
    chosen_longer: Group
    equal: Group
    balanced: Balanced | None
    """None where all pairs are of one kind."""


class LengthBin(BaseModel):
    """Accuracy where chosen is longer than rejected by `low` to `high` tokens."""

    low: float
    high: float
    n: int
    before: Number = None
    value: Number
    low_ci: Number = None
    high_ci: Number = None


class Slices(BaseModel):
    """Accuracy by where pairs come from and what they are about."""

    source: list[Group] = []
    category: list[Group] = []


class CalibrationBin(BaseModel):
    """Pairs of alike |margin|: how sure the policy is, and how often it is right."""

    n: int
    margin: Number
    predicted: Number
    observed: Number
    low: Number = None
    high: Number = None


class Calibration(BaseModel):
    """The implicit reward's margins against what came true."""

    error: Number
    bins: list[CalibrationBin]


class SideDrift(BaseModel):
    """How far one side's log-probability moved."""

    before: Number
    after: Number
    change: Interval
    per_token: Interval


class Perplexity(BaseModel):
    before: Number
    after: Number


class Drift(BaseModel):
    """How far the log-probabilities moved, and an alarm in words where they should not have."""

    chosen: SideDrift
    rejected: SideDrift
    perplexity_chosen: Perplexity
    alarm: str | None = None
    advice: list[str] = []


class Histogram(BaseModel):
    edges: list[float]
    counts: list[float]

    @model_validator(mode="after")
    def _edges_around_counts(self) -> Histogram:
        if len(self.edges) != len(self.counts) + 1:
            raise ValueError("a histogram has one edge more than counts")
        return self


class Margins(BaseModel):
    """How the pairs' margins are spread, before and after."""

    before: Histogram
    after: Histogram


class Answers(BaseModel):
    """What a model's sampled answers are like, as means over them."""

    tokens: Number
    words: Number
    ended: Number
    distinct_1: Number
    distinct_2: Number
    distinct_3: Number
    repetition: Number


class Generation(BaseModel):
    """Answers of reference and policy to the same prompts, sampled with the same seeds."""

    prompts: int
    temperature: float
    max_new_tokens: int
    reference: Answers
    policy: Answers
    kl_per_token: Interval | None = None


class Judgement(BaseModel):
    """How often a judge put the policy's answer over the reference's."""

    judge: str
    n: int
    wins: int
    losses: int
    ties: int
    win_rate: Interval
    p: Number = None
    disagreement: Number = None
    failed: int = 0
    error: str | None = None
    """Why there is no win rate, where there is none."""


class NotablePair(BaseModel):
    """A pair worth looking at, with what the policy made of every token.

    Margins are log π(chosen) - log π(rejected), in nats.
    """

    id: str
    prompt: str | list[dict]
    chosen: str
    rejected: str
    margin_before: Number
    margin_after: Number
    chosen_tokens: list[TokenRatio] = []
    rejected_tokens: list[TokenRatio] = []


class Notable(BaseModel):
    changed: list[NotablePair] = []
    best: list[NotablePair] = []
    worst: list[NotablePair] = []


class Names(BaseModel):
    """The titles of the two columns."""

    before: str = "before"
    after: str = "after"


class PairRow(BaseModel):
    id: str


class Evaluation(BaseModel):
    """The whole file."""

    n: int
    beta: Number = None
    prompts: int | None = None
    kind: str = "run"
    metric: str = "reward"
    """The accuracy that the headline is about."""
    names: Names = Names()
    headline: str
    explanations: list[str] = []
    verdict: Literal["change", "no evidence", "worse"]
    level: float = 0.95
    comparisons: int
    correction: str
    accuracy: dict[str, Accuracy | None]
    """By each way of preferring; None for one that needs a reference where there was none."""
    baselines: dict[str, Number] = {}
    by_length: ByLength | None = None
    by_length_difference: list[LengthBin] = []
    slices: Slices = Slices()
    calibration: Calibration | None = None
    drift: Drift | None = None
    margins: Margins | None = None
    """Of implicit rewards, in β times nats."""
    logp_margins: Margins | None = None
    """log π(chosen) - log π(rejected), in nats."""
    generation: Generation | None = None
    judges: list[Judgement] = []
    notable: Notable = Notable()
    pairs: list[PairRow] = []


SAMPLE_PROMPT = "sample_prompt"
"""The id of the one sample that was not drawn from the held-out pairs, nor at random."""


class Sample(BaseModel):
    """A line of samples.jsonl: one prompt answered by both models."""

    id: str = ""
    prompt: str | list[dict]
    reference: str
    policy: str
    reference_ended: bool | None = None
    policy_ended: bool | None = None
    reference_tokens: list[TokenRatio] = []
    policy_tokens: list[TokenRatio] = []
