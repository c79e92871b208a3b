"""Rules on one pair: checks, which lead to a drop or a warning, and mends.

A check takes a pair and returns what is wrong with the piece of text that shows it, or None. A mend
takes a text and returns it mended; a text without the fault comes back as it was.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from functools import partial

from rapidfuzz import fuzz

from smoldpo.data.cleaning.text import (
    SURROGATE,
    excerpt,
    first_difference,
    mend_unicode,
    prompt_text,
    tail,
)
from smoldpo.types import PreferencePair, Prompt

Problem = tuple[str, str]
"""What is wrong, and the piece of text that shows it."""
Check = Callable[[PreferencePair], Problem | None]

NUMBER = re.compile(r"\d+")
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
_NO_LAST_WORDS = (
    "a an the of to in on at for from with by and or but nor if because as than that which who "
    "whose is are was were be been being has have had will would can could should may might must "
    "your my his their its our into about between this these those such very"
)
NO_LAST_WORDS = frozenset(_NO_LAST_WORDS.split())
LONG_TEXT = 20
"""Words from which on an answer is expected to end like a text."""
REPEATED_WORDS = 3
"""Words that a question needs; an answer may well begin with a shorter one ("Paris")."""
MAY_FOLLOW = {
    "user": ("", "assistant", "tool"),
    "assistant": ("", "user", "tool"),
    "tool": ("assistant", "tool"),
}
"""Who may have spoken before each role; "" is the beginning. A greeting may open a dialogue."""

INSTRUCTIONS = ("system", "developer")

CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
"""C0 controls but for tab, line feed and carriage return; and DEL."""
BIDI = re.compile("[\u202a-\u202e\u2066-\u2069]")
"""Embeddings, overrides and isolates. Marks that right-to-left text needs (U+200E, U+200F) stay."""

MENDABLE = re.compile(f"{SURROGATE.pattern}|{CONTROL.pattern}|{BIDI.pattern}")

RESIDUE = re.compile(
    r"\n(?:\n(?:Human|Assistant)"
    r"|(?:Human|Assistant|User)[ \t]*:"
    r"|\#\#\#[ \t]*(?:Human|Assistant|User|Instruction|Input|Response)[ \t]*:?)\Z"
)
"""The mark of a next turn that never came. Without a colon it counts after an empty line only."""
TAIL = 60

WORD = re.compile(r"[^\W\d_]+")
SCRIPTS = {
    "Cyrillic": re.compile("[\u0400-\u04ff]"),
    "Greek": re.compile("[\u0370-\u03ff]"),
    "Hebrew": re.compile("[\u0590-\u05ff]"),
    "Arabic": re.compile("[\u0600-\u06ff]"),
    "Devanagari": re.compile("[\u0900-\u097f]"),
    "Thai": re.compile("[\u0e00-\u0e7f]"),
    "Japanese": re.compile("[\u3040-\u30ff]"),
    "Korean": re.compile("[\uac00-\ud7af]"),
    "Chinese": re.compile("[\u4e00-\u9fff]"),
}
STOP_WORDS = {
    "English": "the and is are you that it was for with this have not what can they would how your",
    "German": "der die das und ist nicht ich sie mit ein eine für auf wie auch sich zu dem den",
    "French": "le les des et est une que pour dans qui pas vous avec sur ce sont il nous au du",
    "Spanish": "el los las y es una que para en por con no se del como más pero está son lo",
    "Italian": "il gli e è una che per di non con sono del della come più anche questo si nel",
    "Portuguese": "os as e é uma que para em não com do da como mais mas você são se no por",
    "Dutch": "de het een en is niet dat van je ik op te voor met zijn er maar ook aan wat",
}
STOP_SETS = {language: frozenset(words.split()) for language, words in STOP_WORDS.items()}
LANGUAGE_SAMPLE = 8
"""Words that a text needs before its language is told."""


def empty_prompt(pair: PreferencePair) -> Problem | None:
    if isinstance(pair.prompt, str):
        return None if pair.prompt.strip() else ("the prompt is empty", excerpt(pair.prompt))
    if not pair.prompt:
        return "the prompt has no messages", ""
    last = pair.prompt[-1].get("content") or pair.prompt[-1].get("tool_calls")
    return None if last and str(last).strip() else ("the prompt's last message is empty", "")


def empty_chosen(pair: PreferencePair) -> Problem | None:
    return None if pair.chosen.strip() else ("chosen is empty", excerpt(pair.rejected))


def empty_rejected(pair: PreferencePair) -> Problem | None:
    return None if pair.rejected.strip() else ("rejected is empty", excerpt(pair.chosen))


def identical(pair: PreferencePair) -> Problem | None:
    """The same text on both sides, white space at the ends aside."""
    if pair.chosen.strip() != pair.rejected.strip():
        return None
    return "chosen and rejected are the same", excerpt(pair.chosen)


def near_identical(pair: PreferencePair, threshold: float) -> Problem | None:
    """Sides that are alike to `threshold` (Indel similarity, 0 to 1), but for one that counts.

    Where the sides hold different numbers they are not alike, however long the rest: a wrong
    figure is a real reason to reject an answer.
    """
    alike = fuzz.ratio(pair.chosen, pair.rejected, score_cutoff=100 * threshold)
    if not alike or NUMBER.findall(pair.chosen) != NUMBER.findall(pair.rejected):
        return None
    at = first_difference(pair.chosen, pair.rejected)
    both = f"{excerpt(pair.chosen, at, 40)} / {excerpt(pair.rejected, at, 40)}"
    return f"chosen and rejected are {min(alike, 99.9):.1f}% alike", both


def not_alternating(pair: PreferencePair) -> Problem | None:
    """Two turns of one speaker in a row; system prompts may stand anywhere."""
    if isinstance(pair.prompt, str):
        return None
    before = ""
    for number, message in enumerate(pair.prompt, 1):
        role = message["role"]
        if role in INSTRUCTIONS:
            continue
        if before not in MAY_FOLLOW[role]:
            what = f"message {number} ({role}) follows {before or 'nothing'}"
            return what, tail(prompt_text(pair.prompt))
        before = role
    return None


def not_user_last(pair: PreferencePair) -> Problem | None:
    """A prompt that ends with the assistant's own words, so that there is nothing to answer."""
    if isinstance(pair.prompt, str) or not pair.prompt:
        return None
    roles = [message["role"] for message in pair.prompt if message["role"] not in INSTRUCTIONS]
    if roles and roles[-1] in ("user", "tool"):
        return None
    last = roles[-1] if roles else "system prompt"
    return f"the prompt ends with the {last}", tail(prompt_text(pair.prompt))


def repeats_prompt(pair: PreferencePair) -> Problem | None:
    """A chosen answer that begins with the question: a text not parted into prompt and answer.

    A rejected one alone that does is what its pair teaches against.
    """
    asked = _last_question(pair.prompt).strip()
    if len(asked.split()) < REPEATED_WORDS or not pair.chosen.lstrip().startswith(asked):
        return None
    return "chosen begins with the whole question", excerpt(pair.chosen)


def _sides(pair: PreferencePair) -> tuple[tuple[str, str], tuple[str, str]]:
    return ("chosen", pair.chosen), ("rejected", pair.rejected)


def role_label(pair: PreferencePair) -> Problem | None:
    """An answer with another speaker's label in it: it runs on into turns that are not its own."""
    for side, text in _sides(pair):
        if ":" in text and (found := ROLE_LABEL.search(text)):
            label = found.group().strip()
            return f"{side} holds the role label {label!r}", excerpt(text, found.start())
    return None


def control_token_pattern(tokens: tuple[str, ...] = ()) -> re.Pattern[str]:
    """Control tokens of the usual model families, and these `tokens` of one model."""
    own = sorted(map(re.escape, tokens), key=len, reverse=True)
    return re.compile("|".join([*own, CONTROL_TOKENS]))


def forged_control_token(pair: PreferencePair, pattern: re.Pattern[str]) -> Problem | None:
    """A control token written out in a text: never encoded as one, but odd to learn from."""
    texts = [*_sides(pair)]
    if isinstance(pair.prompt, str):
        texts.append(("the prompt", pair.prompt))
    else:
        said = (message.get("content") for message in pair.prompt)
        texts += [("the prompt", text) for text in said if isinstance(text, str)]
    for where, text in texts:
        if ("<" in text or "[" in text) and (found := pattern.search(text)):
            return f"{where} holds {found.group()!r}", excerpt(text, found.start())
    return None


def cut_off(pair: PreferencePair) -> Problem | None:
    """An answer that stops in the middle: made to be right when it speaks, not to find all."""
    for side, text in _sides(pair):
        how = _breaks_off(text.rstrip())
        if how:
            return f"{side} {how}", tail(text.rstrip())
    return None


def _breaks_off(text: str) -> str | None:
    if text.count("```") % 2:
        return "opens a code block and does not close it"
    last = WORD_AT_END.search(text[-40:])
    if not last or len(text) < 4 * LONG_TEXT:
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
        prose = len(line.split()) >= LONG_TEXT or last.group() in ",;"
        address = "." in fragment[-1] or "/" in fragment[-1] or fragment[-1][0] in "#@"
        unfinished = stops and prose and len(fragment) >= 5 and not address
    return f"ends in the middle of a sentence ({last.group()!r})" if unfinished else None


def refusal(pair: PreferencePair) -> Problem | None:
    """An answer that declines. On the chosen side it teaches the model to decline."""
    for side, text in _sides(pair):
        if REFUSAL.search(text[:REFUSES_WITHIN]):
            meaning = ": the model learns to refuse here" if side == "chosen" else ""
            return f"{side} refuses{meaning}", excerpt(text)
    return None


def language_of(text: str) -> str | None:
    """The name of the text's language or script, or None where it cannot be told."""
    letters = len("".join(WORD.findall(text)))
    for script, pattern in SCRIPTS.items():
        if letters >= LANGUAGE_SAMPLE and len(pattern.findall(text)) > letters / 3:
            return script
    words = Counter(WORD.findall(text.lower()))
    if words.total() < LANGUAGE_SAMPLE:
        return None
    counts = {name: sum(words[word] for word in stop) for name, stop in STOP_SETS.items()}
    (best, most), (_, second) = Counter(counts).most_common(2)
    clear = most >= words.total() / 10 and most >= 1.5 * second
    return best if clear else None


def mixed_language(pair: PreferencePair) -> Problem | None:
    asked = language_of(_last_question(pair.prompt))
    for side, text in _sides(pair):
        answered = language_of(text)
        if asked and answered and asked != answered:
            return f"the question is in {asked}, {side} in {answered}", excerpt(text)
    return None


def _last_question(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    asked = [message.get("content") for message in prompt if message.get("role") == "user"]
    return str(asked[-1] or "") if asked else ""


_CHECKS = (
    empty_prompt, empty_chosen, empty_rejected, identical, not_alternating, not_user_last,
    repeats_prompt, role_label, cut_off, refusal, mixed_language,
)  # fmt: skip
CHECKS: dict[str, Check] = {check.__name__: check for check in _CHECKS}
"""Checks by rule name; `near_identical` and `forged_control_token` take a parameter."""


def mend_residue(answer: str) -> str:
    """The mark of a next turn at an answer's end is cut off, with the white space before it."""
    left, mended = answer.rstrip(), answer
    while found := RESIDUE.search(left[-TAIL:]):  # only the end is searched: fast for any text
        left = mended = left[: max(0, len(left) - TAIL) + found.start()].rstrip()
    return mended


TEXT_MENDS: dict[str, Callable[[str], str]] = {
    "invalid_unicode": mend_unicode,
    "control_characters": partial(CONTROL.sub, ""),
    "bidi_controls": partial(BIDI.sub, ""),
}
"""Mends for every text of a pair, in this order."""
