"""From one score a pair before and after to the record in evaluation.json; no torch here.

    scores -> accuracy by each metric with an interval; the change with an interval and a test
           -> baselines, slices, calibration, drift                        (slices.py)
           -> one sentence                                                 (headline.py)

"Before" and "after" are a policy's start and end, or two models A and B on the same pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from smoldpo.evaluation.headline import explanations, headline, p_in_words, verdict
from smoldpo.evaluation.metrics import METRICS, PairFacts, PairScore, accuracies, mean, wins
from smoldpo.evaluation.schema import (
    Accuracies,
    Accuracy,
    Estimate,
    Evaluation,
    Names,
    PairRow,
)
from smoldpo.evaluation.slices import (
    SlicedAccuracy,
    baselines,
    calibration,
    drift,
    margin_histograms,
    share_with_interval,
)
from smoldpo.evaluation.statistics import LEVEL, PairedTest, holm, mean_interval, paired_test


def analyse(
    before: Sequence[PairScore],
    after: Sequence[PairScore],
    facts: Sequence[PairFacts],
    beta: float,
    seed: int,
    kind: str = "run",
    names: Names | None = None,
    logistic: bool = True,
) -> Evaluation:
    """What evaluation.json holds, but for answers, judges and pairs.

    Args:
        before, after: of the same pairs in the same order, each with a reference or none with one.
        seed: of the bootstrap.
        kind, names: what is compared (schema.Evaluation).
        logistic: whether the loss takes σ(margin) for a probability, as DPO's does; otherwise there
            is nothing to calibrate.
    """
    has_reference = all(s.margins["reward"] is not None for s in (*before, *after))
    metric = "reward" if has_reference else "logp"
    groups = [fact.prompt for fact in facts]
    won = {
        name: (wins(before, name), wins(after, name))
        for name in METRICS
        if has_reference or name != "reward"
    }
    tests = {name: paired_test(*both, groups) for name, both in won.items()}
    p = dict(zip(tests, holm([test.p for test in tests.values()]), strict=True))
    accuracy = {name: _accuracy(*won[name], groups, seed, tests[name], p[name]) for name in won}
    sliced = SlicedAccuracy(metric, before, after, facts)
    rewards = [[beta * (s.margins["reward"] or 0.0) for s in scores] for scores in (before, after)]
    found = Evaluation(
        n=len(after),
        prompts=len(set(groups)),
        beta=beta,
        kind=kind,
        names=names or Names(before="before", after="after"),
        metric=metric,
        level=LEVEL,
        comparisons=len(accuracy),
        correction="Holm",
        before=Accuracies(accuracy=accuracies(before)),
        after=Accuracies(accuracy=accuracies(after)),
        accuracy=dict(accuracy),
        baselines=baselines(after),
        by_length=sliced.by_length(),
        by_length_difference=sliced.by_length_difference(),
        slices=sliced.by_facts(),
        calibration=calibration(after, facts, beta) if has_reference and logistic else None,
        drift=drift(before, after, facts, seed),
        margins=margin_histograms(*rewards) if has_reference else None,
        logp_margins=margin_histograms(
            *([s.logp_margin for s in scores] for scores in (before, after))
        ),
        verdict=verdict(p[metric], accuracy[metric].change.value),
        headline="",
    )
    found.headline, found.explanations = headline(found), explanations(found)
    return found


def pair_rows(
    before: Sequence[PairScore], after: Sequence[PairScore], facts: Sequence[PairFacts]
) -> list[PairRow]:
    """One row a pair: what evaluation.json keeps to compute everything anew."""
    return [
        PairRow(id=new.id, **asdict(fact), before=old, after=new)
        for old, new, fact in zip(before, after, facts, strict=True)
    ]


def _accuracy(
    before: Sequence[float],
    after: Sequence[float],
    groups: Sequence[str],
    seed: int,
    test: PairedTest,
    p_corrected: float,
) -> Accuracy:
    change = [new - old for old, new in zip(before, after, strict=True)]
    return Accuracy(
        before=share_with_interval(before, groups),
        after=share_with_interval(after, groups),
        change=Estimate.of(mean(change), mean_interval(change, groups, seed)),
        improved=test.improved,
        worsened=test.worsened,
        test=test.name,
        p=test.p,
        p_corrected=p_corrected,
        words=p_in_words(p_corrected),
    )
