"""Whether an exported file is the model that was exported: read back, and held against it.

What is compared: the token ids of texts and rendered dialogues, the log-probability of every scored
token of held-out pairs, and which side of each pair the model prefers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smoldpo.data.tokenize import PairTokenizer, Tokenization, require_room
from smoldpo.engine.autotune import KernelChoice
from smoldpo.engine.logprobs import Sides, token_logps
from smoldpo.engine.precision import cast_frozen
from smoldpo.evaluation.metrics import PairFacts
from smoldpo.evaluation.statistics import paired_test
from smoldpo.models.generate import generate_answers
from smoldpo.models.load import positions
from smoldpo.models.token_rows import require_rows_of_pairs, token_rows
from smoldpo.types import Message, PreferencePair, TokenizedPair
from smoldpo.utils import progress
from smoldpo.utils.errors import DataError, SmoldpoError

BOUNDS = {
    "f32": 1e-5, "bf16": 0.05, "f16": 6e-3, "q8_0": 0.1, "q6_k": 0.2,
    "q8": 0.1, "q6": 0.2, "q4": 1.0,
    **dict.fromkeys(("q5_k_m", "q5_k_s", "q5_1", "q5_0"), 0.35),
    **dict.fromkeys(("q4_k_m", "q4_k_s", "iq4_nl", "iq4_xs", "q4_1", "q4_0"), 0.6),
    **dict.fromkeys(("q3_k_l", "q3_k_m", "q3_k_s"), 1.2), "q2_k": 2.5,
}  # fmt: skip
"""Of the mean |Δ log p| a token, in nats; measured: docs/export.md."""
ANSWERS, ANSWER_TOKENS = 4, 8
"""So many prompts are answered greedily, each with so many tokens."""
SURE = 0.01
"""A change of accuracy with a smaller p is refused."""
TEXTS = (
    "The quick brown fox jumps over 13 lazy dogs.",
    " leading and trailing  spaces ",
    "1234567890 3.14159 1,000,000 0x1F 2026-12-01",
    "def f(x):\n\treturn {'a': x ** 2}  # comment\r\n\n\n",
    "It's DON'T we'll I'M they've O'Brien",
    "naïve façade Ærø Straße İstanbul",
    "Ελληνικά, русский текст, עברית, العربية",
    "你好，世界。日本語のテキスト 한국어 문장",
    "हिन्दी पाठ ภาษาไทย မြန်မာ",
    "😀 👍🏽 👩‍👩‍👧 ∑∫√ → ½ ² \u00a0 \u200b",
    "<b>bold</b> & [link](https://example.org/?q=a%20b)",
    "camelCaseAndSNAKE_CASE-and.dots/and\\slashes",
    "\n\n\n   \t\t  \n",
)
"""Many scripts, digits, code and white space; control tokens are put between them."""
DIALOGUES: tuple[tuple[Message, ...], ...] = (
    ({"role": "user", "content": "Hello!"},),
    ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why is it blue?"}),
    (
        {"role": "user", "content": "Count to 3."},
        {"role": "assistant", "content": "1, 2, 3"},
        {"role": "user", "content": "And on to 12?\n"},
    ),
)


class VerificationError(SmoldpoError):
    """The file that was written is not the model."""


@dataclass(frozen=True)
class Measured:
    """What a model and its tokenizer make of the texts and pairs."""

    texts: dict[str, tuple[int, ...]]
    """Token ids by what was tokenised, in words."""
    tokens: list[TokenizedPair]
    logps: list[Sides]
    answers: list[tuple[int, ...]]
    """The first tokens of greedy answers to the first prompts that leave room for them."""

    def at(self, places: Sequence[int]) -> Measured:
        """As if only the pairs at these places had been there; without answers, if not all."""
        answers = self.answers if len(places) == len(self.tokens) else []
        tokens = [self.tokens[place] for place in places]
        return Measured(self.texts, tokens, [self.logps[place] for place in places], answers)


@dataclass(frozen=True)
class Witness:
    """What another program makes of what was written, and how far it is from the model."""

    program: str
    version: str
    texts: int
    tokens: int
    mean: float
    largest: float

    def as_json(self) -> dict[str, Any]:
        """By name, rounded nowhere."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.program}: token ids equal, mean |Δ log p| {self.mean:.2g} on {self.tokens} "
            "tokens"
        )


@dataclass(frozen=True)
class Verification:
    """How far the file is from the model.

    Attributes:
        pairs, tokens, texts: how many were compared; scored tokens.
        mean, largest: |Δ log p| of a token, in nats.
        before, after: preference accuracy by log-probability (sum).
        p: of no change of accuracy, pair by pair (evaluation/statistics.py).
        greedy: of ANSWER_TOKENS first tokens of greedy answers, how many are equal, on average;
            None where no prompt leaves room for an answer.
    """

    pairs: int
    tokens: int
    texts: int
    mean: float
    largest: float
    before: float
    after: float
    p: float
    greedy: float | None

    def as_json(self) -> dict[str, Any]:
        """By name, rounded nowhere."""
        return asdict(self)

    def __str__(self) -> str:
        line = (
            f"token ids equal, mean |Δ log p| {self.mean:.2g} nats a token "
            f"(largest {self.largest:.2g}), accuracy {self.before:.1%} → {self.after:.1%} on "
            f"{self.pairs} pairs (p {self.p:.2g})"
        )
        if self.greedy is None:
            return line
        return f"{line}, {self.greedy:.2g} of {ANSWER_TOKENS} greedy tokens equal"


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[PreferencePair],
    how: Tokenization,
    kernels: KernelChoice,
    specials: Iterable[str],
    title: str,
) -> Measured:
    """Token ids and float32 log-probabilities; the model computes in float32 afterwards.

    Args:
        specials: control tokens, which are written between texts.

    Raises:
        DataError, ModelError: pairs that this tokenizer or model cannot read.
    """
    reader = PairTokenizer(tokenizer, how)
    tokens = reader.tokenize_all(pairs)
    require_room(tokens, positions(model))
    require_rows_of_pairs(tokenizer, token_rows(model), tokens)
    cast_frozen(model, torch.float32)
    with progress.bar(title, len(tokens)) as advance:
        logps = token_logps(model, tokens, kernels, advance)
    prompts = _answered(tokens, positions(model))
    answers = generate_answers(
        model,
        tokenizer,
        prompts,
        max_new_tokens=ANSWER_TOKENS,
        temperature=0,
        seed=0,
        batch_size=max(1, len(prompts)),
    )
    ids = [answer.ids for answer in answers]
    return Measured(token_ids(tokenizer, how, specials), tokens, logps, ids)


def _answered(tokens: Sequence[TokenizedPair], room: int | None) -> list[tuple[int, ...]]:
    """The prompts to answer: the first that leave room for ANSWER_TOKENS among the positions."""
    prompts = dict.fromkeys(pair.prompt_ids for pair in tokens)
    fitting = [ids for ids in prompts if room is None or len(ids) + ANSWER_TOKENS <= room]
    return fitting[:ANSWERS]


def token_ids(
    tokenizer: PreTrainedTokenizerBase, how: Tokenization, specials: Iterable[str]
) -> dict[str, tuple[int, ...]]:
    """Ids of texts in many scripts, and of dialogues, by what was tokenised, in words.

    Args:
        specials: control tokens, which are written between texts.
    """
    reader = PairTokenizer(tokenizer, how)
    joined = [f"a{special}b {special}\n" for special in specials]
    found = {
        repr(text): tuple(tokenizer.encode(text, add_special_tokens=True))
        for text in (*TEXTS, *joined)
    }
    for number, dialogue in enumerate(DIALOGUES if reader.is_chat else ()):
        name = f"dialogue {number + 1} of {len(DIALOGUES)}, as the chat template renders it"
        try:
            found[name] = tuple(reader.prompt_ids(dialogue))
        except DataError:  # templates may refuse system messages
            found[name] = ()
    return found


def compare(
    before: Measured,
    after: Measured,
    facts: Sequence[PairFacts],
    kind: str,
    bounds: Mapping[str, float] | None = None,
) -> Verification:
    """How far `after`, read from the file, is from `before`.

    Args:
        facts: of each pair.
        kind: the type of the file's matrices, which says what is allowed.
        bounds: of the mean |Δ log p| a token by kind; None for BOUNDS.

    Raises:
        VerificationError: other token ids, or log-probabilities or an accuracy beyond the bounds.
    """
    for name, ids in before.texts.items():
        require_equal(name, ids, after.texts[name])
    for one, other in zip(before.tokens, after.tokens, strict=True):
        for side in ("prompt_ids", "chosen_ids", "rejected_ids"):
            name = f"{side.removesuffix('_ids')} of pair {one.id}"
            require_equal(name, getattr(one, side), getattr(other, side))
    differences = [
        abs(a - b)
        for sides, others in zip(before.logps, after.logps, strict=True)
        for side, other in zip(sides, others, strict=True)
        for a, b in zip(side, other, strict=True)
    ]
    was, now = ([_prefers(sides) for sides in measured.logps] for measured in (before, after))
    test = paired_test(was, now, [fact.prompt for fact in facts])
    count = len(before.tokens)
    found = Verification(
        pairs=count,
        tokens=len(differences),
        texts=len(before.texts),
        mean=sum(differences) / len(differences),
        largest=max(differences),
        before=sum(was) / count,
        after=sum(now) / count,
        p=test.p,
        greedy=_equal_tokens(before.answers, after.answers),
    )
    bound = (BOUNDS if bounds is None else bounds)[kind]
    if not (math.isfinite(found.largest) and found.mean <= bound):
        raise VerificationError(
            f"read back, the file is not the model: mean |Δ log p| {found.mean:.2g} nats a token, "
            f"and {kind} may have {bound:g}; export a wider type"
        )
    if found.p < SURE:
        raise VerificationError(
            f"read back, the file prefers otherwise than the model: accuracy {found.before:.1%} → "
            f"{found.after:.1%} on {count} pairs (p {found.p:.2g}); export a wider type"
        )
    return found


def _equal_tokens(
    some: Sequence[tuple[int, ...]], others: Sequence[tuple[int, ...]]
) -> float | None:
    """Of ANSWER_TOKENS tokens, how many are equal before the first that is not; on average.

    An answer that ended early and is equal up to there counts as all of them.
    """
    if not (some and others):
        return None
    counts = [
        ANSWER_TOKENS
        if ids == found
        else len(list(takewhile(_same, zip(ids, found, strict=False))))
        for ids, found in zip(some, others, strict=True)
    ]
    return sum(counts) / len(counts)


def _same(tokens: tuple[int, int]) -> bool:
    return tokens[0] == tokens[1]


def _prefers(sides: Sides) -> float:
    """1 where the chosen side has the larger log-probability, ½ where both have the same."""
    chosen, rejected = sum(sides[0]), sum(sides[1])
    return 0.5 if chosen == rejected else float(chosen > rejected)


def require_equal(name: str, ids: Sequence[int], others: Sequence[int]) -> None:
    """Refuse other token ids than the model's.

    Raises:
        VerificationError: with the first that differs.
    """
    if tuple(ids) == tuple(others):
        return
    pairs = enumerate(zip(ids, others, strict=False))
    first = next((i for i, (a, b) in pairs if a != b), min(len(ids), len(others)))
    raise VerificationError(
        f"read back, the file's tokenizer is not the model's: token {first + 1} of {name} is "
        f"{list(others[first : first + 3])} and was {list(ids[first : first + 3])}"
    )
