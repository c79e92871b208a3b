"""`smoldpo evaluate`: one model, or two compared pair by pair, on any pairs that training reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smoldpo.config.evaluate_options import EvaluateOptions
from smoldpo.data.load import LoadedPairs, load_pairs
from smoldpo.data.template_settings import replace_template, tokenization
from smoldpo.data.tokenize import PairTokenizer, Tokenization, require_room
from smoldpo.engine.autotune import agreed_dtype, agreed_kernels
from smoldpo.engine.base import EngineSettings
from smoldpo.engine.build import choose_engine
from smoldpo.engine.logprobs import score
from smoldpo.engine.plain import PlainEngine
from smoldpo.engine.precision import cast, cast_frozen, master_dtype
from smoldpo.evaluation.analysis import analyse, pair_rows
from smoldpo.evaluation.gates import failures, parse_gates
from smoldpo.evaluation.judges import parse_judge
from smoldpo.evaluation.judges.base import Judge
from smoldpo.evaluation.metrics import PairFacts, PairScore, pair_scores
from smoldpo.evaluation.schema import Evaluation, ModelEvaluation, Names
from smoldpo.evaluation.side_by_side import (
    Comparison,
    GenerationSettings,
    SideBySide,
    choose_prompts,
    moved_pairs,
)
from smoldpo.evaluation.slices import describe
from smoldpo.models.families import FAMILIES
from smoldpo.models.load import (
    ModelSource,
    check_model,
    find_model,
    load_model,
    load_tokenizer,
    positions,
    require_same_tokens,
)
from smoldpo.models.token_rows import require_rows_of_pairs, token_rows
from smoldpo.types import PairLogps, PreferencePair, TokenizedPair
from smoldpo.utils import progress
from smoldpo.utils.devices import pick_device
from smoldpo.utils.distributed import world
from smoldpo.utils.errors import UsageError
from smoldpo.utils.rank_group import joined
from smoldpo.utils.threads import computing


@dataclass
class EvaluationResult:
    """One score a pair for each model, the record of what they say, and the rows they came from."""

    scores: list[list[PairScore]]
    facts: list[PairFacts]
    data: LoadedPairs
    notes: dict[str, int]
    record: Evaluation | ModelEvaluation
    failed_gates: list[str]

    def summary(self) -> dict[str, Any]:
        """What --json prints."""
        account = self.data.account
        rows = {"rows_read": account.rows_read, "dropped": account.dropped}
        return self.record.as_json() | rows | {"notes": self.notes}

    def rows(self) -> list[dict[str, Any]]:
        """One row a pair: of one model its scores; of two, both."""
        if len(self.scores) == 1:
            return [score.as_row() for score in self.scores[0]]
        before, after = self.scores
        return [row.as_json() for row in pair_rows(before, after, self.facts)]


def evaluate_models(models: Sequence[str], data: str, options: EvaluateOptions) -> EvaluationResult:
    """Score every pair under one model or two, and say what that tells.

    With two models, A and B, the first is the reference unless another is given: then B's implicit
    reward is how far it moved from A. On several ranks each scores a share of the pairs, and all
    have the result, but answers and gates are the first one's alone.

    Raises:
        SmoldpoError: as the loading of data and models; options that need another model.
    """
    with joined(), computing(options.threads):
        return _evaluate(models, data, options)


def _evaluate(models: Sequence[str], data: str, options: EvaluateOptions) -> EvaluationResult:
    gates = parse_gates(options.fail_under)
    how = tokenization(options.max_length, vars(options), find_model(models[-1]).location)
    day = how.template.date.isoformat() if how.template.date else None
    judges = [parse_judge(spec, day) for spec in options.judges]
    reference = options.reference or (models[0] if len(models) == 2 else None)
    _require_second(models, reference, options, gates)
    loaded = load_pairs(
        data,
        subset=options.subset,
        split=options.split,
        format=options.format,
        columns=options.columns,
    )
    for line in loaded.account.losses():
        progress.say(f"{data}: {line}")
    scorer = _ModelScorer(models, reference, loaded.pairs[: options.max_samples], options, how)
    pairs = scorer.pairs
    scores = [scorer.scores(name) for name in models]
    facts = [PairFacts.of(pair) for pair in pairs]
    record: Evaluation | ModelEvaluation
    if len(models) == 2:
        before, after = scores
        names = _column_names(models)
        record = analyse(before, after, facts, options.beta, options.seed, "compare", names)
    else:
        record = describe(scores[0], facts)
    if scorer.template:
        record.chat_template = scorer.template
    side_by_side = SideBySide()
    if options.generate_prompts and world().first:
        side_by_side = scorer.side_by_side(pairs, scores[-1], judges)
    side_by_side.add_to(record)
    failed = failures(record, gates) if world().first else []
    return EvaluationResult(scores, facts, loaded, scorer.notes, record, failed)


def _require_second(
    models: Sequence[str], reference: str | None, options: EvaluateOptions, gates: dict[str, float]
) -> None:
    """Refuse options that compare where there is one model alone."""
    changes = [name for name in gates if name.startswith("change/")]
    if changes and len(models) == 1:
        raise UsageError(f"--fail-under {changes[0]} needs two models: evaluate A B DATA")
    if "reward" in gates and reference is None:
        raise UsageError("--fail-under reward needs --reference, or two models")
    if options.generate_prompts and reference is None:
        raise UsageError("--generate compares two models: give a second one, or --reference")
    if options.judges and not options.generate_prompts:
        raise UsageError("--judge needs answers to judge: say how many with --generate N")
    if "win_rate" in gates and not options.judges:
        raise UsageError("--fail-under win_rate needs a --judge, and --generate N")


def _column_names(models: Sequence[str]) -> Names:
    """Short names of the two columns; the whole ones where the short ones are alike."""
    short = [name.rstrip("/").rsplit("/", 1)[-1] for name in models]
    first, second = short if short[0] != short[1] else models
    if first == second:
        first, second = f"{first} (A)", f"{second} (B)"
    return Names(before=first, after=second)


class _ModelScorer:
    """The tokenised pairs, and each model's log-probabilities of them; one model at a time."""

    def __init__(
        self,
        models: Sequence[str],
        reference: str | None,
        pairs: Sequence[PreferencePair],
        options: EvaluateOptions,
        how: Tokenization,
    ):
        self._options, self._models, self._reference = options, models, reference
        self._device = pick_device(options.device)
        self._dtype, _ = agreed_dtype(options.dtype, self._device)
        names = dict.fromkeys([*models, *([reference] if reference else [])])
        self._sources = {name: find_model(name) for name in names}
        with progress.spinner(f"loading {models[0]}"):
            self._tokenizer: PreTrainedTokenizerBase = load_tokenizer(self._sources[models[0]])
        for source in list(self._sources.values())[1:]:
            require_same_tokens(self._tokenizer, source)
            check_model(source)  # before the first one is scored
        replace_template(self._tokenizer, options.chat_template)
        pair_tokenizer = PairTokenizer(self._tokenizer, how)
        self._pairs: list[TokenizedPair]
        with progress.bar("tokenising", len(pairs)) as advance:
            self.pairs, self._pairs = pair_tokenizer.select(pairs, advance)
        if not self.pairs:
            raise UsageError(
                f"no pair is left of {len(pairs)}: their sides are the same tokens, or too long; "
                "give a larger --max-length, or other pairs"
            )
        if pair_tokenizer.left_out:
            progress.say(f"left out: {pair_tokenizer.left_out_in_words()}")
        for found in pair_tokenizer.mismatches.values():
            progress.say(f"warning: {found}")
        self.notes = dict(pair_tokenizer.notes + pair_tokenizer.left_out)
        self.template = pair_tokenizer.template.facts() if pair_tokenizer.template else {}
        # Chosen once, so that equal models give equal numbers.
        self._kernels = agreed_kernels(self._dtype, self._device)
        self._positions: int | None = None
        self._logps = {name: self._logps_of(name) for name in self._sources}

    def scores(self, name: str) -> list[PairScore]:
        """One score a pair under this model, beside the reference if there is one."""
        reference = self._logps[self._reference] if self._reference else None
        return pair_scores(self._pairs, self._logps[name], reference)

    def side_by_side(
        self,
        pairs: Sequence[PreferencePair],
        after: Sequence[PairScore],
        judges: Sequence[Judge],
    ) -> SideBySide:
        """Answers of the reference (or A) and the model (or B)."""
        options, policy = self._options, self._models[-1]
        other = self._models[0] if len(self._models) == 2 else self._reference
        assert other is not None
        before = pair_scores(self._pairs, self._logps[other], None)
        comparison = Comparison(
            load_reference=lambda: self._load(self._sources[other]),
            load_policy=lambda _: self._load(self._sources[policy]),
            tokenizer=self._tokenizer,
            dtype=self._dtype,
            kernels=self._kernels,
            settings=GenerationSettings(options.max_new_tokens, options.temperature, options.seed),
            prompts=choose_prompts(
                pairs,
                self._pairs,
                options.generate_prompts,
                self._positions,
                options.max_new_tokens,
            ),
            sample=None,
            moved=moved_pairs(pairs, self._pairs, before, after),
        )
        with progress.bar("both models side by side", comparison.units) as advance:
            return comparison.run(judges, advance)

    def _load(self, source: ModelSource) -> PreTrainedModel:
        return load_model(source, master_dtype(self._dtype), self._device, as_stored=FAMILIES)

    def _logps_of(self, name: str) -> PairLogps:
        with progress.spinner(f"loading {name}"):
            model = self._load(self._sources[name])
        self._positions = positions(model)
        require_room(self._pairs, self._positions)
        require_rows_of_pairs(self._tokenizer, token_rows(model), self._pairs)
        choice = choose_engine(self._options.engine, model)
        with progress.bar(name, len(self._pairs)) as advance:
            if choice.name == "fast":
                frozen = cast_frozen(model, self._dtype)
                return score(frozen, self._pairs, self._kernels, advance, world())
            cast(model, master_dtype(self._dtype))
            engine = PlainEngine(
                model,
                None,
                EngineSettings(
                    compute_dtype=self._dtype,
                    train_batch_size=self._options.batch_size,
                    eval_batch_size=self._options.batch_size,
                ),
            )
            return engine.policy_logps(self._pairs, advance)
