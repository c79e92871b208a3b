"""The built-in preference set keeps what its card promises."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from rapidfuzz import fuzz, process

from smoldpo.data.audit import CheckOptions, check_data
from smoldpo.data.length_stats import WordCounter

FOLDER = Path(__file__).resolve().parents[2] / "smoldpo" / "data" / "builtin"
KEYS = ["id", "category", "source", "prompt", "chosen", "rejected", "rejected_by", "flaw"]
CATEGORIES = {
    "advice", "brainstorm", "code", "explain", "extract", "format", "how_to",
    "multi_turn", "reasoning", "rewrite", "safety", "unknown", "writing",
}  # fmt: skip
FLAWS = {
    "wrong_fact", "ignores_form", "rambling", "repetition", "dodging",
    "invented", "misses_point", "unsafe", "overclaims",
}  # fmt: skip
SAMPLED, WRITTEN = "SmolLM2-135M-Instruct", "written"


def read(split: str) -> list[dict]:
    """Rows of one split; bytes that are not UTF-8 or a line that is not JSON raise."""
    text = (FOLDER / f"{split}.jsonl").read_bytes().decode("utf-8")
    assert text.endswith("\n") and "\r" not in text
    return [json.loads(line) for line in text[:-1].split("\n")]


TRAIN, TEST = read("train"), read("test")
ROWS = TRAIN + TEST


def answer(row: dict, side: str) -> str:
    return row[side][0]["content"]


def asked(row: dict) -> str:
    """What the user typed, over all turns, as it is compared for likeness."""
    users = [m["content"] for m in row["prompt"] if m["role"] == "user"]
    return " ".join(" ".join(users).casefold().split())


def faults(rows: list[dict], is_fault) -> list[str]:
    return [row["id"] for row in rows if is_fault(row)]


def test_split_is_512_and_128_and_stratified():
    assert (len(TRAIN), len(TEST)) == (512, 128)
    train, test = (Counter(row["category"] for row in rows) for rows in (TRAIN, TEST))
    assert set(train) == set(test) == CATEGORIES
    assert set(test.values()) <= {9, 10}
    assert set((train + test).values()) <= {49, 50}


def test_schema():
    assert not faults(ROWS, lambda row: list(row) != KEYS)
    assert not faults(ROWS, lambda row: row["source"] != "smoldpo-builtin")
    assert not faults(ROWS, lambda row: row["flaw"] not in FLAWS)
    assert not faults(ROWS, lambda row: not re.fullmatch(row["category"] + r"-\d\d", row["id"]))
    assert len({row["id"] for row in ROWS}) == len(ROWS)


def test_roles_alternate_and_sides_are_one_answer():
    def badly_ordered(row: dict) -> bool:
        roles = [m["role"] for m in row["prompt"]]
        return roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]

    assert not faults(ROWS, badly_ordered)
    assert not faults(ROWS, lambda r: (len(r["prompt"]) > 1) != (r["category"] == "multi_turn"))
    for side in ("chosen", "rejected"):
        assert not faults(ROWS, lambda r, s=side: [m["role"] for m in r[s]] != ["assistant"])


def test_text_is_clean():
    for row in ROWS:
        for message in row["prompt"] + row["chosen"] + row["rejected"]:
            assert list(message) == ["role", "content"], row["id"]
            text = message["content"]
            assert text and text == text.strip(), row["id"]
            assert not re.search(r"<\|im_|\b(Human|Assistant):|[\x00-\x08\x0b-\x1f\x7f]", text), (
                row["id"]
            )


def test_no_two_prompts_alike():
    for scorer, limit in ((fuzz.ratio, 62), (fuzz.token_sort_ratio, 66)):
        likeness = process.cdist([asked(row) for row in ROWS], [asked(row) for row in ROWS],
                                 scorer=scorer, score_cutoff=limit)  # fmt: skip
        pairs = [
            (ROWS[i]["id"], ROWS[j]["id"])
            for i, j in zip(*likeness.nonzero(), strict=True)
            if i < j
        ]
        assert not pairs


def test_sides_differ():
    assert not faults(ROWS, lambda r: fuzz.ratio(answer(r, "chosen"), answer(r, "rejected")) > 95)
    for side in ("chosen", "rejected"):
        copies = Counter(answer(row, side) for row in ROWS if len(answer(row, side)) > 20)
        assert not [text for text, times in copies.items() if times > 1]


@pytest.mark.parametrize("category", sorted(CATEGORIES))
def test_length_is_not_the_lesson(category):
    rows = [row for row in ROWS if row["category"] == category]
    longer = sum(len(answer(row, "chosen")) > len(answer(row, "rejected")) for row in rows)
    assert 0.45 <= longer / len(rows) <= 0.55


def test_about_half_of_the_rejected_sides_are_sampled():
    for rows in (TRAIN, TEST, ROWS):
        by = Counter(row["rejected_by"] for row in rows)
        assert set(by) == {SAMPLED, WRITTEN}
        assert 0.45 <= by[SAMPLED] / len(rows) <= 0.55


def test_style_is_not_the_lesson():
    for style in (r"^(- |\* |\d+\. )", r"```", r"\*\*|^#", r"\n"):
        chosen, rejected = (
            sum(bool(re.search(style, answer(row, side), re.M)) for row in ROWS)
            for side in ("chosen", "rejected")
        )
        assert abs(chosen - rejected) <= 0.1 * len(ROWS)


def test_chosen_json_parses():
    asks = [row for row in ROWS if "JSON" in asked_as_typed(row)]
    assert len(asks) >= 3
    for row in asks:
        assert isinstance(json.loads(answer(row, "chosen")), dict | list), row["id"]


def asked_as_typed(row: dict) -> str:
    return row["prompt"][-1]["content"]


def test_card_states_the_counts():
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    counts = Counter((row["category"], row["rejected_by"]) for row in ROWS)
    for category in CATEGORIES:
        sampled, written = counts[category, SAMPLED], counts[category, WRITTEN]
        assert f"| {category} | {sampled + written} | {sampled} | {written} |" in card


def test_reading_them_has_nothing_to_say():
    """A newcomer's first run says what the pairs are, and not how they were made."""
    report = check_data("builtin", CheckOptions(), WordCounter())
    assert report.rows_kept == len(ROWS) and not report.findings
    assert [part.losses for part in report.parts] == [[], []]
