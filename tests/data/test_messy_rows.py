"""What real files hold: missing values, prompts that stand twice, scores, dialogues as text.

Every kind of fault has the row that was met and neighbours of it; docs/data-reading.md has a table.
"""

from __future__ import annotations

import json
import math

import pytest

from smoldpo.data.audit import CheckOptions, check_data, kept_pairs
from smoldpo.data.cleaning.cleaner import Cleaner
from smoldpo.data.length_stats import LengthStats, TokenCounter, WordCounter
from smoldpo.data.load import load_pairs, load_training_data
from smoldpo.data.schemas import PairReader, SplitReader, Unreadable
from smoldpo.data.schemas.fields import number
from smoldpo.data.sources import Row, open_source
from smoldpo.data.tokenize import PairTokenizer
from smoldpo.types import PreferencePair
from smoldpo.utils.errors import DataError

USER = {"role": "user", "content": "Where do swifts sleep?"}
SYSTEM = {"role": "system", "content": "Be brief."}
GOOD = {"role": "assistant", "content": "On the wing, high up."}
BAD = {"role": "assistant", "content": "In trees."}
PAIR = {"prompt": USER["content"], "chosen": GOOD["content"], "rejected": BAD["content"]}
TALKS = {"chosen": [USER, GOOD], "rejected": [USER, BAD]}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(tmp_path, rows, **how):
    """The rows that make pairs, and the (row, rule) of every other; and the reader."""
    reader = SplitReader(open_source(write(tmp_path / "f.jsonl", rows)).train, **how)
    pairs = list(reader)
    return [p.row for p in pairs], [(f.row, f.rule) for f in reader.findings], reader


def one(values):
    (pair,) = PairReader().read(Row("f.jsonl", 7, values))
    return pair


def many(row, count=4):
    """The same row with other questions."""
    return [json.loads(json.dumps(row).replace("swifts", f"swifts no. {n}")) for n in range(count)]


# --- one bad value ends everything, or a set is dropped for a column ------------------------------


@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize(
    ("row", "spoil", "rule"),
    [
        (TALKS, {"rejected": [USER, BAD | {"content": None}]}, "empty_content"),
        (TALKS, {"chosen": [USER | {"role": None}, GOOD]}, "empty_role"),
        (PAIR, {"chosen": None}, "empty_chosen"),
        (PAIR, {"rejected": math.nan}, "empty_rejected"),
        (PAIR, {"prompt": None}, "empty_prompt"),
        (
            {"instruction": "Q?", "generations": ["a", "b"], "ratings": [4, 1]},
            {"generations": None, "ratings": None},
            "empty_generations",
        ),
    ],
)
def test_a_missing_value_drops_its_row_wherever_it_stands(tmp_path, row, spoil, rule, at):
    rows = many(row)
    rows[at - 1] |= spoil
    kept, dropped, _ = read(tmp_path, rows)
    assert kept == [n for n in (1, 2, 3, 4) if n != at] and dropped == [(at, rule)]


@pytest.mark.parametrize("at", [1, 4])
@pytest.mark.parametrize("key", ["prompt", "rejected"])
def test_a_missing_key_drops_its_row_where_others_have_it(tmp_path, key, at):
    rows = many(PAIR)
    del rows[at - 1][key]
    kept, dropped, _ = read(tmp_path, rows)
    assert len(kept) == 3 and dropped == [(at, f"empty_{key}")]


@pytest.mark.parametrize("value", [5, ["text"], {"text": "a"}])
def test_a_value_of_the_wrong_kind_ends_the_reading(tmp_path, value):
    rows = many(PAIR)
    rows[2]["chosen"] = value
    with pytest.raises(DataError, match="row 3: 'chosen'"):
        read(tmp_path, rows)


@pytest.mark.parametrize("names", [("question",), ("prompt", "question", "instruction", "input")])
def test_columns_that_are_null_everywhere_decide_nothing(tmp_path, names):
    kept, dropped, reader = read(tmp_path, many(TALKS | dict.fromkeys(names)))
    assert (len(kept), dropped, reader.format) == (4, [], "implicit")


def test_a_column_that_is_null_at_first_decides_all_the_same(tmp_path):
    rows = [TALKS | {"prompt": None}, *many(TALKS | {"prompt": [SYSTEM, USER]})]
    kept, dropped, reader = read(tmp_path, rows)
    assert (len(kept), dropped, reader.format) == (5, [], "explicit")


def test_a_file_that_no_row_can_decide_is_an_error(tmp_path):
    for rows in ([{"a": None, "b": "x"}, {"a": "x", "b": None}], many({"prompt": "P", "x": None})):
        with pytest.raises(DataError, match="row 1: the columns are those of no known schema"):
            read(tmp_path, rows)


@pytest.mark.parametrize(
    ("prompt", "before"),
    [
        ([SYSTEM, USER], [USER]),
        ([USER], [SYSTEM, USER]),
        ([SYSTEM], [USER]),
        ([SYSTEM, USER], [USER | {"content": f" {USER['content']}\n"}]),
        ([SYSTEM | {"content": "Be brief. "}, USER], [SYSTEM, USER]),
    ],
)
def test_a_system_turn_in_one_place_is_the_system_turn(prompt, before):
    pair = one({"prompt": prompt, "chosen": [*before, GOOD], "rejected": [*before, BAD]})
    assert [m["role"] for m in pair.prompt] == ["system", "user"]
    assert [m["content"].strip() for m in pair.prompt] == [SYSTEM["content"], USER["content"]]


@pytest.mark.parametrize("first", [True, False])
def test_a_system_turn_on_one_side_is_that_of_both(first):
    with_it, without = [SYSTEM, USER], [USER | {"content": f"{USER['content']} "}]
    sides = (with_it, without) if first else (without, with_it)
    pair = one({"chosen": [*sides[0], GOOD], "rejected": [*sides[1], BAD]})
    assert pair.prompt[0] == SYSTEM and len(pair.prompt) == 2


def test_other_system_turns_are_no_pair():
    other = SYSTEM | {"content": "Rhyme."}
    with pytest.raises(Unreadable, match="differ"):
        one({"chosen": [SYSTEM, USER, GOOD], "rejected": [other, USER, BAD]})
    with pytest.raises(Unreadable, match="differ"):
        one({"prompt": [other, USER], "chosen": [SYSTEM, USER, GOOD], "rejected": [USER, BAD]})


REFUSING = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}<|im_start|>"
)


@pytest.fixture
def refusing(tiny_tokenizer):
    """A tokenizer whose template refuses system turns."""
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = REFUSING
    return tokenizer


@pytest.mark.parametrize("sample", [10_000, 2])
def test_check_keeps_no_row_that_training_leaves_out(tmp_path, refusing, sample, monkeypatch):
    monkeypatch.setattr(LengthStats.__init__, "__defaults__", (sample,))
    rows = many(TALKS, 9)
    for at in (3, 8):
        rows[at - 1] = many({"prompt": [SYSTEM, USER]} | TALKS, 9)[at - 1]
    data = write(tmp_path / "d.jsonl", rows)
    report = check_data(data, CheckOptions(), TokenCounter(refusing))
    assert (report.rows_read, report.rows_kept) == (9, 7)
    found = [(f.row, f.rule, f.action) for f in report.findings if f.rule == "not_tokenizable"]
    assert found == [(3, "not_tokenizable", "drop"), (8, "not_tokenizable", "drop")]
    assert [pair.row for pair in kept_pairs(report)] == [1, 2, 4, 5, 6, 7, 9]

    reader = PairTokenizer(refusing, 64)
    pairs, tokenized = reader.select(load_pairs(data).pairs)
    assert [pair.row for pair in pairs] == [1, 2, 4, 5, 6, 7, 9] and len(tokenized) == 7
    assert reader.left_out == {"not_tokenizable": 2}


def test_pairs_that_are_all_refused_are_an_error(refusing):
    pairs = [PreferencePair((SYSTEM, USER), "a", "b", "f.jsonl", n) for n in (1, 2)]
    with pytest.raises(DataError, match=r"f\.jsonl, row 1: .*no system"):
        PairTokenizer(refusing, 64).select(pairs)


# --- text that only looks like an answer ----------------------------------------------------------


@pytest.mark.parametrize("opening", ["\n\nHuman: ", "Human: "])
def test_transcripts_beside_a_prompt_are_taken_apart(opening):
    talk = f"{opening}{USER['content']}\n\nAssistant: "
    pair = one(PAIR | {"chosen": talk + GOOD["content"], "rejected": talk + BAD["content"]})
    assert pair.prompt == (USER,)
    assert (pair.chosen, pair.rejected) == (GOOD["content"], BAD["content"])


def test_transcripts_of_another_question_are_no_pair():
    talk = "\n\nHuman: What do owls eat?\n\nAssistant: "
    with pytest.raises(Unreadable, match="in no message"):
        one(PAIR | {"chosen": f"{talk}Mice.", "rejected": f"{talk}Grass."})


@pytest.mark.parametrize("between", ["\n", " ", "\n\nAnswer: "])
@pytest.mark.parametrize("prompt", [USER["content"], [SYSTEM, USER]])
def test_answers_that_begin_with_the_question_are_named_on_every_row(tmp_path, prompt, between):
    said = {key: f"{USER['content']}{between}{PAIR[key]}" for key in ("chosen", "rejected")}
    report = check_data(
        write(tmp_path / "d.jsonl", many({"prompt": prompt} | said)), CheckOptions(), WordCounter()
    )
    found = [(f.row, f.action) for f in report.findings if f.rule == "repeats_prompt"]
    assert found == [(n, "warn") for n in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    "pair",
    [
        PreferencePair("Swifts?", "Swifts? They sleep on the wing.", "No idea."),
        PreferencePair("How do swifts sleep?", "On the wing.", "How do swifts sleep? No idea."),
    ],
    ids=["short", "rejected"],
)
def test_a_short_question_may_be_repeated_and_any_by_the_rejected_answer(pair):
    cleaner = Cleaner()
    cleaner.clean(pair)
    assert cleaner.findings == []


# --- pairs without a difference -------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ("rating_chosen", "rating_rejected"),
        ("chosen_reward", "rejected_reward"),
        ("chosen-score", "rejected-score"),
        ("mean_rating_chosen", "mean_rating_rejected"),
    ],
)
def test_scores_under_any_usual_name_count(tmp_path, names):
    scores = [(3, 3), (5, 2), ("3/10", "7/10"), ("8/10", "7/10")]
    both = zip(many(PAIR), scores, strict=True)
    rows = [row | dict(zip(names, given, strict=True)) for row, given in both]
    kept, dropped, reader = read(tmp_path, rows)
    assert kept == [2, 4] and dropped == [(1, "tie"), (3, "scores_disagree")]
    assert reader.unused == ()


def test_numbers_of_the_sides_that_are_no_scores_do_not_count(tmp_path):
    rows = many(PAIR | {"chosen_tokens": 7, "rejected_tokens": 7, "chosen_score_model": "m"})
    kept, _, reader = read(tmp_path, rows)
    assert len(kept) == 4 and set(reader.unused) == {
        "chosen_tokens", "rejected_tokens", "chosen_score_model"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "value"), [("3/10", 0.3), (" 4 / 5 ", 0.8), ("1/0", None), ("a/b", None), ("5", 5.0)]
)
def test_a_score_out_of_so_many(text, value):
    assert number(text) == value


# --- columns that are not read --------------------------------------------------------------------


def test_columns_that_are_not_read_are_said_and_those_of_weight_loudly(tmp_path):
    tool = {"type": "function", "function": {"name": "clock"}}
    rows = [row | {"model": "m", "rejected_images": None, "note": None} for row in many(PAIR, 8)]
    for row in rows[:3]:
        row["images"] = ["a.png"]
    for row in rows[:2]:
        row["rejected_tools"] = [tool]
    account = load_training_data(write(tmp_path / "d.jsonl", rows), eval_fraction=0).account.train
    assert account.columns_not_read == ["model", "images", "rejected_tools"]
    assert account.losses() == [
        "warning: images of 3 rows is not read: the model sees nothing of it",
        "warning: rejected_tools of 2 rows is not read: the model sees nothing of it",
        "columns not read: model",
    ]


def test_a_name_of_a_column_that_no_terminal_can_show_is_escaped(tmp_path):
    rows = [row | {"x\ud800\x1b[31m": 1} for row in many(PAIR, 8)]
    account = load_training_data(write(tmp_path / "d.jsonl", rows), eval_fraction=0).account.train
    assert account.losses() == ["columns not read: x\\ud800\\x1b[31m"]


# --- texts that no UTF-8 holds --------------------------------------------------------------------


@pytest.mark.parametrize("key", ["id", "source", "category"])
@pytest.mark.parametrize("half", ["a\ud800", "\udc00b", "\ud83d \ude00"])
def test_half_a_surrogate_pair_in_a_name_is_mended_like_in_a_text(tmp_path, key, half):
    path = write(tmp_path / "d.jsonl", [row | {key: half} for row in many(PAIR)])
    every = ["invalid_unicode"]
    for rules_off in ((), every):
        trained = load_training_data(path, eval_fraction=0, rules_off=rules_off).train
        for pair in (*trained, *load_pairs(path, rules_off=rules_off).pairs):
            assert "\ufffd" in getattr(pair, key)
            getattr(pair, key).encode()
