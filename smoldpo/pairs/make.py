"""`smoldpo pairs make`: prompts in, answers drawn and ranked, pairs out, each with what made it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smoldpo._version import __version__
from smoldpo.data.convert import convert
from smoldpo.data.schemas import Unreadable
from smoldpo.data.schemas.cells import refuse_printed
from smoldpo.evaluation.judges.base import Judge, Verdict
from smoldpo.evaluation.metrics import mean
from smoldpo.pairs.journal import Journal, journal_path
from smoldpo.pairs.prompts import AskedPrompt, Prompts
from smoldpo.pairs.rank import BEST_WORST, Compared, Ranking, Score, choose_pairs
from smoldpo.pairs.sample import DrawnAnswers, SamplingSettings, draw_answers
from smoldpo.types import PreferencePair
from smoldpo.utils import progress
from smoldpo.utils.errors import DataError, UsageError
from smoldpo.utils.threads import computing

PRINTED = "reads as messages"
"""Of a pair: an answer that a reader would take for messages in print."""


class NoPairsError(DataError):
    """No two answers make a pair; the text says why."""


@dataclass(frozen=True)
class PairChoice:
    """Which answers make pairs; see `choose_pairs`."""

    how: str = BEST_WORST
    margin: float = 0.0
    near_identical: float = 0.95


@dataclass
class MadePairs:
    """What was made of prompts, for people and programs."""

    output: Path
    prompts: int
    repeated_prompts: int
    prompts_left_out: dict[str, int]
    answers: int
    pairs: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    means: dict[str, float] = field(default_factory=dict)
    """By judge and check, of all answers; of a check the share that passes."""
    passing: float = 0.0
    """Share of the answers that pass all checks."""
    disagreement: dict[str, float] = field(default_factory=dict)
    """By judge that is asked in both orders: how often it disagreed with itself."""

    def as_dict(self) -> dict[str, Any]:
        """What --json prints."""
        return vars(self) | {"output": str(self.output)}


def make_pairs(
    prompts: Prompts,
    output: Path,
    sampling: SamplingSettings,
    ranking: Ranking,
    choice: PairChoice | None = None,
    *,
    source: str | None = None,
    overwrite: bool = False,
    threads: int | None = None,
) -> MadePairs:
    """Draw, rank, and write the pairs to `output`, whole or not at all.

    Answers and verdicts that an earlier call left in the journal beside `output` are taken as they
    are; a call that was interrupted goes on with the same command.

    Args:
        source: the pairs' `source`; by default "made:" and the models' names.
        overwrite: replace the output, and answers that were drawn otherwise.

    Raises:
        UsageError: the output exists, or its answers were drawn otherwise.
        NoPairsError: no pair is left, and why.
        SmoldpoError: as models, judges and checks.
    """
    if output.exists() and not overwrite:
        raise UsageError(f"--output {output}: exists; give another name, or --overwrite")
    choice = choice or PairChoice()
    with computing(threads):
        journal = Journal(journal_path(output))
        drawn = draw_answers(prompts.prompts, sampling, journal, overwrite)
        made = _account(prompts, drawn, output)
        source = source or f"made:{','.join(sampling.models)}"
        found = _rank_all(drawn, ranking, journal, made)
    pairs, rows = [], {}
    dropped: Counter[str] = Counter()
    for number, (asked, scores) in enumerate(zip(drawn.prompts, found, strict=True)):
        answers = drawn.answers[number]
        texts = [drawn_answer.answer.text for drawn_answer in answers]
        chosen = choose_pairs(texts, scores, **vars(choice))
        dropped.update(chosen.dropped)
        for better, worse in chosen.pairs:
            pair = _pair(asked, texts[better], texts[worse], source)
            try:
                refuse_printed(pair)
            except Unreadable:
                dropped[PRINTED] += 1
                continue
            pairs.append(pair)
            rows[pair.id] = provenance(drawn, number, (better, worse), scores, ranking, sampling)
    made.dropped, made.pairs = dict(dropped), len(pairs)
    if not pairs:
        reasons = ", ".join(f"{n:,} {why}" for why, n in dropped.items())
        raise NoPairsError(
            f"no pair is left of {made.prompts:,} prompts (dropped: {reasons}); the answers stay "
            f"in {journal.path}; ask for more with --num-answers, or for less with other checks",
            file=str(output),
        )
    convert(pairs, output, extra=lambda pair: {"provenance": rows[pair.id]})
    return made


def _pair(asked: AskedPrompt, chosen: str, rejected: str, source: str) -> PreferencePair:
    return PreferencePair(
        asked.prompt,
        chosen,
        rejected,
        asked.file,
        asked.row,
        source=source,
        arguments=asked.arguments,
    )


def provenance(
    drawn: DrawnAnswers,
    number: int,
    both: tuple[int, int],
    scores: Sequence[Score],
    ranking: Ranking,
    sampling: SamplingSettings,
) -> dict[str, Any]:
    """All that the pair of a prompt was made of and by, so that it can be made again."""
    answers = drawn.answers[number]
    sides = {
        side: drawn.models[answers[at].model]
        | {"number": answers[at].number, "ended": answers[at].answer.ended}
        | {"score": round(scores[at].total, 6), "scores": scores[at].parts}
        for side, at in zip(("chosen", "rejected"), both, strict=True)
    }
    weights = dict(zip(ranking.names, ranking.weights, strict=True))
    settings = drawn.settings | {"seed": sampling.seed, "num_answers": sampling.num_answers}
    return sides | {"settings": settings, "weights": weights, "smoldpo": __version__}


def _account(prompts: Prompts, drawn: DrawnAnswers, output: Path) -> MadePairs:
    left_out = {
        "unreadable": prompts.unreadable,
        "too long": drawn.too_long,
        "refused by the chat template": drawn.refused,
    }
    return MadePairs(
        output,
        len(drawn.prompts),
        prompts.repeated,
        {why: n for why, n in left_out.items() if n},
        sum(map(len, drawn.answers)),
    )


def _rank_all(
    drawn: DrawnAnswers, ranking: Ranking, journal: Journal, made: MadePairs
) -> list[list[Score]]:
    """Every answer's score, and what the account says of all of them."""
    verdicts = [_judge_all(judge, drawn, ranking, journal) for judge in ranking.judges]
    found = []
    for at, (asked, answers) in enumerate(zip(drawn.prompts, drawn.answers, strict=True)):
        of_judges = [by_prompt[at] for by_prompt in verdicts]
        found.append(ranking.scores(asked.prompt, [a.given for a in answers], of_judges))
    every = [score for scores in found for score in scores]
    made.means = {
        name: round(mean([score.parts[name] for score in every]), 6) for name in ranking.names
    }
    made.passing = round(mean([float(score.passes) for score in every]), 6)
    for judge, by_prompt in zip(ranking.judges, verdicts, strict=True):
        asked_twice = [
            float(compared.verdict.disagreed)
            for compareds in by_prompt
            for compared in compareds
            if compared.verdict.disagreed is not None
        ]
        if asked_twice:
            made.disagreement[judge.name] = round(mean(asked_twice), 6)
    return found


def _judge_all(
    judge: Judge, drawn: DrawnAnswers, ranking: Ranking, journal: Journal
) -> list[list[Compared]]:
    """A judge's verdicts on each prompt's answers; those in the journal are not asked for again."""
    known = {
        (row["key"], tuple(row["texts"])): row["verdicts"]
        for row in journal.rows
        if row.get("judge") == judge.name
    }
    found = []
    with progress.bar(f"judge {judge.name}", len(drawn.prompts)) as advance:
        for asked, answers in zip(drawn.prompts, drawn.answers, strict=True):
            texts = [drawn_answer.answer.text for drawn_answer in answers]
            said = known.get((asked.key, tuple(texts)))
            if said is None:
                compared = ranking.verdicts(judge, asked.prompt, texts)
                said = [[c.a, c.b, c.verdict.score, c.verdict.disagreed] for c in compared]
                journal.append(
                    [{"judge": judge.name, "key": asked.key, "texts": texts, "verdicts": said}]
                )
            found.append([Compared(a, b, Verdict(score, dis)) for a, b, score, dis in said])
            advance(1)
    return found
