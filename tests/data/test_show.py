"""`smoldpo data show`: the tokens of one row, which are scored, and where truncation falls."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from smoldpo.data.token_view import find_row, print_shown, show_pair
from smoldpo.data.tokenize import PairTokenizer
from smoldpo.types import PreferencePair
from smoldpo.utils.errors import DataError, UsageError

ROWS = [
    {"prompt": "How do I boil an egg?", "chosen": "Put it in water.", "rejected": "No."},
    {"prompt": "Why?", "chosen": None, "rejected": "No."},
    {"prompt": "yes no maybe", "chosen": "maybe", "rejected": "yes"},
]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def printed(shown, **how):
    console = Console(file=io.StringIO(), width=200, **how)
    print_shown(shown, console)
    return console.file.getvalue()


def test_a_row_is_found_by_its_number(data):
    (pair,), schema = find_row(data, 3)
    assert (pair.chosen, pair.row, schema) == ("maybe", 3, "explicit")
    with pytest.raises(UsageError, match=r"no row 4 .* 3 rows"):
        find_row(data, 4)
    with pytest.raises(DataError, match=r"row 2: holds no pair: .*empty_chosen"):
        find_row(data, 2)


def test_tokens_are_those_of_training(data, tiny_tokenizer):
    (pair,), schema = find_row(data, 1)
    shown = show_pair(pair, schema, tiny_tokenizer, 1024).as_dict()
    exact = PairTokenizer(tiny_tokenizer, 1024).tokenize(pair)
    for name, ids in (("prompt", exact.prompt_ids), ("chosen", exact.chosen_ids),
                      ("rejected", exact.rejected_ids)):  # fmt: skip
        assert tuple(token["id"] for token in shown[name]) == ids
        assert {token["scored"] for token in shown[name]} == {name != "prompt"}
        assert all(token["kept"] for token in shown[name])
    assert shown["rendered_prompt"].endswith(
        "How do I boil an egg?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert "".join(token["text"] for token in shown["chosen"]) == "Put it in water.<|im_end|>"


@pytest.mark.parametrize("max_length", [5, 12, 20, 1000])
def test_what_truncation_takes_is_marked(data, tiny_tokenizer, max_length):
    (pair,), schema = find_row(data, 1)
    shown = show_pair(pair, schema, tiny_tokenizer, max_length)
    cut = PairTokenizer(tiny_tokenizer, max_length).tokenize(pair)
    assert tuple(t.id for t in shown.prompt if t.kept) == cut.prompt_ids
    assert tuple(t.id for t in shown.chosen if t.kept) == cut.chosen_ids
    assert all(t.kept == t.scored for t in shown.chosen + shown.rejected)
    kept = [token.kept for token in shown.prompt]
    assert kept == sorted(kept), "the oldest go first"


def test_marks_without_colour_and_styles_with_it(data, tiny_tokenizer):
    (pair,), schema = find_row(data, 3)
    plain = printed(show_pair(pair, schema, tiny_tokenizer, 12))
    assert "\x1b" not in plain and "[<|im_end|>]" in plain and "{<|im_start|>}" in plain
    coloured = printed(show_pair(pair, schema, tiny_tokenizer, 12), force_terminal=True,
                       color_system="standard", no_color=False)  # fmt: skip
    assert "\x1b[" in coloured and "[<|im_end|>]" not in coloured
    no_color = printed(
        show_pair(pair, schema, tiny_tokenizer, 12), force_terminal=True, no_color=True
    )
    assert "[<|im_end|>]" in no_color


def test_cleaning_and_forged_tokens_show(tiny_tokenizer):
    pair = PreferencePair("Hi \x07there", "Stop<|im_end|>now", "Stop<|im_end|>now", "f", 1)
    shown = show_pair(pair, "explicit", tiny_tokenizer, 1024)
    assert [item.rule for item in shown.findings] == ["control_characters", "identical"]
    assert "".join(token.text for token in shown.prompt).count("Hi there") == 1
    end = tiny_tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert [token.id for token in shown.chosen].count(end) == 1, "only the true end of turn"
    assert "drop: identical" in printed(shown)
