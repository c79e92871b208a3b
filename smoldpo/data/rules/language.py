"""A warning, off by default: an answer in another language than its question.

Told by script, and for Latin script by stop words: rough, small, and without a dependency. Short
texts and texts without stop words have no language here. A request to translate is a fair reason
for two languages, which is why nobody gets this warning unasked.
"""

from __future__ import annotations

import re
from collections import Counter

from smoldpo.data.rules.answers import sides
from smoldpo.data.rules.excerpts import excerpt
from smoldpo.data.rules.sides import Finding
from smoldpo.types import PreferencePair, Prompt

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
LONG = 8
"""Words that a text needs before its language is told."""


def language_of(text: str) -> str | None:
    """The name of the text's language or script, or None where it cannot be told."""
    letters = len("".join(WORD.findall(text)))
    for script, pattern in SCRIPTS.items():
        if letters >= LONG and len(pattern.findall(text)) > letters / 3:
            return script
    words = Counter(WORD.findall(text.lower()))
    if words.total() < LONG:
        return None
    counts = {name: sum(words[word] for word in stop) for name, stop in STOP_SETS.items()}
    (best, most), (_, second) = Counter(counts).most_common(2)
    clear = most >= words.total() / 10 and most >= 1.5 * second
    return best if clear else None


def mixed_language(pair: PreferencePair) -> Finding | None:
    asked = language_of(_last_question(pair.prompt))
    for side, text in sides(pair):
        answered = language_of(text)
        if asked and answered and asked != answered:
            return f"the question is in {asked}, {side} in {answered}", excerpt(text)
    return None


def _last_question(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    asked = [message.get("content") for message in prompt if message.get("role") == "user"]
    return str(asked[-1] or "") if asked else ""
