"""Messages in a cell as text are read as messages, or their row is set aside; never scored."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smoldpo.data.load import load_pairs
from smoldpo.data.schemas import PairReader, Unreadable
from smoldpo.data.schemas.cells import is_printed, unpack
from smoldpo.data.sources import Row, open_source
from smoldpo.utils.errors import DataError

FIXTURES = Path(__file__).parent / "fixtures"
TALK = [
    {"role": "user", "content": 'Is it 5 o\'clock? Say "yes" } { or\nno.'},
    {"role": "assistant", "content": "It's four."},
]
OTHER = [TALK[0], {"role": "assistant", "content": "Yes."}]


def numpy_prints(messages):
    return str(np.array([*messages, None], dtype=object)[:-1])


def in_two(messages):
    return json.dumps(json.dumps(messages))


def in_an_object(messages):
    return json.dumps({"tools": [], "messages": messages})


def in_speakers(messages):
    names = {"user": "human", "assistant": "gpt"}
    return json.dumps([{"from": names[m["role"]], "value": m["content"]} for m in messages])


def by_column(messages):
    return {key: [message[key] for message in messages] for key in ("role", "content")}


PRINTED = [json.dumps, repr, str, numpy_prints, in_two, in_an_object, in_speakers]


def read(**values):
    (pair,) = PairReader().read(Row("f.jsonl", 3, values))
    return pair


@pytest.mark.parametrize("how", [*PRINTED, by_column])
def test_messages_in_a_cell_are_read(how):
    pair = read(chosen=how(TALK), rejected=how(OTHER))
    assert (pair.prompt, pair.chosen, pair.rejected) == ((TALK[0],), "It's four.", "Yes.")
    pair = read(prompt=how(TALK[:1]), chosen=how(TALK[1:]), rejected=how(OTHER[1:]))
    assert (pair.prompt, pair.chosen, pair.rejected) == ((TALK[0],), "It's four.", "Yes.")


@pytest.mark.parametrize("how", PRINTED)
@pytest.mark.parametrize("cut", [1, 8, 30])
def test_a_printed_form_that_is_cut_off_is_set_aside(how, cut):
    cut_off = {"chosen": how(TALK)[:-cut], "rejected": how(OTHER)[:-cut]}
    for prompt in ({}, {"prompt": TALK[0]["content"]}):
        with pytest.raises(Unreadable) as caught:
            read(**prompt, **cut_off)
        assert caught.value.rule == "printed_messages"


def test_one_printed_side_is_set_aside_with_its_row():
    with pytest.raises(Unreadable, match="chosen holds messages as text"):
        read(prompt="P", chosen=repr(TALK)[:-2], rejected="Yes.")


def test_the_tools_of_a_packed_dialogue_become_the_rows():
    tools = [{"type": "function", "function": {"name": "clock"}}]
    reader = PairReader()
    packed = [json.dumps({"tools": tools, "messages": talk}) for talk in (TALK, OTHER)]
    (pair,) = reader.read(Row("f", 1, {"chosen": packed[0], "rejected": packed[1]}))
    assert reader.unused == () and pair.arguments.tools == (tools[0],)


@pytest.mark.parametrize(
    "text",
    [
        '"To be, or not to be"',
        '{"name": "Bob", "role": "user"}',
        '{"users": [{"role": "user", "name": "Ann"}]}',
        "[1, 2, 3]",
        "{'a': 1}",
        "(see below)",
        '[{"role": "narrator", "content": "Once upon a time"}]',
        "[" * 5000,
        "[{'role': 'user', 'content': " * 300,
    ],
)
def test_other_text_in_brackets_stays_text(text):
    assert unpack(text) == text
    assert is_printed(text) == text.startswith("[{'role'")


values = st.sampled_from([*PRINTED, lambda m: repr(m)[:-3], lambda m: json.dumps(m)[:-3]])
fixtures = st.sampled_from(sorted(path for path in FIXTURES.glob("*.jsonl")))


def printed(value, how):
    """A row with every message and dialogue in it printed."""
    if isinstance(value, dict) and ("role" in value or "from" in value):
        return how([as_role(value)])
    if isinstance(value, list):
        if value and isinstance(value[0], dict) and ("role" in value[0] or "from" in value[0]):
            return how([as_role(item) for item in value])
        return [printed(item, how) for item in value]
    if isinstance(value, dict):
        return {key: printed(item, how) for key, item in value.items()}
    return value


def as_role(message):
    names = {"human": "user", "gpt": "assistant", "observation": "assistant"}
    role = message.get("role") or names.get(message.get("from"), message.get("from"))
    role = role if role in ("user", "assistant") else "user"
    return {"role": role, "content": message.get("content") or message.get("value") or "x"}


@settings(max_examples=150, deadline=None)
@given(fixtures, values, st.booleans())
def test_no_schema_gives_the_printed_form_of_messages_to_the_tokenizer(path, how, texts_too):
    reader = PairReader()
    pairs = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        row = printed(json.loads(line), how)
        if texts_too:  # whole answers too, as to_csv of a column of messages leaves them
            for key in {"chosen", "rejected", "response_a", "output_1"} & set(row):
                if isinstance(row[key], str) and not row[key].lstrip().startswith(("[", "Human")):
                    row[key] = how([{"role": "assistant", "content": row[key]}])
        try:
            pairs += reader.read(Row("f", number, row))
        except (Unreadable, DataError):
            continue
    for pair in pairs + reader.finish():
        prompt = [pair.prompt] if isinstance(pair.prompt, str) else pair.prompt
        said = [m if isinstance(m, str) else m.get("content") or "" for m in prompt]
        for text in (*said, pair.chosen, pair.rejected):
            assert not ("role" in text and "content" in text), text


# --- columns of the type arrow.json ---------------------------------------------------------------

MIXED = [
    {"prompt": 'Say "hi"', "chosen": "hi", "rejected": "no", "tags": ["a", TALK[:1]]},
    {"prompt": TALK[:1], "chosen": "It's four.", "rejected": "Yes.", "tags": ["b", "c"]},
]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Rows whose prompt is text here and messages there, as datasets reads them."""
    folder = tmp_path_factory.mktemp("mixed")
    source = folder / "mixed.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in MIXED))
    datasets.disable_progress_bars()
    return datasets.load_dataset(
        "json", data_files=str(source), split="train", cache_dir=str(folder / "cache")
    )


def test_cells_of_the_type_json_are_what_they_hold(tmp_path, mixed):
    mixed.to_parquet(str(tmp_path / "a.parquet"))
    mixed.save_to_disk(str(tmp_path / "saved"))
    for name in ("a.parquet", "saved"):
        rows = [row.values for row in open_source(str(tmp_path / name)).train.rows()]
        assert rows == MIXED


def test_cells_of_the_type_json_by_the_features_alone(tmp_path, mixed):
    table = mixed.with_format("arrow")[:]
    plain = [
        column.cast(pyarrow.string()) if name == "prompt" else column
        for name, column in zip(table.column_names, table.columns, strict=True)
    ]
    old = pyarrow.table(plain, table.column_names).replace_schema_metadata(table.schema.metadata)
    pyarrow.parquet.write_table(old, tmp_path / "a.parquet")
    stored = pyarrow.parquet.read_schema(tmp_path / "a.parquet").field("prompt").type
    assert stored == pyarrow.string()
    rows = [row.values for row in open_source(str(tmp_path / "a.parquet")).train.rows()]
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in MIXED]


def test_the_hubs_cells_of_the_type_json(monkeypatch, mixed):
    monkeypatch.setattr("smoldpo.data.sources.hub_is_unreachable", lambda *_: False)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: {"train": mixed})
    rows = [row.values for row in open_source("someone/mixed").train.rows()]
    assert rows == MIXED


def test_texts_that_are_json_stay_texts_in_cells_of_the_type_json(tmp_path):
    """datasets gives 42 for the text "42" of such a column, and None for "null"."""
    texts = ["42", "007", "true", "null", "1e3", "NaN", "hello"]
    rows = [{"prompt": TALK[:1], "chosen": "yes", "rejected": "no"}] + [
        {"prompt": text, "chosen": "yes", "rejected": "no"} for text in texts
    ]
    made = datasets.Dataset.from_list(rows, on_mixed_types="use_json")
    made.to_parquet(str(tmp_path / "a.parquet"))
    pairs = load_pairs(str(tmp_path / "a.parquet")).pairs
    assert [pair.prompt for pair in pairs[1:]] == texts
    assert pairs[0].prompt == tuple(TALK[:1])
