"""The exact fast engine: DPO's loss and gradients, doing only the work that the loss needs.

    once a pair     stream P C R -> trunk (frozen layers) -> kept
                    kept -> top -> final norm -> head on completion positions -> reference logps, kept
    every epoch     kept -> top -> final norm -> head -> policy logps -> loss -> backward to the boundary

Before the first update the policy is the reference, so the reference's log-probabilities come from the
policy itself; no second model exists. engine/plain.py is what all of this is held against.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from transformers import PreTrainedModel

from smoldpo.engine.base import LossFunction, join
from smoldpo.engine.head import completion_logps
from smoldpo.engine.packing import PackedBatch, by_length, cut_by_tokens, pack
from smoldpo.engine.precision import MasterWeights, free_memory
from smoldpo.engine.trunk import boundary, cut
from smoldpo.models.attention import shared_prefix
from smoldpo.types import Advance, PairLogps, TokenizedPair, no_progress

MAX_TOKENS = 4096
"""Tokens of a stream: enough to keep matrix products busy, little enough for a laptop's memory."""
KEEP_SHARE = 0.5
"""Trunk states may take this share of the memory that is free at the start; the rest is recomputed."""


class Scorer:
    """Log-probabilities of packed pairs under one model, cut at the boundary of what trains."""

    def __init__(self, model: PreTrainedModel, at: int):
        self.model = model
        self.trunk, self.top = cut(model, at)
        self.head = model.get_output_embeddings().weight

    @torch.no_grad()
    def trunk_states(self, batch: PackedBatch) -> torch.Tensor:
        """What the frozen layers give for the stream: [T, D]; without a trunk, token embeddings."""
        if self.trunk is None:
            raise ValueError("this model has no trunk")
        with shared_prefix(self.trunk):
            states = self.trunk(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                segments=batch.segments,
                use_cache=False,
            ).last_hidden_state
        return states[0]

    def logps(self, batch: PackedBatch, states: torch.Tensor | None) -> PairLogps:
        """Log-probabilities of each pair's sides, [B] each, from trunk states [T, D] or from tokens."""
        start = (
            {"input_ids": batch.input_ids} if states is None else {"inputs_embeds": states[None]}
        )
        with shared_prefix(self.top):
            top = self.top(
                **start, position_ids=batch.position_ids, segments=batch.segments, use_cache=False
            ).last_hidden_state[0]
        return batch.logps(completion_logps(top[batch.predictors], self.head, batch.targets))


@torch.no_grad()
def score(
    model: PreTrainedModel, pairs: Sequence[TokenizedPair], advance: Advance = no_progress
) -> PairLogps:
    """Log-probabilities of pairs under one model that does not train, on the CPU, in their order."""
    scorer = Scorer(model, 0)
    return _in_order(
        pairs, MAX_TOKENS, model.device, lambda _, batch: scorer.logps(batch, None), advance
    )


def _in_order(
    pairs: Sequence[TokenizedPair],
    max_tokens: int,
    device: torch.device,
    logps_of: Callable[[Sequence[TokenizedPair], PackedBatch], PairLogps],
    advance: Advance,
) -> PairLogps:
    """Go through pairs in batches of like length; the results are in the pairs' own order."""
    chosen, rejected = [torch.empty(0)] * len(pairs), [torch.empty(0)] * len(pairs)
    for indices in by_length(pairs, max_tokens):
        some = [pairs[index] for index in indices]
        logps = logps_of(some, pack(some, device))
        for index, ours, theirs in zip(
            indices, logps.chosen.cpu(), logps.rejected.cpu(), strict=True
        ):
            chosen[index], rejected[index] = ours, theirs
        advance(len(some))
    return PairLogps(torch.stack(chosen), torch.stack(rejected))


class FastEngine:
    """One model, cut at the freeze boundary; implements engine/base.py's protocol.

    Args:
        policy: its weights in the compute dtype, `requires_grad` set on what trains.
        masters: what trains, in float32 (or float64), for the optimizer.
        reference: a model of its own, only where the reference is not the policy's start.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        masters: MasterWeights,
        reference: PreTrainedModel | None = None,
        max_tokens: int = MAX_TOKENS,
    ):
        self.device = policy.device
        self.max_tokens = max_tokens
        self._masters = masters
        self._policy = Scorer(policy, boundary(policy))
        self._reference = None if reference is None else Scorer(reference, 0)
        self._states: dict[TokenizedPair, torch.Tensor] = {}
        self._room = KEEP_SHARE * free_memory(self.device)
        self._reference_logps: dict[TokenizedPair, tuple[torch.Tensor, torch.Tensor]] = {}
        self._updates = 0

    def trainable_parameters(self) -> Iterable[tuple[str, torch.nn.Parameter]]:
        return self._masters.named()

    def updated(self) -> None:
        """The optimizer has moved the master weights: bring the computing ones up to date."""
        self._masters.publish()
        self._updates += 1

    def prepare(self, pairs: Sequence[TokenizedPair], advance: Advance = no_progress) -> None:
        """Trunk states and reference log-probabilities of these pairs, each computed once.

        Must see every pair before the first update: afterwards the policy is no longer the reference.
        """
        todo = [pair for pair in dict.fromkeys(pairs) if pair not in self._reference_logps]
        advance(len(pairs) - len(todo))
        if todo and self._updates and self._reference is None:
            raise RuntimeError(
                "the reference is gone: prepare() must see every pair before training"
            )
        with torch.no_grad():
            for indices in by_length(todo, self.max_tokens):
                some = [todo[index] for index in indices]
                batch = pack(some, self.device)
                states = self._compute_states(some, batch)
                if self._reference is None:
                    logps = self._policy.logps(batch, states)
                else:
                    logps = self._reference.logps(batch, None)
                for number, pair in enumerate(some):
                    self._reference_logps[pair] = (logps.chosen[number], logps.rejected[number])
                advance(len(some))

    def _compute_states(
        self, pairs: Sequence[TokenizedPair], batch: PackedBatch
    ) -> torch.Tensor | None:
        if self._policy.trunk is None:
            return None
        states = self._policy.trunk_states(batch)
        for pair, segment in zip(pairs, batch.segments, strict=True):
            own = states[segment.start : segment.start + segment.length]
            size = own.numel() * own.element_size()
            if pair not in self._states and size <= self._room:
                # A copy, so that one pair does not keep the whole stream alive.
                self._states[pair] = own.clone()
                self._room -= size
        return states

    def _kept_states(
        self, pairs: Sequence[TokenizedPair], batch: PackedBatch
    ) -> torch.Tensor | None:
        if self._policy.trunk is None:
            return None
        if any(pair not in self._states for pair in pairs):
            return self._compute_states(pairs, batch)
        return torch.cat([self._states[pair] for pair in pairs])

    def reference_logps(
        self, pairs: Sequence[TokenizedPair], advance: Advance = no_progress
    ) -> PairLogps:
        self.prepare(pairs, advance)
        sides = [self._reference_logps[pair] for pair in pairs]
        return PairLogps(
            torch.stack([chosen for chosen, _ in sides]).cpu(),
            torch.stack([rejected for _, rejected in sides]).cpu(),
        )

    @torch.no_grad()
    def policy_logps(
        self, pairs: Sequence[TokenizedPair], advance: Advance = no_progress
    ) -> PairLogps:
        return _in_order(
            pairs,
            self.max_tokens,
            self.device,
            lambda some, batch: self._policy.logps(batch, self._kept_states(some, batch)),
            advance,
        )

    def accumulate_gradients(
        self, pairs: Sequence[TokenizedPair], loss: LossFunction, advance: Advance = no_progress
    ) -> tuple[torch.Tensor, PairLogps, PairLogps]:
        self.prepare(pairs)
        losses, policies, references = [], [], []
        with self._masters.collecting():
            for indices in cut_by_tokens(pairs, self.max_tokens):
                some = [pairs[index] for index in indices]
                batch = pack(some, self.device)
                policy = self._policy.logps(batch, self._kept_states(some, batch))
                kept = [self._reference_logps[pair] for pair in some]
                reference = PairLogps(
                    torch.stack([chosen for chosen, _ in kept]),
                    torch.stack([rejected for _, rejected in kept]),
                )
                each = loss(policy, reference)
                (each.sum() / len(pairs)).backward()
                losses.append(each.detach())
                policies.append(PairLogps(policy.chosen.detach(), policy.rejected.detach()))
                references.append(reference)
                advance(len(some))
        return torch.cat(losses), join(policies), join(references)
