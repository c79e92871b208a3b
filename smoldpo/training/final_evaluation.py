"""The evaluation that ends a run: before against after, written to the run folder.

evaluation.json holds the statistics (evaluation/analysis.py), answers of both models and what
judges make of them (evaluation/side_by_side.py), and one row a pair, from which all
of it can be computed anew; samples.jsonl the answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smoldpo.config.schema import TrainConfig
from smoldpo.data.template_settings import tokenization
from smoldpo.data.tokenize import PairTokenizer
from smoldpo.engine.autotune import KernelChoice
from smoldpo.evaluation.analysis import analyse, pair_rows
from smoldpo.evaluation.judges.base import Judge
from smoldpo.evaluation.metrics import PairFacts, PairScore
from smoldpo.evaluation.schema import SAMPLE_PROMPT, Evaluation
from smoldpo.evaluation.separation import separation
from smoldpo.evaluation.side_by_side import (
    Comparison,
    EvalPrompt,
    GenerationSettings,
    MovedPair,
    SideBySide,
    choose_prompts,
    moved_pairs,
)
from smoldpo.training.phases import PhaseTimer
from smoldpo.training.policy_and_reference import PolicyAndReference
from smoldpo.training.setup import TokenizedData
from smoldpo.training.step_metrics import kinds
from smoldpo.utils import progress
from smoldpo.utils.files import write_json, write_jsonl

Scores = Sequence[PairScore]


def _is_logistic(config: TrainConfig) -> bool:
    """Whether the loss takes σ(β margin) for the probability that chosen is preferred."""
    plain = set(config.loss_type) <= {"sigmoid", "sft"} and config.f_divergence_type == "reverse_kl"
    return plain and "beta" not in config.column_names and config.ld_alpha in (None, 1)


def tokenize_sample_prompt(config: TrainConfig, models: PolicyAndReference) -> EvalPrompt | None:
    """The sample prompt; made before training, so that a bad one costs none."""
    if config.sample_prompt is None:
        return None
    how = tokenization(config.max_length, config.model_dump())
    ids = PairTokenizer(models.tokenizer, how).prompt_ids(config.sample_prompt)
    return EvalPrompt(SAMPLE_PROMPT, config.sample_prompt, tuple(ids))


class FinalEvaluation:
    """Before against after on the held-out pairs, and the two models side by side."""

    def __init__(
        self,
        config: TrainConfig,
        models: PolicyAndReference,
        data: TokenizedData,
        sample: EvalPrompt | None,
        judges: Sequence[Judge],
    ):
        self._config, self._models, self._data = config, models, data
        self._sample, self._judges = sample, judges

    def write_analysis(
        self, folder: Path, before: Scores | None, after: Scores | None
    ) -> Evaluation | None:
        """evaluation.json without what needs the models again; None without held-out pairs."""
        if before is None or after is None:
            return None
        if (liked := kinds(self._data.eval)) is not None:
            self._write_separation(folder, before, after, liked)
            return None
        facts = [PairFacts.of(pair) for pair in self._data.eval_pairs]
        config = self._config
        evaluation = analyse(
            before, after, facts, config.last_beta, config.seed, logistic=_is_logistic(config)
        )
        tokens = self._data.account.tokens
        if tokens and tokens.template:
            evaluation.chat_template = tokens.template
        SideBySide().add_to(evaluation)
        evaluation.pairs = pair_rows(before, after, facts)
        write_json(folder / "evaluation.json", evaluation.as_json())
        return evaluation

    def _write_separation(
        self, folder: Path, before: Scores, after: Scores, liked: Sequence[bool]
    ) -> None:
        """separation.json: of single answers there is no accuracy."""
        beta = self._config.last_beta
        old, new = (
            [beta * (s.chosen_logp - (s.reference_chosen_logp or 0.0)) for s in scores]
            for scores in (before, after)
        )
        prompts = [PairFacts.of(pair).prompt for pair in self._data.eval_pairs]
        found = separation(old, new, liked, prompts, self._config.seed)
        if found is None:
            progress.say("held-out answers are of one kind alone, so nothing can be told of them")
            return
        write_json(folder / "separation.json", found.as_json())
        progress.say(found.sentence)

    def write_side_by_side(
        self,
        folder: Path,
        evaluation: Evaluation | None,
        before: Scores | None,
        after: Scores | None,
        timer: PhaseTimer,
    ) -> dict[str, Any] | None:
        """Answers of both models, and where they differ; completes `evaluation` and its file.

        Returns the sample prompt's row of samples.jsonl, if there is one.
        """
        comparison = self._comparison(before, after)
        if not comparison.units:
            return None
        title = "reference and policy side by side"
        with timer.phase(title, comparison.units, "answers") as advance:
            found = comparison.run(self._judges, advance)
        rows = [sample.as_json() for sample in found.samples]
        write_jsonl(folder / "samples.jsonl", rows)
        if evaluation is not None:
            found.add_to(evaluation)
            write_json(folder / "evaluation.json", evaluation.as_json())
        return next((row for row in rows if row["id"] == SAMPLE_PROMPT), None)

    def _comparison(self, before: Scores | None, after: Scores | None) -> Comparison:
        config, models = self._config, self._models
        moved: list[MovedPair] = []
        of_pairs = kinds(self._data.eval) is None
        if before is not None and after is not None and config.generate_prompts and of_pairs:
            moved = moved_pairs(self._data.eval_pairs, self._data.eval, before, after)
        prompts = choose_prompts(
            self._data.eval_pairs,
            self._data.eval,
            config.generate_prompts,
            models.facts.positions,
            config.max_new_tokens,
        )
        return Comparison(
            models.reference,
            models.tuned,
            models.tokenizer,
            models.facts.dtype,
            KernelChoice.of(models.computing.kernels),
            GenerationSettings(config.max_new_tokens, config.temperature, config.seed),
            prompts,
            self._sample,
            moved,
        )
