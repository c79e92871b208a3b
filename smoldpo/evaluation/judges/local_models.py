"""Judges that are models on this machine: reward models, and the reward that a policy implies."""

from __future__ import annotations

import functools
import sys
from dataclasses import replace
from typing import Any

import torch

from smoldpo.data.template_settings import tokenization
from smoldpo.data.tokenize import PairTokenizer, Tokenization
from smoldpo.engine.autotune import KernelChoice, choose_kernels
from smoldpo.engine.base import EngineSettings
from smoldpo.engine.build import choose_engine
from smoldpo.engine.logprobs import score
from smoldpo.engine.plain import PlainEngine
from smoldpo.engine.precision import cast_frozen
from smoldpo.evaluation.judges.base import Verdict, by_score
from smoldpo.models.families import FAMILIES
from smoldpo.models.load import (
    ModelSource,
    check_model,
    find_model,
    load_classifier,
    load_model,
    load_tokenizer,
    positions,
    require_same_tokens,
)
from smoldpo.models.token_rows import require_rows, require_rows_of_pairs, token_rows
from smoldpo.types import PreferencePair, Prompt, TokenizedPair
from smoldpo.utils import progress
from smoldpo.utils.devices import pick_device
from smoldpo.utils.errors import ModelError


class RewardJudge:
    """The answer with the higher reward wins."""

    def __init__(self, model: str, day: str | None = None):
        self.name, self._day = f"reward:{model}", day
        self._source = find_model(model)
        _classifier(self._source)  # a fault of its files is told now, not at the end of a run

    def compare(self, prompt: Prompt, a: str, b: str) -> Verdict:
        """As `Judge.compare`; errors as `RewardModel`'s."""
        return by_score(self.score(prompt, a), self.score(prompt, b))

    def score(self, prompt: Prompt, answer: str) -> float:
        """The reward."""
        return self._model.reward(prompt, answer)

    @functools.cached_property
    def _model(self) -> RewardModel:
        with progress.spinner(f"loading {self._source.name}"):
            return RewardModel(self._source, pick_device("auto"), self._day)


class ImplicitJudge:
    """The answer whose log π - log π_ref is higher wins: a DPO-trained policy as a reward model.

    The sum over the whole answer and its end of turn, as training has it (Rafailov et al. 2023,
    section 4); β would change no verdict. An answer that was cut off is scored as if it ended
    there. A policy that judges its own answers says little: give another.
    """

    def __init__(self, model: str, reference: str, day: str | None = None):
        self.name, self._day = f"implicit:{model},{reference}", day
        self._policy, self._reference = find_model(model), find_model(reference)
        for source in (self._policy, self._reference):
            check_model(source)

    def compare(self, prompt: Prompt, a: str, b: str) -> Verdict:
        """As `Judge.compare`.

        Raises:
            SmoldpoError: a model cannot be loaded, or the two have not the same tokens.
        """
        if a == b:  # said outright, lest rounding decide
            return Verdict(0.5)
        reader, policy, reference = self._loaded
        pair = reader.tokenize(PreferencePair(prompt, a, b))
        rows = min(token_rows(policy.model), token_rows(reference.model))
        require_rows_of_pairs(reader.tokenizer, rows, [pair])
        return by_score(policy.margin(pair), reference.margin(pair))

    def score(self, prompt: Prompt, answer: str) -> float:
        """log π(y|x) - log π_ref(y|x), in nats; errors as `compare`'s."""
        reader, policy, reference = self._loaded
        pair = reader.tokenize(PreferencePair(prompt, answer, ""))
        return policy.logps(pair)[0] - reference.logps(pair)[0]

    @functools.cached_property
    def _loaded(self) -> tuple[PairTokenizer, _Scored, _Scored]:
        tokenizer = load_tokenizer(self._policy)
        require_same_tokens(tokenizer, self._reference)
        device = pick_device("auto")
        kernels = choose_kernels(torch.float32, device)
        with progress.spinner(f"loading {self.name}"):
            policy = _Scored(self._policy, device, kernels)
            reference = _Scored(self._reference, device, kernels, share_with=policy.model)
        room = (positions(scored.model) or sys.maxsize for scored in (policy, reference))
        return PairTokenizer(tokenizer, _how(self._policy, min(room), self._day)), policy, reference


class _Scored:
    """A model in float32 that gives log-probabilities, by the fast engine where possible."""

    def __init__(
        self,
        source: ModelSource,
        device: str,
        kernels: KernelChoice,
        share_with: torch.nn.Module | None = None,
    ):
        model = load_model(source, torch.float32, device, as_stored=FAMILIES)
        self.model = cast_frozen(model, torch.float32, share_with)
        self._kernels = kernels
        self._fast = choose_engine("auto", self.model).name == "fast"

    def margin(self, pair: TokenizedPair) -> float:
        """log π(a|x) - log π(b|x), in nats."""
        chosen, rejected = self.logps(pair)
        return chosen - rejected

    def logps(self, pair: TokenizedPair) -> tuple[float, float]:
        """log π of both answers, in nats."""
        if self._fast:
            logps = score(self.model, [pair], self._kernels)
        else:
            logps = PlainEngine(
                self.model,
                None,
                EngineSettings(compute_dtype=torch.float32, train_batch_size=1, eval_batch_size=1),
            ).policy_logps([pair])
        return float(logps.chosen.double()), float(logps.rejected.double())


class RewardModel:
    """A sequence classifier with one label, in its weights' precision, with its own tokenizer."""

    def __init__(self, source: ModelSource, device: str, day: str | None = None):
        """Load it.

        Args:
            day: what its chat template takes for today, as YYYY-MM-DD.

        Raises:
            ModelError: it cannot be loaded, has not one label, lacks weights, or has no chat
                template.
        """
        self.model = _classifier(source).to(device)
        self.tokenizer = load_tokenizer(source)
        if not self.tokenizer.chat_template:
            raise ModelError(
                f"{source.name}: its tokenizer has no chat template, so it cannot be told which "
                "words are the prompt's and which the answer's; give a reward model for chats"
            )
        # What the template puts behind the end of turn (a line break) is part of what such models
        # read.
        room = positions(self.model) or sys.maxsize
        how = _how(source, room, day)
        self.reader = PairTokenizer(self.tokenizer, how)
        self._behind = self.reader.ids_behind_answer()
        self.reader.how = replace(how, max_length=room - len(self._behind))

    @torch.no_grad()
    def reward(self, prompt: Prompt, answer: str) -> float:
        """The model's number for this answer; comparable between answers to one prompt.

        Raises:
            DataError: the chat template refuses the dialogue.
            ModelError: a token for which the model has no row.
        """
        found = self.ids(prompt, answer)
        require_rows(self.tokenizer, token_rows(self.model), [found])
        ids = torch.tensor([found], device=self.model.device)
        logits = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        return float(logits.double())

    def ids(self, prompt: Prompt, answer: str) -> list[int]:
        """The dialogue as the chat template writes it, the answer its last turn.

        Control tokens spelled out in a text are read as text (data/tokenize.py), or an answer could
        end its own turn and go on as somebody else.
        """
        pair = self.reader.tokenize(PreferencePair(prompt, answer, answer))
        return [*pair.prompt_ids, *pair.chosen_ids, *self._behind]


def _how(source: ModelSource, room: int, day: str | None) -> Tokenization:
    """As the judge's own run had it, where it came from one, but for the day."""
    return Tokenization(room, tokenization(room, {"template_date": day}, source.location).template)


def _classifier(source: ModelSource) -> Any:
    model = load_classifier(source)
    if model.config.num_labels != 1:
        raise ModelError(
            f"{source.name}: is a classifier of {model.config.num_labels} labels; a reward model "
            "has one"
        )
    return model
