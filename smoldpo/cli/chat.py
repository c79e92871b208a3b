"""`smoldpo chat`: one answer, or a conversation on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from smoldpo.config.evaluate_options import evaluate_options
from smoldpo.data.template_settings import replace_template, tokenization
from smoldpo.data.tokenize import PairTokenizer
from smoldpo.models.generate import generate_answer
from smoldpo.models.load import find_model, load_model, load_tokenizer
from smoldpo.types import Message
from smoldpo.utils import progress
from smoldpo.utils.devices import pick_device
from smoldpo.utils.errors import UsageError
from smoldpo.utils.threads import default_threads


class Chat:
    """A model with the conversation so far."""

    def __init__(
        self,
        model: str,
        system: str | None,
        max_new_tokens: int,
        temperature: float,
        template: Mapping[str, Any] | None = None,
    ):
        import torch

        torch.set_num_threads(default_threads())
        source = find_model(model)
        with progress.spinner(f"loading {model}"):
            self.tokenizer = load_tokenizer(source)
            self.model = load_model(source, torch.float32, pick_device("auto"))
        window = getattr(self.model.config, "max_position_embeddings", 2048)
        options = evaluate_options(template or {})
        replace_template(self.tokenizer, options.chat_template)
        how = tokenization(window, vars(options), source.location)
        self.reader = PairTokenizer(self.tokenizer, how)
        self.room = window - max_new_tokens
        if system and not self.reader.is_chat:
            raise UsageError("--system needs a chat model; this one has no chat template")
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []
        self.max_new_tokens, self.temperature = max_new_tokens, temperature

    def answer(self, text: str) -> str:
        """Stream the answer to standard output, and remember both turns."""
        text = text.encode("utf-8", "replace").decode()  # input that was not UTF-8
        self.messages.append({"role": "user", "content": text})
        ids = self._prompt_ids(text)
        result = generate_answer(
            self.model,
            self.tokenizer,
            ids,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            write=_write,
        )
        _write("\n")
        self.messages.append({"role": "assistant", "content": result})
        return result

    def _prompt_ids(self, text: str) -> list[int]:
        """The conversation's tokens; where it is too long for the model, its oldest turns go."""
        while True:
            prompt = tuple(self.messages) if self.reader.is_chat else text
            ids = self.reader.prompt_ids(prompt)
            oldest = 1 if self.messages[0]["role"] == "system" else 0
            if len(ids) <= self.room:
                return ids
            if not self.reader.is_chat or len(self.messages) - oldest <= 1:
                raise UsageError(
                    f"the prompt has {len(ids):,} tokens, and the model room for {self.room:,} "
                    "beside its answer; shorten it, or lower --max-new-tokens"
                )
            progress.say(
                "(the conversation is too long for the model; its oldest turn is forgotten)"
            )
            del self.messages[oldest : oldest + 2]

    def converse(self) -> None:
        """Read a line, answer it, until the end of input, or /quit."""
        progress.say("Say something; /new forgets the conversation, /quit or Ctrl-D ends it.")
        while True:
            try:
                text = input("> " if sys.stdin.isatty() else "")
            except EOFError:
                return
            if text.strip() == "/quit":
                return
            if text.strip() == "/new":
                self.messages = [m for m in self.messages if m["role"] == "system"]
            elif text.strip():
                self.answer(text)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
