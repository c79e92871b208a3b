"""Judges that are models on this machine: reward models, and the reward that a policy implies."""

from __future__ import annotations

import functools
import sys

import torch

from smoldpo import progress
from smoldpo.data.tokenize import PairTokenizer
from smoldpo.engine.build import choose_engine
from smoldpo.engine.frozen import cast_frozen
from smoldpo.engine.kernels import Kernels, choose_kernels
from smoldpo.engine.plain import PlainEngine
from smoldpo.engine.precision import pick_device
from smoldpo.engine.scorer import score
from smoldpo.engine.trunk import FAMILIES
from smoldpo.evaluation.judges import Verdict, by_score
from smoldpo.models.load import (
    ModelSource,
    find_model,
    load_model,
    load_tokenizer,
    positions,
    require_same_tokens,
)
from smoldpo.models.names import BUILTIN
from smoldpo.models.reward import RewardModel
from smoldpo.types import PreferencePair, Prompt, TokenizedPair


class RewardJudge:
    """The answer with the higher reward wins."""

    def __init__(self, model: str):
        self.name = f"reward:{model}"
        self._source = find_model(model)

    def compare(self, prompt: Prompt, a: str, b: str) -> Verdict:
        """As `Judge.compare`; errors as `RewardModel`'s."""
        return by_score(self._model.reward(prompt, a), self._model.reward(prompt, b))

    @functools.cached_property
    def _model(self) -> RewardModel:
        with progress.spinner(f"loading {self._source.name}"):
            return RewardModel(self._source, pick_device("auto"))


class ImplicitJudge:
    """The answer whose log π - log π_ref is higher wins: a DPO-trained policy as a reward model.

    The sum over the whole answer and its end of turn, as training has it (Rafailov et al. 2023, section 4);
    β would change no verdict. An answer that was cut off is scored as if it ended there. A policy that
    judges its own answers says little: give another.
    """

    def __init__(self, model: str, reference: str = BUILTIN):
        self.name = f"implicit:{model},{reference}"
        self._policy, self._reference = find_model(model), find_model(reference)

    def compare(self, prompt: Prompt, a: str, b: str) -> Verdict:
        """As `Judge.compare`.

        Raises:
            SmoldpoError: a model cannot be loaded, or the two have not the same tokens.
        """
        if a == b:  # said outright, lest rounding decide
            return Verdict(0.5)
        reader, policy, reference = self._loaded
        pair = reader.tokenize(PreferencePair(prompt, a, b))
        return by_score(policy.margin(pair), reference.margin(pair))

    @functools.cached_property
    def _loaded(self) -> tuple[PairTokenizer, _Scored, _Scored]:
        tokenizer = load_tokenizer(self._policy)
        require_same_tokens(tokenizer, self._reference)
        device = pick_device("auto")
        kernels = choose_kernels(torch.float32, device)
        with progress.spinner(f"loading {self.name}"):
            policy = _Scored(self._policy, device, kernels)
            reference = _Scored(self._reference, device, kernels, beside=policy.model)
        room = (positions(scored.model) or sys.maxsize for scored in (policy, reference))
        return PairTokenizer(tokenizer, min(room)), policy, reference


class _Scored:
    """A model in float32 that gives log-probabilities, by the fast engine's scorer where that is proven."""

    def __init__(
        self,
        source: ModelSource,
        device: str,
        kernels: Kernels,
        beside: torch.nn.Module | None = None,
    ):
        model = load_model(source, torch.float32, device, as_stored=FAMILIES)
        self.model = cast_frozen(model, torch.float32, beside)
        self._kernels = kernels
        self._fast = choose_engine("auto", self.model).name == "fast"

    def margin(self, pair: TokenizedPair) -> float:
        """log π(a|x) - log π(b|x), in nats."""
        if self._fast:
            logps = score(self.model, [pair], self._kernels)
        else:
            logps = PlainEngine(
                self.model, None, compute_dtype=torch.float32, train_batch_size=1, eval_batch_size=1
            ).policy_logps([pair])
        return (logps.chosen.double() - logps.rejected.double()).item()
