"""`smoldpo iterate`: make pairs, train, make pairs anew of the tuned policy, round after round.

Iterative DPO (Xu et al. 2023, https://arxiv.org/abs/2312.16682; Yuan et al. 2024,
https://arxiv.org/abs/2401.10020): answers are the policy's own of the moment, not those of a model
that it has long left behind.

    FOLDER/iterate.json                 what it began with, and what each round found
    FOLDER/report.md                    the same for people
    FOLDER/held-out.answers             the start's answers to held-out prompts
    FOLDER/round-N/pairs.jsonl          made by the policy of round N - 1
    FOLDER/round-N/run/                 trained on them
    FOLDER/round-N/held-out.answers     that run's answers to the same prompts

Each file is written whole, or goes on where it ended: the same command goes on after a kill.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from smoldpo.config.load import build_config
from smoldpo.config.schema import TrainConfig
from smoldpo.data.cleaning.text import prompt_key
from smoldpo.data.load import first_user_turn, split_by_prompt
from smoldpo.data.template_settings import today
from smoldpo.pairs.journal import Journal
from smoldpo.pairs.make import NoPairsError, PairChoice, make_pairs
from smoldpo.pairs.prompts import AskedPrompt, Prompts
from smoldpo.pairs.rank import Ranking
from smoldpo.pairs.rounds import PolicyComparison, RoundResult, compare_policies, report
from smoldpo.pairs.sample import DrawnAnswers, SamplingSettings, draw_answers
from smoldpo.training.fingerprint import read_resume_record
from smoldpo.training.resume import resume_training
from smoldpo.training.run import run_training
from smoldpo.types import PreferencePair
from smoldpo.utils import progress
from smoldpo.utils.errors import SmoldpoError, UsageError
from smoldpo.utils.files import write_json, write_text
from smoldpo.utils.signals import InterruptedRunError
from smoldpo.utils.threads import computing

FILE, REPORT = "iterate.json", "report.md"
START, LAST = "start", "last"
OWN = ("data", "eval_data", "data_weights", "model", "reference", "output_dir", "overwrite")
"""Settings of training that each round has its own of."""


@dataclass(frozen=True)
class Iteration:
    """What `iterate` is asked for; `settings` are those of training, by name."""

    rounds: int
    reference_of_round: str
    sampling: SamplingSettings
    choice: PairChoice
    settings: Mapping[str, Any]
    threads: int | None = None


@dataclass(frozen=True)
class IterationResult:
    """What was found, and where it is kept."""

    folder: Path
    rounds: list[RoundResult]
    kept: Path | None
    """The run of the last round whose gain was real; None where none was."""
    stopped: str
    """Why there are no more rounds."""

    def as_dict(self) -> dict[str, Any]:
        """What --json prints."""
        kept = None if self.kept is None else str(self.kept)
        rounds = [asdict(each) for each in self.rounds]
        return {"folder": str(self.folder), "kept": kept, "stopped": self.stopped} | {
            "rounds": rounds
        }


def split_prompts(
    prompts: Prompts, held_out: Prompts | None, fraction: float
) -> tuple[list[AskedPrompt], list[AskedPrompt]]:
    """Prompts to train on and to measure with, without a common first question.

    Args:
        held_out: given ones; what repeats them is left out of training.
        fraction: else the share of the prompts, by hash.

    Raises:
        UsageError: one side is left with none.
    """
    if held_out is not None:
        known = {prompt_key(first_user_turn(asked.prompt)) for asked in held_out.prompts}
        kept = [
            asked
            for asked in prompts.prompts
            if prompt_key(first_user_turn(asked.prompt)) not in known
        ]
        if len(kept) < len(prompts.prompts):
            n = len(prompts.prompts) - len(kept)
            progress.say(f"prompts: {n:,} are held out, and left out of training")
        sides = kept, held_out.prompts
    else:
        pairs = [
            PreferencePair(a.prompt, "", "", a.file, a.row, arguments=a.arguments)
            for a in prompts.prompts
        ]
        # Runs hold pairs out from the hash's lower end: these prompts come from its upper one.
        held, train = (
            [AskedPrompt(p.prompt, p.arguments, p.file, p.row) for p in side]
            for side in split_by_prompt(pairs, 1 - fraction)
        )
        sides = train, held
    if not all(sides):
        raise UsageError(
            f"{len(sides[0]):,} prompts to train on and {len(sides[1]):,} held out; give more "
            "prompts, another --eval-fraction, or --eval-prompts"
        )
    return sides


def round_config(settings: Mapping[str, Any], **own: Any) -> TrainConfig:
    """A round's settings of training: those of the user, and its own.

    Raises:
        ConfigError: as `build_config`.
        UsageError: a setting that rounds have their own of.
    """
    given = [name for name in OWN if name in settings]
    if given:
        raise UsageError(f"{', '.join(given)}: each round of iterate has its own; leave it out")
    usual = {"generate_prompts": 0, "judges": [], "sample_prompt": None}
    return build_config(usual | dict(settings) | own)


def iterate(
    asked: Iteration,
    train: Sequence[AskedPrompt],
    held_out: Sequence[AskedPrompt],
    ranking: Ranking,
    folder: Path,
) -> IterationResult:
    """Rounds until there were enough, or until one is no real gain over the round before.

    Raises:
        UsageError: the folder holds something else, or an iteration that began otherwise.
        InterruptedRunError: by a signal; the same command goes on.
        SmoldpoError: as `make_pairs` and training.
    """
    round_config(asked.settings)  # what is wrong with it is told now
    began = _begin(asked, train, held_out, ranking, folder)
    asked = replace(asked, sampling=_on_day(asked.sampling, began["day"]))
    with computing(asked.threads):
        try:
            return _Rounds(asked, train, held_out, ranking, folder, began).run()
        except InterruptedRunError as stop:
            raise InterruptedRunError(
                stop.number,
                f"interrupted; everything stays in {folder}; go on with the same command",
            ) from None


def _on_day(sampling: SamplingSettings, day: str) -> SamplingSettings:
    return replace(sampling, template={"template_date": day} | dict(sampling.template))


def _begin(
    asked: Iteration,
    train: Sequence[AskedPrompt],
    held_out: Sequence[AskedPrompt],
    ranking: Ranking,
    folder: Path,
) -> dict[str, Any]:
    """What stands in the folder, or is written there now."""
    plain = json.loads(json.dumps(asdict(asked)))
    plain.pop("threads")
    plain.pop("rounds")  # more of them may be asked for later
    plain |= {"ranking": dict(zip(ranking.names, ranking.weights, strict=True))}
    plain |= {"train": [a.key for a in train], "held_out": [a.key for a in held_out]}
    path = folder / FILE
    if path.is_file():
        try:
            began = json.loads(path.read_text(encoding="utf-8"))
            then = began["asked"]
        except (ValueError, KeyError, TypeError):
            raise SmoldpoError(f"{path}: is damaged; give another --output-dir") from None
        differing = [name for name in plain if plain[name] != then.get(name)]
        if differing:
            raise UsageError(
                f"{folder}: holds rounds that began otherwise ({', '.join(differing)}); ask as "
                "then, or give another --output-dir"
            )
        return dict(began)
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder}: holds something else; give a new or an empty --output-dir")
    folder.mkdir(parents=True, exist_ok=True)
    began = {"asked": plain, "day": today()}
    write_json(path, began)
    return began


class _Rounds:
    """Rounds that go on from what the folder holds."""

    def __init__(
        self,
        asked: Iteration,
        train: Sequence[AskedPrompt],
        held_out: Sequence[AskedPrompt],
        ranking: Ranking,
        folder: Path,
        began: dict[str, Any],
    ):
        self.asked, self.ranking, self.folder, self.began = asked, ranking, folder, began
        self.train = Prompts(list(train), 0, 0)
        self.held_out = held_out
        self.start = asked.sampling.models[0]

    def run(self) -> IterationResult:
        first = before = self._answers(self.start, self.folder)
        found: list[RoundResult] = []
        kept: Path | None = None
        stopped = f"{self.asked.rounds} rounds were asked for"
        for number in range(1, self.asked.rounds + 1):
            progress.say(f"round {number} of {self.asked.rounds}")
            place = self.folder / f"round-{number}"
            place.mkdir(exist_ok=True)
            policy = self._policy(number - 1)
            try:
                pairs = self._pairs(place, policy, number)
            except NoPairsError as error:
                if number == 1:
                    raise
                stopped = f"round {number}: {error}"
                break
            run = self._run(place, policy, number)
            after = self._answers(str(run), place)
            last = self._compare(before, after)
            gain = RoundResult(
                number, pairs, last if before is first else self._compare(first, after), last
            )
            found.append(gain)
            self._write(found)
            progress.say(gain.sentence)
            if not gain.is_real:
                stopped = f"round {number} is no real gain over the round before"
                break
            kept, before = run, after
        result = IterationResult(self.folder, found, kept, stopped)
        self._write(found, result)
        return result

    def _compare(self, theirs: DrawnAnswers, ours: DrawnAnswers) -> PolicyComparison:
        sampling = self.asked.sampling
        return compare_policies(self.ranking, self.held_out, theirs, ours, sampling)

    def _policy(self, number: int) -> str:
        return str(self.folder / f"round-{number}" / "run") if number else self.start

    def _answers(self, model: str, place: Path) -> DrawnAnswers:
        """A model's answers to the held-out prompts; all rounds meet the same random numbers."""
        sampling = replace(self.asked.sampling, models=[model], num_answers=1)
        journal = Journal(place / "held-out.answers")
        return draw_answers(self.held_out, sampling, journal)

    def _pairs(self, place: Path, policy: str, number: int) -> int:
        """The round's pairs, made by the policy of the round before; how many there are."""
        path = place / "pairs.jsonl"
        if not path.exists():
            seed = self.asked.sampling.seed + number  # 0 is of the held-out answers
            sampling = replace(self.asked.sampling, models=[policy], seed=seed)
            source = f"round-{number}"
            make_pairs(self.train, path, sampling, self.ranking, self.asked.choice, source=source)
        return sum(1 for _ in path.open("rb"))

    def _run(self, place: Path, policy: str, number: int) -> Path:
        """The round's run; one that was interrupted goes on."""
        folder = place / "run"
        if (folder / "resume.json").is_file():
            if read_resume_record(folder).finished is None:
                resume_training(folder)
            return folder
        fixed = self.asked.reference_of_round == START and number > 1
        config = round_config(
            self.asked.settings,
            model=policy,
            reference=self.start if fixed else None,
            data=[str(place / "pairs.jsonl")],
            output_dir=str(folder),
            overwrite=True,  # what a kill left before the run began
            template_date=self.asked.sampling.template["template_date"],
        )
        run_training(config)
        return folder

    def _write(self, found: Sequence[RoundResult], result: IterationResult | None = None) -> None:
        rounds = [asdict(each) for each in found]
        kept = str(result.kept) if result and result.kept else None
        stopped = result.stopped if result else ""
        end = {"stopped": stopped, "kept": kept} if result else {}
        write_json(self.folder / FILE, self.began | {"rounds": rounds} | end)
        page = report(found, self.ranking, len(self.held_out), kept, stopped)
        write_text(self.folder / REPORT, page)
