"""Cleaning: rules that mend a pair, drop it, or warn about it, so that every row is accounted for.

    pair -> mends -> drops -> warnings -> remembered -> (at the end) rules that compare rows

A `Cleaner` takes pairs one by one and keeps hashes of them, not texts. Its `finish` decides what
can only be decided with all rows seen, and says which of the pairs it gave back are to be kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from smoldpo.data.cleaning import rules as checks
from smoldpo.data.cleaning.duplicates import EvaluationPrompts, Memory
from smoldpo.data.cleaning.text import excerpt, first_difference, tail
from smoldpo.types import PreferencePair
from smoldpo.utils.errors import UsageError, nearest

DROP, MEND, WARN = "drop", "mend", "warn"


@dataclass(frozen=True, slots=True)
class Touched:
    """A row that a rule touched: where it stood, what was done, and the text before and after.

    `after` is None unless the row was mended. Texts are excerpts, with hidden characters escaped.
    """

    file: str
    row: int
    rule: str
    action: str
    detail: str
    before: str = ""
    after: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Rule:
    """What a rule does to a row, in words."""

    action: str
    about: str


RULES: dict[str, Rule] = {
    "invalid_unicode": Rule(MEND, "half of a surrogate pair: becomes U+FFFD"),
    "control_characters": Rule(MEND, "NUL and other control characters: taken out"),
    "bidi_controls": Rule(MEND, "bidirectional overrides and embeddings: taken out"),
    "transcript_residue": Rule(MEND, 'an answer that ends in "\\n\\nHuman" or the like: cut there'),
    "empty_prompt": Rule(DROP, "nothing to answer"),
    "empty_chosen": Rule(DROP, "the chosen answer is empty"),
    "empty_rejected": Rule(DROP, "the rejected answer is empty"),
    "identical": Rule(DROP, "both answers are the same"),
    "near_identical": Rule(DROP, "both answers are nearly the same, numbers included"),
    "not_alternating": Rule(DROP, "one speaker has two turns in a row"),
    "not_user_last": Rule(DROP, "the prompt does not end with the user"),
    "eval_prompt": Rule(DROP, "the prompt also stands in evaluation"),
    "contradictory": Rule(DROP, "elsewhere the same two answers are ranked the other way"),
    "exact_duplicate": Rule(DROP, "the pair stood before"),
    "near_duplicate": Rule(WARN, "nearly the same pair stood before (MinHash)"),
    "eval_prompt_near": Rule(WARN, "nearly the same prompt stands in evaluation (MinHash)"),
    "role_label": Rule(WARN, "another speaker's label inside an answer"),
    "forged_control_token": Rule(WARN, "a control token written out; never encoded as one"),
    "cut_off": Rule(WARN, "an answer ends in the middle"),
    "refusal": Rule(WARN, "an answer declines"),
    "mixed_language": Rule(WARN, "question and answer in two languages (off by default)"),
    "long_prompt": Rule(WARN, "truncation will take the prompt's oldest tokens"),
    "long_answer": Rule(WARN, "truncation will take an answer's end"),
    "not_tokenizable": Rule(WARN, "the model's chat template refuses the dialogue"),
}
"""Every rule that can be turned off, in the order in which they are applied. A schema's reader sets
rows aside under names of its own (prompts_differ, unparsable, ...): they hold no pair to keep."""

OFF_BY_DEFAULT = frozenset({"mixed_language"})
NEEDS_TOKENS = frozenset({"long_prompt", "long_answer", "not_tokenizable"})
EVALUATION = frozenset(
    {"invalid_unicode", "empty_prompt", "empty_chosen", "empty_rejected", "identical"}
)
"""What is applied to pairs that judge a model: only what keeps a pair from being scored. All other
rows are scored as they stand, byte for byte."""


@dataclass(frozen=True)
class RuleSet:
    """The rules that are on, and what they are told."""

    on: frozenset[str] = frozenset(RULES) - OFF_BY_DEFAULT
    near_identical: float = 0.95
    control_tokens: tuple[str, ...] = ()

    def __contains__(self, rule: str) -> bool:
        return rule in self.on


def choose_rules(
    off: Iterable[str] = (),
    on: Iterable[str] = (),
    *,
    near_identical: float = 0.95,
    control_tokens: tuple[str, ...] = (),
) -> RuleSet:
    """The default rules without `off` and with `on`.

    Raises:
        UsageError: a rule that is not known, or a threshold that is none.
    """
    off, on = frozenset(off), frozenset(on)
    for name in sorted(off | on):
        if name not in RULES:
            raise UsageError(
                f"no rule is called {name!r}{nearest(name, RULES)}; "
                f"the rules are: {', '.join(RULES)}"
            )
    if not 0 < near_identical <= 1:
        raise UsageError(
            f"the threshold near_identical is {near_identical}; give 0 to 1, such as 0.95"
        )
    chosen = (frozenset(RULES) - OFF_BY_DEFAULT - off) | on
    return RuleSet(chosen, near_identical, control_tokens)


def evaluation_rules(off: Iterable[str] = ()) -> RuleSet:
    """The rules for pairs that judge a model (see EVALUATION), without `off`."""
    chosen = choose_rules(off)
    return replace(chosen, on=chosen.on & EVALUATION)


Says = Callable[[PreferencePair], checks.Finding | None]


class Cleaner:
    """Applies rules to a stream of pairs and accounts for every one they touch.

    Attributes:
        touched: what was done so far, in the order of reading; rules across rows come at the end.
    """

    def __init__(self, rules: RuleSet | None = None, judged: EvaluationPrompts | None = None):
        self.rules = rules or RuleSet()
        self.touched: list[Touched] = []
        judged = judged if self.rules.on & {"eval_prompt", "eval_prompt_near"} else None
        self.memory = Memory("near_duplicate" in self.rules, judged)
        tokens = checks.control_token_pattern(self.rules.control_tokens)
        drops: dict[str, Says] = {
            "empty_prompt": checks.empty_prompt,
            "empty_chosen": checks.empty_chosen,
            "empty_rejected": checks.empty_rejected,
            "identical": checks.identical,
            "near_identical": lambda p: checks.near_identical(p, self.rules.near_identical),
            "not_alternating": checks.not_alternating,
            "not_user_last": checks.not_user_last,
        }
        warnings: dict[str, Says] = {
            "role_label": checks.role_label,
            "forged_control_token": lambda pair: checks.forged_control_token(pair, tokens),
            "cut_off": checks.cut_off,
            "refusal": checks.refusal,
            "mixed_language": checks.mixed_language,
        }
        self._drops = {name: says for name, says in drops.items() if name in self.rules}
        self._warnings = {name: says for name, says in warnings.items() if name in self.rules}
        self._mends = {name: do for name, do in checks.EVERYWHERE.items() if name in self.rules}
        self._answer_mends = {name: do for name, do in checks.ANSWERS.items() if name in self.rules}

    def clean(self, pair: PreferencePair) -> PreferencePair | None:
        """The pair, mended where need be; None where it is dropped."""
        kept = self.clean_row(pair)
        if kept is not None:
            self.memory.add(kept)
        return kept

    def clean_row(self, pair: PreferencePair) -> PreferencePair | None:
        """As `clean`, but the pair is not remembered: for who does not compare rows."""
        pair = self.mend(pair)
        for name, says in self._drops.items():
            if (found := says(pair)) is not None:
                self.touch(pair, name, *found)
                return None
        for name, says in self._warnings.items():
            if (found := says(pair)) is not None:
                self.touch(pair, name, *found)
        return pair

    def finish(self) -> np.ndarray:
        """Compare the rows with each other: which of the pairs that `clean` gave are kept, [N]."""
        kept = np.ones(len(self.memory.places), bool)
        for name in ("eval_prompt", "contradictory", "exact_duplicate"):
            if name in self.rules:
                self._decide(getattr(self.memory, name)(kept.copy()), kept)
        for name in ("near_duplicate", "eval_prompt_near"):
            if name in self.rules:
                self._decide(getattr(self.memory, name)(kept.copy()), kept)
        return kept

    def _decide(self, decisions: Iterable[tuple[int, str, str]], kept: np.ndarray) -> None:
        for index, rule, detail in decisions:
            file, row = self.memory.places[index]
            action = RULES[rule].action
            before = self.memory.excerpts[index]
            self.touched.append(Touched(file, row, rule, action, detail, before))
            kept[index] &= action != DROP

    def touch(self, pair: PreferencePair, rule: str, detail: str, before: str = "") -> None:
        """Put a rule's finding about `pair` on record."""
        action = RULES[rule].action
        self.touched.append(Touched(pair.file, pair.row, rule, action, detail, before))

    def mend(self, pair: PreferencePair) -> PreferencePair:
        """The pair with what can be mended mended; what is dropped or warned about stays."""
        if not (self._mends or self._answer_mends):
            return pair
        prompt = self._mend_prompt(pair)
        chosen = self._mend_answer(pair, "chosen", pair.chosen)
        rejected = self._mend_answer(pair, "rejected", pair.rejected)
        if (prompt, chosen, rejected) == (pair.prompt, pair.chosen, pair.rejected):
            return pair
        return replace(pair, prompt=prompt, chosen=chosen, rejected=rejected)

    def _mend_prompt(self, pair: PreferencePair) -> Any:
        if isinstance(pair.prompt, str):
            return self._mend_text(pair, "the prompt", pair.prompt)
        return tuple(self._mend_value(pair, message) for message in pair.prompt)

    def _mend_value(self, pair: PreferencePair, value: Any) -> Any:
        """A message, and whatever lies in it (tool calls are nested), with every text mended."""
        if isinstance(value, str):
            return self._mend_text(pair, "the prompt", value)
        if isinstance(value, dict):
            return {key: self._mend_value(pair, item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._mend_value(pair, item) for item in value]
        return value

    def _mend_answer(self, pair: PreferencePair, where: str, text: str) -> str:
        text = self._mend_text(pair, where, text)
        for name, mend in self._answer_mends.items():
            mended = mend(text)
            if mended != text:
                self._mended(
                    pair, name, f"{where} ends in another's turn", tail(text), tail(mended)
                )
                text = mended
        return text

    def _mend_text(self, pair: PreferencePair, where: str, text: str) -> str:
        if not checks.ANYTHING.search(text):
            return text
        for name, mend in self._mends.items():
            mended = mend(text)
            if mended != text:
                at = first_difference(text, mended)
                before, after = excerpt(text, at), excerpt(mended, at)
                self._mended(pair, name, f"in {where}", before, after)
                text = mended
        return text

    def _mended(
        self, pair: PreferencePair, rule: str, detail: str, before: str, after: str
    ) -> None:
        self.touched.append(Touched(pair.file, pair.row, rule, MEND, detail, before, after))
