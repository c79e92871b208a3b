"""`smoldpo data show`: one row as the model sees it, token by token.

The row goes through the rules on single rows and then through the tokenisation of training, twice:
with max_length, and without. What the second has more is what truncation cuts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Console
from rich.text import Text

from smoldpo.data.account import Finding
from smoldpo.data.cleaning.cleaner import Cleaner, choose_rules
from smoldpo.data.cleaning.text import escape_hidden
from smoldpo.data.length_stats import SIDES, control_tokens
from smoldpo.data.schemas.reader import SplitReader
from smoldpo.data.sources import open_source
from smoldpo.data.tokenize import PairTokenizer, Tokenization
from smoldpo.types import PreferencePair
from smoldpo.utils.errors import DataError, UsageError

STYLES = {"scored": ("black on green", "black on bright_green"), "prompt": ("", "dim")}
CUT = "dim strike red"


@dataclass(frozen=True)
class Token:
    """One token: whether the loss scores it, and whether truncation leaves it."""

    id: int
    text: str
    scored: bool
    kept: bool


Tokens = tuple[Token, ...]


@dataclass(frozen=True)
class ShownPair:
    """A pair as the model sees it, and the findings of cleaning."""

    pair: PreferencePair
    format: str
    max_length: int
    prompt: Tokens
    chosen: Tokens
    rejected: Tokens
    notes: tuple[str, ...]
    mismatches: tuple[str, ...]
    findings: tuple[Finding, ...]

    def as_dict(self) -> dict[str, Any]:
        """What --json prints."""
        return {
            "file": self.pair.file,
            "row": self.pair.row,
            "id": self.pair.id,
            "format": self.format,
            "max_length": self.max_length,
            "notes": list(self.notes),
            "template_mismatches": list(self.mismatches),
            "touched": [item.as_dict() for item in self.findings],
            "rendered_prompt": "".join(token.text for token in self.prompt),
        } | {side: [asdict(token) for token in getattr(self, side)] for side in SIDES}


def find_row(
    data: str,
    row: int,
    *,
    subset: str | None = None,
    split: str | None = None,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> tuple[list[PreferencePair], str]:
    """The pairs of a row (usually one) as they were read, and the schema's name.

    Raises:
        UsageError: the split has no such row.
        DataError: the row holds no pair; the message says why.
    """
    reader = SplitReader(open_source(data, subset).split(split), format, columns)
    found: list[PreferencePair] = []
    for pair in reader:
        if pair.row == row:
            found.append(pair)
        elif found:
            break
    if found:
        return found, reader.format
    for item in reader.findings:
        if item.row == row:
            raise DataError(f"holds no pair: {item.detail} ({item.rule})", item.file, row)
    raise UsageError(
        f"{data}: has no row {row} that holds a pair; it has {reader.rows_read:,} rows"
    )


def show_pair(
    pair: PreferencePair, format: str, tokenizer: Any, how: Tokenization | int
) -> ShownPair:
    """Clean a pair (a dropped one is shown all the same) and tokenise it.

    Raises:
        DataError: the model's chat template refuses the dialogue.
    """
    cleaner = Cleaner(choose_rules(control_tokens=control_tokens(tokenizer)))
    cleaned = cleaner.clean_row(pair) or Cleaner(cleaner.rules).mend(pair)
    reader = PairTokenizer(tokenizer, how)
    cut = reader.tokenize(cleaned)
    whole = PairTokenizer(tokenizer, replace(reader.how, max_length=10**9)).tokenize(cleaned)
    start, end = _kept_ends(whole.prompt_ids, cut.prompt_ids)

    def tokens(ids: tuple[int, ...], kept: Sequence[bool], scored: Sequence[bool]) -> Tokens:
        return tuple(
            Token(id, tokenizer.decode([id]), is_scored and is_kept, is_kept)
            for id, is_kept, is_scored in zip(ids, kept, scored, strict=True)
        )

    sides = [
        tokens(side.ids, [n < len(left.ids) for n in range(len(side.ids))], side.scored)
        for side, left in zip(whole.completions, cut.completions, strict=True)
    ]
    prompt = range(len(whole.prompt_ids))

    return ShownPair(
        pair=cleaned,
        format=format,
        max_length=reader.how.max_length,
        prompt=tokens(
            whole.prompt_ids, [n < start or n >= end for n in prompt], [False for _ in prompt]
        ),
        chosen=sides[0],
        rejected=sides[1],
        notes=tuple(sorted(cut.notes)),
        mismatches=tuple(
            f"{each.mismatch}. {each.mismatch.advice}" for each in reader.mismatches.values()
        ),
        findings=tuple(cleaner.findings),
    )


def _kept_ends(whole: tuple[int, ...], cut: tuple[int, ...]) -> tuple[int, int]:
    """Of the tokens in `whole`, those that stay: before the first index, and from the second on."""
    behind = 0
    while behind < len(cut) and whole[-1 - behind] == cut[-1 - behind]:
        behind += 1
    return len(cut) - behind, len(whole) - behind


def print_shown(shown: ShownPair, console: Console) -> None:
    """Write a pair for people: colours alternate from token to token; without colour, marks do."""
    plain = console.no_color or not console.is_terminal
    place = f"{shown.pair.file}, row {shown.pair.row} ({shown.format})"
    console.print(place, markup=False, style="bold")
    for item in shown.findings:
        console.print(f"  {item.action}: {item.rule}: {item.detail}", markup=False)
    for words in shown.mismatches:
        console.print(f"  warning: {words}", markup=False)
    for note in shown.notes:
        console.print(f"  note: {note.replace('_', ' ')}", markup=False)
    console.print(_legend(shown, plain))
    for side in SIDES:
        tokens: Tokens = getattr(shown, side)
        cut, scored = sum(not t.kept for t in tokens), sum(t.scored for t in tokens)
        what = "not scored" if side == "prompt" else f"{scored:,} scored"
        heading = f"{side}: {len(tokens):,} tokens, {what}" + (f", {cut:,} cut" if cut else "")
        console.print()
        console.print(heading, style="bold", markup=False)
        console.print(_styled(tokens, plain), soft_wrap=True)


def _legend(shown: ShownPair, plain: bool) -> Text:
    longest = len(shown.prompt) + max(len(shown.chosen), len(shown.rejected))
    fits = "nothing is cut" if longest <= shown.max_length else "truncation cuts"
    text = Text(
        f"{longest:,} tokens with the longer answer, max_length {shown.max_length:,}: {fits}\n"
    )
    if plain:
        return text.append("marks: token|token  [scored]  {cut}")
    text.append("scored", STYLES["scored"][0]).append("  not scored  ")
    return text.append("cut by truncation", CUT)


def _styled(tokens: Tokens, plain: bool) -> Text:
    text = Text()
    for index, token in enumerate(tokens):
        # A line feed is shown and then done; other hidden characters are escaped.
        shown = "".join("⏎\n" if c == "\n" else escape_hidden(c) for c in token.text)
        if plain:
            left, right = "[]" if token.scored else ("{}" if not token.kept else ("", "|"))
            breaks = "\n" if shown.endswith("\n") else ""
            inner = shown.replace("\n", "") if breaks else shown
            text.append(f"{left}{inner}{right}{breaks}")
        else:
            styles = STYLES["scored" if token.scored else "prompt"]
            text.append(shown, styles[index % 2] if token.kept else CUT)
    return text
