"""evaluation.json and samples.jsonl: the classes that write these files and read them.

Keys stand in the file in the order of the fields. A field with a default may be absent: it was not
measured, or the run is older than the field.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, field_serializer, model_validator

from smoldpo.evaluation.metrics import PairScore
from smoldpo.types import Prompt
from smoldpo.utils.errors import SmoldpoError

TokenRatio = tuple[str, float | None]
"""A token's text, and log π - log π_ref of the token in nats; None where it is not scored."""


class Record(BaseModel):
    """A part of a file in a run folder."""

    def as_json(self) -> dict[str, Any]:
        """The record as the file has it: without the fields that were not set."""
        return self.model_dump(mode="json", exclude_unset=True)

    @classmethod
    def read(cls, path: Path, advice: str) -> Self:
        """The record that a file holds.

        Raises:
            SmoldpoError: there is none, or it is damaged; `advice` says what to do.
        """
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SmoldpoError(f"{path}: cannot be read ({error}); {advice}") from None


class Estimate(Record):
    """A value with its interval; no bounds where an interval has no meaning."""

    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, value: float, interval: tuple[float, float] | None) -> Self:
        """A value and its interval, or None where there is none."""
        low, high = interval or (None, None)
        return cls(value=value, low=low, high=high)


class Accuracy(Record):
    """The accuracy by one metric before and after, compared pair by pair."""

    before: Estimate
    after: Estimate
    change: Estimate
    improved: int
    worsened: int
    test: str
    p: float | None
    p_corrected: float | None
    words: str


class Accuracies(Record):
    """The accuracy by each metric without an interval; None for a metric that needs a reference."""

    accuracy: dict[str, float | None]


class Group(Record):
    """Accuracy among some of the pairs."""

    name: str = ""
    n: int
    before: float | None = None
    after: Estimate | None


class Balanced(Record):
    """The mean of two groups' accuracies, each counting the same."""

    before: float | None
    after: float


class ByLength(Record):
    """Accuracy by which answer has more tokens; `balanced` is None where one group is empty."""

    metric: str
    chosen_shorter: Group
    chosen_longer: Group
    equal: Group
    balanced: Balanced | None


class LengthBin(Record):
    """Accuracy where chosen is longer than rejected by `low` to `high` tokens."""

    low: int
    high: int
    n: int
    before: float | None = None
    value: float
    low_ci: float | None = None
    high_ci: float | None = None


class Slices(Record):
    """Accuracy by the pairs' source and category."""

    source: list[Group] = []
    category: list[Group] = []


class CalibrationBin(Record):
    """Pairs of alike |margin|: the accuracy that the margin predicts, and the observed one."""

    n: int
    margin: float
    predicted: float
    observed: float
    low: float | None = None
    high: float | None = None


class Calibration(Record):
    """Implicit-reward margins against observed accuracy; `error` is the ECE."""

    error: float
    bins: list[CalibrationBin]


class SideDrift(Record):
    """How far the log-probabilities of the chosen or the rejected answers moved, in nats."""

    before: float
    after: float
    change: Estimate
    per_token: Estimate


class Perplexity(Record):
    before: float
    after: float


class Drift(Record):
    """How far the log-probabilities moved, with an alarm in words where chosen answers fell."""

    chosen: SideDrift
    rejected: SideDrift
    perplexity_chosen: Perplexity
    alarm: str | None = None
    advice: list[str] = []


class Histogram(Record):
    edges: list[float]
    counts: list[int]

    @model_validator(mode="after")
    def _edges_around_counts(self) -> Histogram:
        if len(self.edges) != len(self.counts) + 1:
            raise ValueError("a histogram has one edge more than counts")
        return self


class Margins(Record):
    """The distribution of the pairs' margins before and after."""

    before: Histogram
    after: Histogram


class Answers(Record):
    """Means over a model's sampled answers (answer_metrics.py)."""

    tokens: float
    words: float
    ended: float
    distinct_1: float | None
    distinct_2: float | None
    distinct_3: float | None
    repetition: float


class Alarm(Record):
    """Something that went wrong though the accuracy may have risen, and what helps against it."""

    text: str
    advice: list[str] = []


class AnswerChange(Record):
    """The policy's mean over answers less the reference's, tested prompt by prompt."""

    change: Estimate
    test: str
    p: float


class Generation(Record):
    """Answers of reference and policy to the same prompts, sampled with the same seeds."""

    prompts: int
    temperature: float
    max_new_tokens: int
    reference: Answers
    policy: Answers
    kl_per_token: Estimate | None = None
    ended_change: AnswerChange | None = None
    """Of the share that ended of themselves."""
    repetition_change: AnswerChange | None = None
    alarms: list[Alarm] = []
    """Of answers that no longer end, and of repetition (answer_alarms.py)."""


class WinRate(Record):
    """Wins plus half the ties over n, with Wilson's interval; None without a verdict."""

    value: float | None
    low: float | None = None
    high: float | None = None


class Judgement(Record):
    """How often a judge preferred the policy's answer to the reference's."""

    judge: str
    n: int
    wins: int
    losses: int
    ties: int
    win_rate: WinRate
    p: float | None = None
    """Of the exact sign test, which leaves ties out."""
    disagreement: float | None = None
    """Share of the n verdicts that changed when the answers swapped places."""
    failed: int = 0
    """Verdicts that cannot be understood; they count nowhere else."""
    error: str | None = None
    """Why there is no win rate, where there is none."""


class NotablePair(Record):
    """A pair that moved far, with the log-ratio of every token.

    Margins are log π(chosen) - log π(rejected), in nats.
    """

    id: str
    prompt: Prompt
    chosen: str
    rejected: str
    margin_before: float
    margin_after: float
    chosen_tokens: list[TokenRatio] = []
    rejected_tokens: list[TokenRatio] = []


class Notable(Record):
    """Pairs that changed sides, and those whose margin grew and fell most."""

    changed: list[NotablePair] = []
    best: list[NotablePair] = []
    worst: list[NotablePair] = []


class Names(Record):
    """The titles of the two columns."""

    before: str = "before"
    after: str = "after"


class PairRow(Record):
    """One pair's facts and scores, from which the whole evaluation can be computed again."""

    id: str
    prompt: str = ""
    source: str = ""
    category: str = ""
    before: PairScore | None = None
    after: PairScore | None = None

    @field_serializer("before", "after")
    def _score(self, score: PairScore | None) -> dict[str, Any] | None:
        return None if score is None else score.as_row()


def all_alarms(record: Evaluation | ModelEvaluation) -> list[Alarm]:
    """Every alarm of an evaluation: of the falling chosen side, and of the answers."""
    drift = record.drift if isinstance(record, Evaluation) else None
    fallen = [Alarm(text=drift.alarm, advice=drift.advice)] if drift and drift.alarm else []
    return [*fallen, *(record.generation.alarms if record.generation else [])]


class Evaluation(Record):
    """evaluation.json: a policy before and after training, or two models, on the same pairs."""

    n: int
    prompts: int | None = None
    beta: float | None = None
    kind: str = "run"
    """`run`, or `compare` for two models."""
    names: Names = Names()
    chat_template: dict[str, Any] = {}
    """What the chat template was given besides messages: date, kwargs, tools, documents."""
    metric: str = "reward"
    """The metric that the headline is about."""
    level: float = 0.95
    comparisons: int
    correction: str
    before: Accuracies = Accuracies(accuracy={})
    after: Accuracies = Accuracies(accuracy={})
    accuracy: dict[str, Accuracy | None]
    baselines: dict[str, float | None] = {}
    by_length: ByLength | None = None
    by_length_difference: list[LengthBin] = []
    slices: Slices = Slices()
    calibration: Calibration | None = None
    drift: Drift | None = None
    margins: Margins | None = None
    """Of implicit rewards, in β times nats."""
    logp_margins: Margins | None = None
    """log π(chosen) - log π(rejected), in nats."""
    verdict: Literal["change", "no evidence", "worse"]
    headline: str
    explanations: list[str] = []
    generation: Generation | None = None
    judges: list[Judgement] = []
    notable: Notable = Notable()
    pairs: list[PairRow] = []


class ModelEvaluation(Record):
    """What `smoldpo evaluate` finds about one model alone."""

    n: int
    prompts: int
    accuracy: dict[str, float | None]
    level: float
    intervals: dict[str, Estimate | None]
    chat_template: dict[str, Any] = {}
    baselines: dict[str, float | None]
    by_length: ByLength
    slices: Slices
    generation: Generation | None = None
    judges: list[Judgement] = []
    notable: Notable = Notable()


SAMPLE_PROMPT = "sample_prompt"
"""The id of the one sample that was not drawn from the held-out pairs, nor at random."""


class Sample(Record):
    """A line of samples.jsonl: one prompt answered by both models."""

    id: str = ""
    prompt: Prompt
    reference: str
    policy: str
    reference_ended: bool | None = None
    policy_ended: bool | None = None
    reference_tokens: list[TokenRatio] = []
    policy_tokens: list[TokenRatio] = []
