"""The values that flow through smoldpo, from rows to log-probabilities. This module knows nobody.

rows -> PreferencePair -> TokenizedPair -> (engine) -> PairLogps -> losses
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch


Message = dict[str, Any]
"""One chat message: "role", "content", and whatever else the chat template understands."""

Prompt = tuple[Message, ...] | str
"""A dialogue that ends where the model is to answer, or plain text to be continued."""


@dataclass(frozen=True)
class PairNumbers:
    """Numbers of a row's own columns for the loss, where settings ask for them (docs/losses.md)."""

    weight: float = 1.0
    margin: float = 0.0
    beta: float | None = None
    """None: the run's."""
    liked: bool | None = None
    """Of unpaired data (KTO): whether people liked `chosen`. `rejected` then is no answer that
    anybody compared with it, but another prompt's, for the KL term. None: a pair."""


NO_NUMBERS = PairNumbers()


@dataclass(frozen=True)
class TemplateArguments:
    """What a row gives to the chat template besides its messages.

    Attributes:
        kwargs: by name, such as enable_thinking; they come before those of the settings.
        tools: JSON schemas of functions that may be called; None: those of the settings.
        documents: texts to look things up in; None: those of the settings.
    """

    kwargs: dict[str, Any] = field(default_factory=dict, hash=False)
    tools: tuple[dict[str, Any], ...] | None = field(default=None, hash=False)
    documents: tuple[dict[str, Any], ...] | None = field(default=None, hash=False)


NO_ARGUMENTS = TemplateArguments()


@dataclass(frozen=True)
class PreferencePair:
    """One prompt with the answer that people prefer and the one that they do not.

    `file` and `row` (from 1): where it was read; `id`: the row's own id, or a hash of the texts.
    """

    prompt: Prompt
    chosen: str
    rejected: str
    """Text. Of a side that is a conversation, what the assistant says in it."""
    file: str = ""
    row: int = 0
    id: str = ""
    source: str = ""
    category: str = ""
    numbers: PairNumbers = NO_NUMBERS
    chosen_messages: tuple[Message, ...] | None = None
    rejected_messages: tuple[Message, ...] | None = None
    """The messages of a side that is more than one text: several turns, tool calls, thinking."""
    arguments: TemplateArguments = NO_ARGUMENTS

    def __post_init__(self) -> None:
        if not self.id:
            object.__setattr__(self, "id", self.content_hash()[:16])

    def content_hash(self) -> str:
        """SHA-256 (hex) of what is said: equal exactly when two pairs say the same."""
        texts: list[Any] = [self.prompt, self.chosen, self.rejected]
        if self.chosen_messages or self.rejected_messages:
            texts += [self.chosen_messages, self.rejected_messages]
        if self.arguments != NO_ARGUMENTS:
            texts.append(asdict(self.arguments))
        canonical = json.dumps(texts, ensure_ascii=True, sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()


class Completion(NamedTuple):
    """One side of a pair: its token ids, and of each whether it is scored."""

    ids: tuple[int, ...]
    scored: tuple[bool, ...]


@dataclass(frozen=True)
class TokenizedPair:
    """A pair as the model sees it. One tokenisation of the prompt serves both sides.

    Completion tokens are scored, the end-of-turn token included, except those that a side's mask
    leaves out (the tool's and the user's turns of a completion of several messages); no prompt
    token is. What is not scored is read all the same: the tokens behind it are predicted from it.

    Raises:
        ValueError: a mask that has not one entry a token, or scores none.
    """

    id: str
    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    notes: frozenset[str] = field(default_factory=frozenset)
    """What happened on the way: "prompt_truncated", "chosen_truncated", "boundary_merge", ..."""
    numbers: PairNumbers = NO_NUMBERS
    chosen_scored: tuple[bool, ...] | None = None
    rejected_scored: tuple[bool, ...] | None = None
    """One entry a token of the completion. None: all are scored, as is a mask that says so."""

    def __post_init__(self) -> None:
        for side, ids in (("chosen", self.chosen_ids), ("rejected", self.rejected_ids)):
            mask = getattr(self, f"{side}_scored")
            if mask is None:
                continue
            if len(mask) != len(ids):
                raise ValueError(
                    f"pair {self.id}: {side}_scored has {len(mask)} entries for {len(ids)} tokens"
                )
            if not any(mask):
                raise ValueError(f"pair {self.id}: {side}_scored leaves no token to score")
            if all(mask):  # one pair, one value: equal, and stored under one key
                object.__setattr__(self, f"{side}_scored", None)

    @property
    def completions(self) -> tuple[Completion, Completion]:
        """Chosen, then rejected."""
        return (
            Completion(self.chosen_ids, self.chosen_scored or (True,) * len(self.chosen_ids)),
            Completion(self.rejected_ids, self.rejected_scored or (True,) * len(self.rejected_ids)),
        )

    @property
    def masks(self) -> tuple[tuple[bool, ...] | None, ...]:
        """The two masks, for what is to tell pairs apart; () where every token is scored."""
        both = (self.chosen_scored, self.rejected_scored)
        return both if any(both) else ()

    @property
    def chosen_tokens(self) -> int:
        """Scored tokens of the chosen completion."""
        return sum(self.completions[0].scored)

    @property
    def rejected_tokens(self) -> int:
        """Scored tokens of the rejected completion."""
        return sum(self.completions[1].scored)

    @property
    def scored_tokens(self) -> int:
        """Scored tokens of both completions."""
        return self.chosen_tokens + self.rejected_tokens

    @property
    def longest(self) -> int:
        """Tokens of the prompt with the longer of its two completions, scored or not."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))

    @property
    def shorter(self) -> int:
        """Scored tokens of the completion that has fewer of them."""
        return min(self.chosen_tokens, self.rejected_tokens)


@dataclass(frozen=True)
class PairLogps:
    """log π(chosen|x) and log π(rejected|x), summed over scored tokens; each of shape [pairs].

    A part of the sums stands beside them for losses that treat it otherwise (losses/inputs.py).
    """

    chosen: torch.Tensor
    rejected: torch.Tensor
    chosen_tail: torch.Tensor | None = None
    rejected_tail: torch.Tensor | None = None
    """Of these sums what follows as many scored tokens as the side with fewer has; 0 for that one.

    Engines always give it, with gradients as the sums have; None: not known.
    """
    chosen_squares: torch.Tensor | None = None
    rejected_squares: torch.Tensor | None = None
    """log Σ_v π(v|...)² over the vocabulary, summed over scored tokens, without gradients.

    None unless the engine was made to give it (`use_weighting`), and for a reference.
    """

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> PairLogps:
        """`change` done to each tensor that is there."""
        return PairLogps(**{name: change(t) for name, t in vars(self).items() if t is not None})

    @property
    def sums(self) -> dict[str, torch.Tensor]:
        """Those of the log-probabilities by their names, through which gradients flow."""
        kept = ("chosen", "rejected", "chosen_tail", "rejected_tail")
        return {name: t for name, t in vars(self).items() if name in kept and t is not None}


Advance = Callable[[int], None]
"""Called with the number of units (pairs, steps) that were just finished."""


def no_progress(_: int) -> None:
    """An `Advance` for those who do not watch."""
