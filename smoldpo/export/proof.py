"""What an export is held against: pairs, and what the model made of them before it was written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smoldpo.data.template_settings import tokenization
from smoldpo.data.tokenize import PairTokenizer, Tokenization
from smoldpo.engine.autotune import KernelChoice, choose_kernels
from smoldpo.evaluation.metrics import PairFacts
from smoldpo.export.source import Origin
from smoldpo.export.verify import Measured, Verification, compare, measure
from smoldpo.models.load import positions
from smoldpo.types import PreferencePair
from smoldpo.utils.errors import ModelError

LONGEST = 1024
"""Tokens of prompt and completion of a pair, where the model has room."""


@dataclass(frozen=True)
class Proof:
    """What an export is held against.

    Attributes:
        specials: control tokens, which are written between texts.
        model: what the model made of texts and pairs.
    """

    tokenizer: PreTrainedTokenizerBase
    pairs: Sequence[PreferencePair]
    how: Tokenization
    kernels: KernelChoice
    specials: Sequence[str]
    model: Measured

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        pairs: Sequence[PreferencePair],
        how: Tokenization,
    ) -> Proof:
        """Let the model compute, in float32, as it does afterwards."""
        kernels = choose_kernels(torch.float32, "cpu")
        specials = [str(token) for token in tokenizer.get_added_vocab()][:64]
        found = measure(model, tokenizer, pairs, how, kernels, specials, "the model")
        return cls(tokenizer, pairs, how, kernels, specials, found)

    def hold(
        self,
        read: PreTrainedModel,
        tokenizer: Any,
        kind: str,
        bounds: Mapping[str, float] | None = None,
    ) -> Verification:
        """Hold a model that was read back against the one that was written.

        Raises:
            VerificationError: it is another model, or has another tokenizer.
        """
        title = "what was read back"
        after = measure(read, tokenizer, self.pairs, self.how, self.kernels, self.specials, title)
        return self.compare(after, kind, range(len(self.pairs)), bounds)

    def compare(
        self,
        after: Measured,
        kind: str,
        places: Sequence[int],
        bounds: Mapping[str, float] | None = None,
    ) -> Verification:
        """As `hold`, of what was measured already, on the pairs at these places."""
        facts = [PairFacts.of(self.pairs[place]) for place in places]
        return compare(self.model.at(places), after, facts, kind, bounds)


def readable_pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    origin: Origin,
    pairs: Sequence[PreferencePair],
) -> tuple[list[PreferencePair], Tokenization]:
    """Those of the pairs that can be tokenised, and how they are.

    Raises:
        ModelError: none of them can.
    """
    room = min(LONGEST, positions(model) or LONGEST)
    how = tokenization(room, {}, origin.source.location)
    chosen, _ = PairTokenizer(tokenizer, how).select(pairs)
    if not chosen:
        raise ModelError("no pair is left to prove the export on; give others with --data")
    return chosen, how
