"""Reward models: a number for an answer, from a sequence classifier with a single label."""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from smoldpo.data.tokenize import PairTokenizer, render
from smoldpo.errors import ModelError
from smoldpo.models.load import ModelSource, _explained, load_tokenizer, positions
from smoldpo.models.quiet import quiet
from smoldpo.reach import cached_only
from smoldpo.types import PreferencePair, Prompt


class RewardModel:
    """A reward model with its own tokenizer, in the precision that its weights are stored in."""

    def __init__(self, source: ModelSource, device: str):
        """Load it.

        Raises:
            ModelError: it cannot be loaded, has not one label, lacks weights, or has no chat template.
        """
        self.model = _load(source).to(device).eval()
        self.tokenizer = load_tokenizer(source)
        if not self.tokenizer.chat_template:
            raise ModelError(
                f"{source.name}: its tokenizer has no chat template, so it cannot be told which words are "
                "the prompt's and which the answer's; give a reward model for chats"
            )
        # What the template puts behind the end of turn (a line break) is part of what such models read.
        room = positions(self.model) or sys.maxsize
        self.reader = PairTokenizer(self.tokenizer, room)
        self._behind = self._ids_behind_answer()
        self.reader.max_length = room - len(self._behind)

    @torch.no_grad()
    def reward(self, prompt: Prompt, answer: str) -> float:
        """The model's number for this answer; comparable between answers to one prompt.

        Raises:
            DataError: the chat template refuses the dialogue.
        """
        ids = torch.tensor([self.ids(prompt, answer)], device=self.model.device)
        logits = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        return logits.double().item()

    def ids(self, prompt: Prompt, answer: str) -> list[int]:
        """The dialogue as the chat template writes it, the answer its last turn.

        Control tokens spelled out in a text are read as text (data/tokenize.py), or an answer could end its
        own turn and go on as somebody else.
        """
        pair = self.reader.tokenize(PreferencePair(prompt, answer, answer))
        return [*pair.prompt_ids, *pair.chosen_ids, *self._behind]

    def _ids_behind_answer(self) -> list[int]:
        turn = self.reader.turn
        assert turn is not None
        dialogue = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]
        whole = render(self.tokenizer, dialogue, add_generation_prompt=False)
        _, found, behind = whole.rpartition(turn.end_of_turn)
        return self.tokenizer(behind, add_special_tokens=False)["input_ids"] if found else []


def _load(source: ModelSource) -> PreTrainedModel:
    try:
        with quiet(), cached_only(source.cached_only):
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                source.location,
                dtype="auto",
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except Exception as error:  # as in models/load.py
        raise _explained(source, error, "reward model") from None
    if loading["missing_keys"]:  # a language model, say: transformers makes up a head at random
        lacking = ", ".join(sorted(loading["missing_keys"])[:3])
        raise ModelError(f"{source.name}: is no reward model; its weights lack {lacking}")
    if model.config.num_labels != 1:
        raise ModelError(
            f"{source.name}: is a classifier of {model.config.num_labels} labels; a reward model has one"
        )
    return model
