"""Accuracy by length, source, category and margin, and how far the model moved; without torch.

Many preference sets prefer the longer answer, so an accuracy is read beside the accuracy of picking
the longer, and beside the accuracy among pairs where chosen is the shorter one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from smoldpo.evaluation.metrics import METRICS, PairFacts, PairScore, accuracies, mean, wins
from smoldpo.evaluation.schema import (
    Balanced,
    ByLength,
    Calibration,
    CalibrationBin,
    Drift,
    Estimate,
    Group,
    Histogram,
    LengthBin,
    Margins,
    ModelEvaluation,
    Perplexity,
    SideDrift,
    Slices,
)
from smoldpo.evaluation.statistics import LEVEL, effective_size, mean_interval, wilson

MAX_BINS = 10
MIN_BIN_SIZE = 8
"""Fewer pairs than this in a bin say nothing; there are fewer bins then."""
MAX_SLICES = 20
HISTOGRAM_EDGES = 42

ALARM_DROP = 0.02
"""Nats per chosen token: a significant fall beyond it raises the alarm; 2% in perplexity."""
ADVICE = [
    "a smaller learning_rate or fewer epochs: the fall grows with how far the policy moves",
    "another beta: a larger one holds the policy closer to the reference; a smaller one asks for "
    "smaller margins before a pair counts as learnt, and often needs fewer steps",
    "rpo_alpha 1, which adds the likelihood of the chosen answers to the loss (or loss_type "
    "sigmoid,sft)",
    "a loss made against the fall (docs/losses.md): loss_type dpop makes every fall of a chosen "
    "answer cost, apo_zero draws chosen up and rejected down each on its own",
    "pairs whose two answers differ more: nearly identical ones share the tokens that are pushed "
    "down",
]


def share_with_interval(scores: Sequence[float], groups: Sequence[str]) -> Estimate:
    """The mean of 0, ½, 1 scores with Wilson's interval; None where all tie."""
    value = mean(scores)
    if all(score == 0.5 for score in scores):
        return Estimate.of(value, None)
    size = effective_size(scores, groups)
    return Estimate.of(value, wilson(value * size, size))


def baselines(scores: Sequence[PairScore]) -> dict[str, float | None]:
    """Accuracy of picking the answer with more tokens, with fewer, and of a coin."""
    share = mean([_chosen_is_longer(score) for score in scores])
    return {"longer": share, "shorter": 1 - share, "coin": 0.5}


def _chosen_is_longer(score: PairScore) -> float:
    difference = score.chosen_tokens - score.rejected_tokens
    return 0.5 if difference == 0 else float(difference > 0)


class SlicedAccuracy:
    """Accuracy by one metric, before (if any) and after, over slices of the pairs."""

    def __init__(
        self,
        metric: str,
        before: Sequence[PairScore] | None,
        after: Sequence[PairScore],
        facts: Sequence[PairFacts],
    ):
        self.metric, self.scores, self.facts = metric, after, facts
        self.before = None if before is None else wins(before, metric)
        self.after = wins(after, metric)

    def _group(self, indices: Sequence[int], **name: str) -> Group:
        """Number of pairs, and accuracy before and after, of the pairs at these indices."""
        if not len(indices):
            return Group(**name, n=0, before=None, after=None)
        prompts = [self.facts[i].prompt for i in indices]
        return Group(
            **name,
            n=len(indices),
            before=None if self.before is None else mean([self.before[i] for i in indices]),
            after=share_with_interval([self.after[i] for i in indices], prompts),
        )

    def by_length(self) -> ByLength:
        """Pairs where chosen has fewer tokens, more, or as many; and the mean of the first two."""
        shorter, longer, equal = (
            self._group([i for i, s in enumerate(self.scores) if _chosen_is_longer(s) == value])
            for value in (0.0, 1.0, 0.5)
        )
        balanced = None
        if shorter.after and longer.after:
            before = None
            if shorter.before is not None and longer.before is not None:
                before = (shorter.before + longer.before) / 2
            after = (shorter.after.value + longer.after.value) / 2
            balanced = Balanced(before=before, after=after)
        return ByLength(
            metric=self.metric,
            chosen_shorter=shorter,
            chosen_longer=longer,
            equal=equal,
            balanced=balanced,
        )

    def by_length_difference(self) -> list[LengthBin]:
        """Bins of equal size along chosen minus rejected, in tokens."""
        difference = [s.chosen_tokens - s.rejected_tokens for s in self.scores]
        found = []
        for indices in _bins(difference):
            group = self._group(indices)
            assert group.after is not None
            found.append(
                LengthBin(
                    low=difference[indices[0]],
                    high=difference[indices[-1]],
                    n=group.n,
                    before=group.before,
                    value=group.after.value,
                    low_ci=group.after.low,
                    high_ci=group.after.high,
                )
            )
        return found

    def by_facts(self) -> Slices:
        """Slices by source and by category."""
        return Slices(
            source=self._by_fact([fact.source for fact in self.facts]),
            category=self._by_fact([fact.category for fact in self.facts]),
        )

    def _by_fact(self, values: Sequence[str]) -> list[Group]:
        """The largest slice first; none where all pairs are in one."""
        found: dict[str, list[int]] = {}
        for index, value in enumerate(values):
            found.setdefault(value or "(none)", []).append(index)
        if len(found) < 2:
            return []
        largest = sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))
        return [self._group(indices, name=name) for name, indices in largest[:MAX_SLICES]]


def describe(scores: Sequence[PairScore], facts: Sequence[PairFacts]) -> ModelEvaluation:
    """What can be said about one model alone: accuracies with intervals, baselines, slices."""
    groups = [fact.prompt for fact in facts]
    found = accuracies(scores)
    known = [name for name in METRICS if found[name] is not None]
    sliced = SlicedAccuracy("reward" if "reward" in known else "logp", None, scores, facts)
    return ModelEvaluation(
        n=len(scores),
        prompts=len(set(groups)),
        accuracy=found,
        level=LEVEL,
        intervals={
            name: share_with_interval(wins(scores, name), groups) if name in known else None
            for name in METRICS
        },
        baselines=baselines(scores),
        by_length=sliced.by_length(),
        slices=sliced.by_facts(),
    )


def calibration(
    scores: Sequence[PairScore], facts: Sequence[PairFacts], beta: float
) -> Calibration:
    """Implicit-reward margins against observed accuracy, in bins of equal size by |margin|.

    The reward model that DPO implies gives the side it prefers a probability of σ(β|margin|)
    (Rafailov et al. 2023, eq. 1 with the rewards of eq. 5). `error` is the expected calibration
    error: the mean over pairs of |predicted - observed| of their bin (Naeini et al. 2015).
    """
    right = wins(scores, "reward")
    margins = [beta * abs(score.margins["reward"] or 0.0) for score in scores]
    bins = []
    for indices in _bins(margins):
        prompts = [facts[i].prompt for i in indices]
        observed = share_with_interval([right[i] for i in indices], prompts)
        bins.append(
            CalibrationBin(
                n=len(indices),
                margin=mean([margins[i] for i in indices]),
                predicted=mean([1 / (1 + math.exp(-margins[i])) for i in indices]),
                observed=observed.value,
                low=observed.low,
                high=observed.high,
            )
        )
    error = sum(b.n * abs(b.predicted - b.observed) for b in bins) / len(scores)
    return Calibration(error=error, bins=bins)


def margin_histograms(before: Sequence[float], after: Sequence[float]) -> Margins:
    """Histograms of margins before and after over the same edges; the end bins are open."""
    reach = float(np.percentile(np.abs([*before, *after]), 99)) or 1.0
    edges = np.linspace(-reach, reach, HISTOGRAM_EDGES)
    rounded = [round(float(edge), 6) for edge in edges]

    def histogram(values: Sequence[float]) -> Histogram:
        counts = np.histogram(np.clip(values, -reach, reach), edges)[0].tolist()
        return Histogram(edges=rounded, counts=counts)

    return Margins(before=histogram(before), after=histogram(after))


def _bins(values: Sequence[float]) -> list[list[int]]:
    """Indices in the order of their values, cut into up to MAX_BINS parts of nearly equal size."""
    order = sorted(range(len(values)), key=values.__getitem__)
    count = max(1, min(MAX_BINS, len(order) // MIN_BIN_SIZE))
    return [part.tolist() for part in np.array_split(np.array(order), count) if len(part)]


def drift(
    before: Sequence[PairScore], after: Sequence[PairScore], facts: Sequence[PairFacts], seed: int
) -> Drift:
    """Mean log-probabilities before and after, per answer and per token, with intervals by prompt.

    DPO rewards the difference alone: both answers may become less likely if rejected falls faster.
    Then the accuracy rises while the model becomes less likely to say what people preferred;
    `alarm` says so. Log-probabilities are in nats, summed over an answer's tokens.
    """
    groups = [fact.prompt for fact in facts]
    tokens = [score.chosen_tokens for score in after]
    old, new = ([score.chosen_logp for score in scores] for scores in (before, after))
    perplexity = Perplexity(before=_perplexity(old, tokens), after=_perplexity(new, tokens))
    chosen = _side_drift(old, new, tokens, groups, seed)
    rejected = _side_drift(
        [score.rejected_logp for score in before],
        [score.rejected_logp for score in after],
        [score.rejected_tokens for score in after],
        groups,
        seed,
    )
    alarm = _alarm(chosen, rejected, perplexity)
    advice = ADVICE if alarm else []
    return Drift(
        chosen=chosen, rejected=rejected, perplexity_chosen=perplexity, alarm=alarm, advice=advice
    )


def _side_drift(
    old: Sequence[float],
    new: Sequence[float],
    tokens: Sequence[int],
    groups: Sequence[str],
    seed: int,
) -> SideDrift:
    change = [b - a for a, b in zip(old, new, strict=True)]
    per_token = math.fsum(change) / sum(tokens)
    return SideDrift(
        before=mean(old),
        after=mean(new),
        change=Estimate.of(mean(change), mean_interval(change, groups, seed)),
        per_token=Estimate.of(per_token, mean_interval(change, groups, seed, tokens)),
    )


def _perplexity(logps: Sequence[float], tokens: Sequence[int]) -> float:
    """exp of the mean negative log-probability of a token."""
    return math.exp(min(700.0, -math.fsum(logps) / sum(tokens)))


def _alarm(chosen: SideDrift, rejected: SideDrift, perplexity: Perplexity) -> str | None:
    fall = chosen.per_token
    if not (fall.value < -ALARM_DROP and fall.high is not None and fall.high < 0):
        return None
    text = (
        f"The chosen answers became less likely: {chosen.change.value:+.1f} nats per answer, "
        f"{fall.value:+.3f} per token (perplexity {perplexity.before:.2f} before, "
        f"{perplexity.after:.2f} after)."
    )
    if rejected.per_token.value < fall.value:
        text += (
            " The rejected ones fell further, so the accuracy can rise all the same; but the "
            "policy now puts more weight on answers that are neither."
        )
    return text
