"""`smoldpo pairs compare`: two models' answers to the same prompts, ranked as pairs are."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, replace
from pathlib import Path

from smoldpo.pairs.journal import Journal, journal_path
from smoldpo.pairs.prompts import Prompts
from smoldpo.pairs.rank import Ranking
from smoldpo.pairs.rounds import PolicyComparison, compare_policies
from smoldpo.pairs.sample import SamplingSettings, draw_answers
from smoldpo.utils.files import write_json
from smoldpo.utils.threads import computing


def compare_models(
    prompts: Prompts,
    sampling: SamplingSettings,
    ranking: Ranking,
    output: Path | None = None,
    threads: int | None = None,
) -> tuple[PolicyComparison, int]:
    """How the second of two models does against the first, and on how many prompts.

    Args:
        output: where the figures go, the answers beside it; None keeps neither.

    Raises:
        UsageError: the answers beside the output were drawn otherwise.
        SmoldpoError: as models, judges and checks.
    """
    with computing(threads), tempfile.TemporaryDirectory() as folder:
        journal = Journal(journal_path(output or Path(folder) / "compared"))
        drawn = draw_answers(prompts.prompts, sampling, journal)
        theirs, ours = (
            replace(drawn, answers=[[answers[at]] for answers in drawn.answers]) for at in (0, 1)
        )
        found = compare_policies(ranking, drawn.prompts, theirs, ours, sampling)
    if output is not None:
        of = {"models": drawn.models, "prompts": len(drawn.prompts), "settings": drawn.settings}
        weights = dict(zip(ranking.names, ranking.weights, strict=True))
        write_json(output, of | {"seed": sampling.seed, "weights": weights} | asdict(found))
    return found, len(drawn.prompts)
