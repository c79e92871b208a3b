"""Warnings about what a pair's texts say: a person decides; nothing is changed.

Each function takes a pair and gives what was seen, with the piece of text that shows it, or None.
"""

from __future__ import annotations

import re

from smoldpo.data.rules.excerpts import excerpt, tail
from smoldpo.data.rules.sides import Finding
from smoldpo.types import PreferencePair

ROLE_LABEL = re.compile(
    r"(?:^|\n)[ \t]*(?:(?:Human|Assistant|User)[ \t]?:"
    r"|\#\#\#[ \t]*(?:Human|Assistant|User|Instruction|Input|Response)[ \t]*:)"
)
CONTROL_TOKENS = (
    r"<\|[a-zA-Z][\w ]{1,30}\|>"  # ChatML, GPT-2, Llama 3, Phi, Qwen, ...
    r"|<｜[^｜<>]{1,40}｜>"  # DeepSeek
    r"|\[/?INST\]|<<SYS>>|<</SYS>>"  # Llama 2, Mistral
    r"|\[(?:TOOL_CALLS|AVAILABLE_TOOLS|TOOL_RESULTS|/AVAILABLE_TOOLS|/TOOL_RESULTS|gMASK)\]"
    r"|</?s>|<(?:bos|eos|pad|unk|start_of_turn|end_of_turn)>"  # Llama, Gemma
)
REFUSAL = re.compile(
    r"\b(?:i(?:['’]m| am)(?: very| really| so)? sorry,?(?: but)?,? (?:but )?i (?:can(?:no|['’])t|am"
    r" (?:not able|unable)|won['’]t)"
    r"|i(?:['’]m| am) (?:not able|unable) to (?:help|assist|provide|answer|fulfil+|comply|discuss"
    r"|complete|generate|create|give you)"
    r"|i (?:can(?:no|['’])t|won['’]t|will not) (?:help|assist|comply|fulfil+|provide|engage|support"
    r"|answer|discuss|participate|generate|do that|give you)"
    r"|i(?:['’]d| would) rather not"
    r"|as an? (?:ai|artificial intelligence)[\w ]*,? i (?:can(?:no|['’])t|am (?:not able|unable)"
    r"|do(?: not|n['’]t) (?:have|feel)))",
    re.IGNORECASE,
)
REFUSES_WITHIN = 160
"""A refusal stands at the beginning; later in an answer the same words are usually advice."""

SENTENCE_END = re.compile(r"[.!?…。！？][\"'”’)\]*_]*\s")
WORD_AT_END = re.compile(r"[^\W\d_]+\Z|[,;]\Z")
NO_LAST_WORDS = frozenset(
    re.split(
        r"\s+",
        "a an the of to in on at for from with by and or but nor if because as than that which who "
        "whose is are was were be been being has have had will would can could should may might "
        "must your my his their its our into about between this these those such very",
    )
)
LONG = 20
"""Words from which on an answer is expected to end like a text."""


def sides(pair: PreferencePair) -> tuple[tuple[str, str], tuple[str, str]]:
    return ("chosen", pair.chosen), ("rejected", pair.rejected)


def role_label(pair: PreferencePair) -> Finding | None:
    """An answer with another speaker's label in it: it runs on into turns that are not its own."""
    for side, text in sides(pair):
        if ":" in text and (found := ROLE_LABEL.search(text)):
            label = found.group().strip()
            return f"{side} holds the role label {label!r}", excerpt(text, found.start())
    return None


def control_token_pattern(tokens: tuple[str, ...] = ()) -> re.Pattern[str]:
    """Control tokens of the usual model families, and these `tokens` of one model."""
    own = sorted(map(re.escape, tokens), key=len, reverse=True)
    return re.compile("|".join([*own, CONTROL_TOKENS]))


def forged_control_token(pair: PreferencePair, pattern: re.Pattern[str]) -> Finding | None:
    """A control token written out in a text: never encoded as one, but odd to learn from."""
    texts = [*sides(pair)]
    if isinstance(pair.prompt, str):
        texts.append(("the prompt", pair.prompt))
    else:
        said = (message.get("content") for message in pair.prompt)
        texts += [("the prompt", text) for text in said if isinstance(text, str)]
    for where, text in texts:
        if ("<" in text or "[" in text) and (found := pattern.search(text)):
            return f"{where} holds {found.group()!r}", excerpt(text, found.start())
    return None


def cut_off(pair: PreferencePair) -> Finding | None:
    """An answer that stops in the middle: made to be right when it speaks, not to find all."""
    for side, text in sides(pair):
        how = _breaks_off(text.rstrip())
        if how:
            return f"{side} {how}", tail(text.rstrip())
    return None


def _breaks_off(text: str) -> str | None:
    if text.count("```") % 2:
        return "opens a code block and does not close it"
    last = WORD_AT_END.search(text[-40:])
    if not last or len(text) < 4 * LONG:
        return None
    line = text[text.rfind("\n") + 1 :]
    ends = [match.end() for match in SENTENCE_END.finditer(line)]
    fragment = line[ends[-1] if ends else 0 :].split() or [last.group()]
    if last.group().lower() in NO_LAST_WORDS:
        unfinished = len(fragment) >= 2 or bool(ends)
    else:
        # Titles, list items, tags, links and greetings ("Kind regards") end without a stop by
        # right, and someone who never ends a sentence has not broken off here either.
        stops = len(SENTENCE_END.findall(text)) >= 2
        prose = len(line.split()) >= LONG or last.group() in ",;"
        address = "." in fragment[-1] or "/" in fragment[-1] or fragment[-1][0] in "#@"
        unfinished = stops and prose and len(fragment) >= 5 and not address
    return f"ends in the middle of a sentence ({last.group()!r})" if unfinished else None


def refusal(pair: PreferencePair) -> Finding | None:
    """An answer that declines. On the chosen side it teaches the model to decline."""
    for side, text in sides(pair):
        if REFUSAL.search(text[:REFUSES_WITHIN]):
            meaning = ": the model learns to refuse here" if side == "chosen" else ""
            return f"{side} refuses{meaning}", excerpt(text)
    return None
