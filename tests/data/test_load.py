"""Training data is cleaned, evaluation data is scored as it stands, and they share no prompt."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import clean_row

from conftest import SHARED
from smoldpo.data.account import DataAccount
from smoldpo.data.cleaning.text import prompt_key
from smoldpo.data.load import load_mixture, load_pairs, load_training_data, split_by_prompt
from smoldpo.types import PreferencePair
from smoldpo.utils.errors import DataError, UsageError


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def rows():
    return [clean_row(number) for number in range(40)]


def test_training_goes_through_all_rules_and_accounts_for_them(tmp_path, rows):
    rows[3]["rejected"] = rows[3]["chosen"]
    rows[5] = rows[4]
    rows[6]["chosen"] += "\n\nHuman"
    rows[7]["chosen"] = "I'm sorry, but I can't help with that."
    data = load_training_data(write(tmp_path / "d.jsonl", rows), eval_fraction=0.25)
    account = data.account.train
    assert (account.rows_read, account.rows_kept) == (40, 38)
    assert account.dropped == {"identical": 1, "exact_duplicate": 1}
    assert account.mended == {"transcript_residue": 1} and account.warned == {"refusal": 1}
    assert [(item.row, item.rule) for item in account.touched] == [
        (4, "identical"), (6, "exact_duplicate"), (7, "transcript_residue")
    ]  # fmt: skip
    assert account.touched[2].before.endswith("\\n\\nHuman")
    assert len(data.train) + len(data.eval) == 38
    assert not any(pair.chosen.endswith("Human") for pair in data.train + data.eval)


def test_rules_can_be_turned_off(tmp_path, rows):
    rows[5] = rows[4]
    path = write(tmp_path / "d.jsonl", rows)
    kept = load_training_data(path, rules_off=["exact_duplicate"])
    assert kept.account.train.rows_kept == 40
    assert len({pair.id for pair in kept.train + kept.eval}) == 40, "each pair has an id of its own"
    with pytest.raises(UsageError, match="exact_dup"):
        load_training_data(path, rules_off=["exact_dup"])


def test_prompts_of_evaluation_are_taken_out_of_training(tmp_path, rows):
    evaluation = [clean_row(number) for number in range(100, 110)]
    rows[2]["prompt"] = [{"role": "user", "content": evaluation[0]["prompt"][0]["content"].upper()}]
    near = evaluation[1]["prompt"][0]["content"].replace("?", "!")
    rows[9]["prompt"] = [{"role": "user", "content": near}]
    train, held = write(tmp_path / "t.jsonl", rows), write(tmp_path / "e.jsonl", evaluation)
    data = load_training_data(train, eval_data=held)
    split = data.account.split
    assert split.train_pairs_dropped_for_eval_prompt == 1 and split.train_pairs == 39
    assert split.train_pairs_near_eval_prompt == 1
    found = {(item.row, item.rule, item.action) for item in split.touched}
    assert found == {(3, "eval_prompt", "drop"), (10, "eval_prompt_near", "warn")}
    assert "e.jsonl, row 1" in split.touched[0].detail
    off = load_training_data(train, eval_data=held, rules_off=["eval_prompt", "eval_prompt_near"])
    assert len(off.train) == 40 and not off.account.split.touched


def test_evaluation_scores_legitimate_rows_byte_for_byte(tmp_path, rows):
    rows[0]["chosen"] = "  Odd\x07 answer \u202e, cut off in the\n\nHuman"
    rows[1] = rows[2]
    rows[3]["rejected"] = rows[3]["chosen"][:-1] + "!"
    rows[4]["prompt"].append({"role": "user", "content": "Well?"})
    rows[5]["rejected"] = " "
    loaded = load_pairs(write(tmp_path / "e.jsonl", rows))
    assert loaded.account.dropped == {"empty_rejected": 1} and len(loaded.pairs) == 39
    rows.pop(5)
    assert [[p.chosen, p.rejected] for p in loaded.pairs] == [
        [r["chosen"], r["rejected"]] for r in rows
    ]


def test_columns_hold_for_evaluation_where_it_has_them(tmp_path, rows):
    renamed = [{"question": r["prompt"], "good": r["chosen"], "bad": r["rejected"]} for r in rows]
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    evaluation = [clean_row(number) for number in range(100, 104)]
    other = [
        {"question": r["prompt"], "good": r["chosen"], "bad": r["rejected"]} for r in evaluation
    ]
    train = write(tmp_path / "t.jsonl", renamed)
    for held in (evaluation, other):
        data = load_training_data(
            train, eval_data=write(tmp_path / "e.jsonl", held), columns=columns, format="explicit"
        )
        assert (len(data.train), len(data.eval)) == (40, 4)


def test_nothing_left_is_an_error_with_reasons(tmp_path):
    row = clean_row(1) | {"chosen": ""}
    with pytest.raises(DataError, match=r"no pair is left of 1 rows .*1 empty_chosen"):
        load_training_data(write(tmp_path / "d.jsonl", [row]))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not here")
def test_nearly_all_real_rows_stay():
    train, dev = SHARED / "hh_helpful_train.jsonl", SHARED / "hh_helpful_dev.jsonl"
    data = load_training_data(str(train), eval_data=str(dev))
    assert len(data.eval) == 509 and len(data.train) >= 0.99 * 4654
    assert data.account.split.train_pairs_dropped_for_eval_prompt == 0


def test_the_account_is_read_back_as_it_was_written(tmp_path, rows):
    rows[3]["rejected"] = rows[3]["chosen"]
    rows[6]["chosen"] += "\n\nHuman"
    path = write(tmp_path / "d.jsonl", rows)
    for sources, keys, uses in (([path], "train", 1), ([path, "builtin"], "sources", 3)):
        data = load_mixture(sources, (), 0)
        written = json.loads(json.dumps(data.account.as_json()))
        assert set(written) == {keys, "split"}
        assert DataAccount.model_validate(written) == data.account
        read = [(use, source.source) for use, source in data.account.read()]
        assert read[0] == ("train", path) and len(read) == uses
    assert "train_pairs_near_eval_prompt" not in written["split"]
    assert written["split"]["train_pairs_left_by_weight"] == 0


def test_the_account_of_an_early_run_is_read():
    finding = {"file": "f", "row": 4, "rule": "identical", "action": "drop", "detail": "same"}
    source = {"source": "f", "format": "explicit", "rows_read": 5, "rows_kept": 4}
    split = {"how": "by hash", "train_pairs": 3, "eval_pairs": 1}
    old = {"train": source | {"touched": [finding], "more": 1}, "split": split}
    account = DataAccount.model_validate(old)
    assert account.train.touched[0].row == 4 and account.train.warned == {}
    assert account.split.train_pairs_near_eval_prompt == 0 and account.tokens is None


OPENINGS = st.text(max_size=12)
TURNS = st.lists(st.text(max_size=8), max_size=2)


def dialogue(opening, later):
    roles = ("assistant", "user")
    turns = [{"role": role, "content": text} for text in later for role in roles]
    return ({"role": "user", "content": opening}, *turns)


PROMPTS = st.one_of(OPENINGS, st.builds(dialogue, OPENINGS, TURNS))


@settings(deadline=None)
@given(st.lists(PROMPTS, max_size=40), st.floats(0, 1, exclude_max=True))
def test_the_split_never_shares_a_prompt(prompts, fraction):
    pairs = [PreferencePair(prompt, "a", "b") for prompt in prompts]
    train, evaluation = split_by_prompt(pairs, fraction)
    assert len(train) + len(evaluation) == len(pairs)
    assert not {prompt_key(p.prompt) for p in train} & {prompt_key(p.prompt) for p in evaluation}
    assert not {opening(p) for p in train} & {opening(p) for p in evaluation}


def opening(pair):
    first = pair.prompt if isinstance(pair.prompt, str) else pair.prompt[0]["content"]
    return prompt_key(first)


# --- several sources ------------------------------------------------------------------------------


def as_orca(row):
    return {
        "question": f" {row['prompt'][0]['content']}\n",
        "chosen": row["chosen"],
        "rejected": f"{row['rejected']} ",
    }


def test_a_pair_that_stands_in_two_sources_is_learnt_once(tmp_path, rows):
    a, b = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", map(as_orca, rows))
    data = load_mixture([a, b], (), 0)
    first, second = (account.train for account in data.account.sources)
    assert (first.rows_kept, second.rows_kept) == (40, 0)
    assert second.dropped == {"exact_duplicate": 40} and first.dropped == {}
    assert second.touched[2].detail == f"the same as {a}, row 3"
    assert len(data.train) + len(data.eval) == 40
    folder = tmp_path / "both"
    folder.mkdir()
    write(folder / "a.jsonl", rows)
    write(folder / "b.jsonl", map(as_orca, rows))
    whole = load_training_data(str(folder)).account.train
    assert (whole.dropped, whole.format) == ({"exact_duplicate": 40}, "explicit, orca")
    both = load_mixture([a, b], (), 0, rules_off=["exact_duplicate", "near_duplicate"])
    assert len(both.train) + len(both.eval) == 80


def test_sources_that_contradict_each_other_lose_both_pairs(tmp_path, rows):
    swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows[:2]]
    a, b = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", swapped)
    data = load_mixture([a, b], (), 0)
    assert [s.train.dropped for s in data.account.sources] == [{"contradictory": 2}] * 2
    assert f"{b}, row 1 prefers the other" in data.account.sources[0].train.touched[0].detail
    assert len(data.train) + len(data.eval) == 38


def test_a_pair_that_two_sources_hold_out_is_judged_once(tmp_path, rows):
    held_out = [clean_row(number) for number in range(100, 104)]
    for name, own in (("a", rows[:20]), ("b", rows[20:])):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "train.jsonl", own)
        write(tmp_path / name / "test.jsonl", held_out)
    data = load_mixture([str(tmp_path / "a"), str(tmp_path / "b")], (), 0)
    assert (len(data.train), len(data.eval)) == (40, 4)


def test_a_source_that_is_all_in_another_has_no_weight(tmp_path, rows):
    a, b = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", rows)
    with pytest.raises(UsageError, match=r"b\.jsonl: every pair of it stands in another"):
        load_mixture([a, b], (2, 1), 0)


def test_why_nothing_is_left_to_train_on_or_to_judge_by(tmp_path, rows):
    a = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(UsageError, match=r"all 40 training pairs.*eval_prompt.*--rules-off"):
        load_training_data(a, eval_data=a)
    with pytest.raises(UsageError, match=r"all 40 training pairs.*eval_prompt"):
        load_mixture([a, write(tmp_path / "b.jsonl", rows)], (), 0, eval_data=a)
    same = [row | {"prompt": rows[0]["prompt"]} for row in rows]
    with pytest.raises(UsageError, match=r"all 40 pairs have one prompt.*--eval-fraction 0"):
        load_training_data(write(tmp_path / "c.jsonl", same))
    turns = [row | {"prompt": [*rows[0]["prompt"], *reply(n)]} for n, row in enumerate(rows)]
    with pytest.raises(UsageError, match="begin with one question"):
        load_training_data(write(tmp_path / "d.jsonl", turns))


def reply(number):
    said = ("assistant", "Tell me more."), ("user", f"It is number {number}.")
    return [{"role": role, "content": text} for role, text in said]
