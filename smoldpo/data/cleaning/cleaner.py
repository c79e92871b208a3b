"""Cleaning: rules that mend a pair, drop it, or warn about it, so that every row is accounted for.

    pair -> mends -> drops -> warnings -> index -> (at the end) rules that compare rows

A `Cleaner` takes pairs one by one and keeps hashes of them, not texts. Its `finish` decides what
can only be decided with all rows seen, and says which of the pairs it gave back are to be kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from smoldpo.data.account import DROP, MEND, WARN, Finding
from smoldpo.data.cleaning import rules as checks
from smoldpo.data.cleaning.duplicates import PairIndex
from smoldpo.data.cleaning.text import excerpt, first_difference, mend_unicode, tail
from smoldpo.data.dialogue import said_by_assistant
from smoldpo.types import Message, PreferencePair
from smoldpo.utils.errors import UsageError, nearest


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
    "repeats_prompt": Rule(WARN, "the chosen answer begins with the whole question"),
    "role_label": Rule(WARN, "another speaker's label inside an answer"),
    "forged_control_token": Rule(WARN, "a control token written out; never encoded as one"),
    "cut_off": Rule(WARN, "an answer ends in the middle"),
    "refusal": Rule(WARN, "an answer declines"),
    "mixed_language": Rule(WARN, "question and answer in two languages (off by default)"),
    "long_prompt": Rule(WARN, "truncation will take the prompt's oldest tokens"),
    "long_answer": Rule(WARN, "truncation will take an answer's end"),
    "not_tokenizable": Rule(DROP, "the model's chat template refuses the dialogue"),
}
"""Every rule that can be turned off, in the order in which they are applied. A schema's reader sets
rows aside under names of its own (prompts_differ, unparsable, ...): they hold no pair to keep."""

ACROSS_ROWS = (
    "eval_prompt",
    "contradictory",
    "exact_duplicate",
    "near_duplicate",
    "eval_prompt_near",
)
"""Rules that compare rows, each a method of PairIndex, in the order in which they are applied."""
OFF_BY_DEFAULT = frozenset({"mixed_language"})
EVALUATION = frozenset(
    {"invalid_unicode", "empty_prompt", "empty_chosen", "empty_rejected", "identical"}
)
"""Rules for evaluation pairs: only what keeps a pair from being scored. All other rows are scored
as they stand, byte for byte."""


@dataclass(frozen=True)
class RuleSet:
    """The rules that are on, and their parameters."""

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
    """The rules for evaluation pairs (see EVALUATION), without `off`."""
    chosen = choose_rules(off)
    return replace(chosen, on=chosen.on & EVALUATION)


def _mended_names(pair: PreferencePair) -> dict[str, Any]:
    """Id, source and category as UTF-8 can hold them, whatever the rules: they go into files."""
    return {name: mend_unicode(getattr(pair, name)) for name in ("id", "source", "category")}


class Cleaner:
    """Applies rules to a stream of pairs and accounts for every one they touch.

    Attributes:
        findings: so far, in the order of reading; those of rules across rows come at the end.
        index: hashes of the pairs that `clean` gave back.
        compared: of each finding that `finish` adds, the number of its pair among these.
    """

    def __init__(self, rules: RuleSet | None = None, evaluation: PairIndex | None = None):
        self.rules = rules or RuleSet()
        self.findings: list[Finding] = []
        self.compared: list[int] = []
        if not evaluation or not self.rules.on & {"eval_prompt", "eval_prompt_near"}:
            evaluation = None
        answers = "near_duplicate" in self.rules
        self.index = PairIndex(answers or evaluation is not None, answers, evaluation)
        tokens = checks.control_token_pattern(self.rules.control_tokens)
        known: dict[str, checks.Check] = checks.CHECKS | {
            "near_identical": partial(checks.near_identical, threshold=self.rules.near_identical),
            "forged_control_token": partial(checks.forged_control_token, pattern=tokens),
        }
        names = [name for name in RULES if name in self.rules]
        self._checks = {name: known[name] for name in names if name in known}
        self._mends = {n: checks.TEXT_MENDS[n] for n in names if n in checks.TEXT_MENDS}

    def clean(self, pair: PreferencePair) -> PreferencePair | None:
        """The pair, mended where need be; None where it is dropped."""
        cleaned = self.clean_row(pair)
        if cleaned is not None:
            self.index.add(cleaned)
        return cleaned

    def clean_row(self, pair: PreferencePair) -> PreferencePair | None:
        """As `clean`, but the pair is not compared with others."""
        pair = self.mend(pair)
        for name, check in self._checks.items():
            if pair.numbers.liked is not None and name in ("empty_chosen", "empty_rejected"):
                continue  # one side of a thumb is empty; where both are, they are `identical`
            if (problem := check(pair)) is not None:
                self.record(pair, name, *problem)
                if RULES[name].action == DROP:
                    return None
        return pair

    def finish(self) -> np.ndarray:
        """Compare the rows with each other: which of the pairs that `clean` gave are kept, [N]."""
        keep = np.ones(len(self.index), bool)
        for name in ACROSS_ROWS:
            if name not in self.rules:
                continue
            action = RULES[name].action
            for index, detail in getattr(self.index, name)(keep.copy()):
                file, row = self.index.locations[index]
                before = self.index.excerpts[index]
                self.findings.append(Finding(file, row, name, action, detail, before))
                self.compared.append(index)
                keep[index] &= action != DROP
        return keep

    def record(
        self,
        pair: PreferencePair,
        rule: str,
        detail: str,
        before: str = "",
        after: str | None = None,
    ) -> None:
        """Add a rule's finding about `pair`."""
        action = RULES[rule].action
        self.findings.append(Finding(pair.file, pair.row, rule, action, detail, before, after))

    def mend(self, pair: PreferencePair) -> PreferencePair:
        """The pair with what can be mended mended; what is dropped or warned about stays."""
        prompt = self._mend_value(pair, "the prompt", pair.prompt)
        chosen, ours = self._mend_side(pair, "chosen", pair.chosen, pair.chosen_messages)
        rejected, theirs = self._mend_side(pair, "rejected", pair.rejected, pair.rejected_messages)
        mended = replace(
            pair,
            prompt=prompt,
            chosen=chosen,
            rejected=rejected,
            chosen_messages=ours,
            rejected_messages=theirs,
            **_mended_names(pair),
        )
        return pair if mended == pair else mended

    def _mend_side(
        self, pair: PreferencePair, side: str, text: str, messages: tuple[Message, ...] | None
    ) -> tuple[str, tuple[Message, ...] | None]:
        """A side's text, and its messages; where there are some, the text is theirs."""
        if messages is None:
            return self._mend_answer(pair, side, text), None
        mended = self._mend_value(pair, side, messages)
        return said_by_assistant(mended), mended

    def _mend_value(self, pair: PreferencePair, where: str, value: Any) -> Any:
        """A text, or messages and whatever lies in them (tool calls are nested), mended."""
        if isinstance(value, str):
            return self._mend_text(pair, where, value)
        if isinstance(value, dict):
            return {key: self._mend_value(pair, where, item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._mend_value(pair, where, item) for item in value)
        return value

    def _mend_text(self, pair: PreferencePair, where: str, text: str) -> str:
        if not checks.MENDABLE.search(text):
            return text
        for name, mend in self._mends.items():
            mended = mend(text)
            if mended != text:
                at = first_difference(text, mended)
                self.record(pair, name, f"in {where}", excerpt(text, at), excerpt(mended, at))
                text = mended
        return text

    def _mend_answer(self, pair: PreferencePair, side: str, text: str) -> str:
        text = self._mend_text(pair, side, text)  # may bring a residue to light
        name = "transcript_residue"
        mended = checks.mend_residue(text) if name in self.rules else text
        if mended != text:
            what = f"{side} ends in another's turn"
            self.record(pair, name, what, tail(text), tail(mended))
        return mended
