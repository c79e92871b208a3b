"""convert: what is written reads back the same; what a form cannot hold is refused by row."""

from __future__ import annotations

import csv
import json
import os
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smoldpo.data.convert import LAYOUTS, WRITERS, convert
from smoldpo.data.schemas import PairReader, SplitReader, Unreadable
from smoldpo.data.schemas.fields import as_messages
from smoldpo.data.sources import open_source
from smoldpo.types import PairNumbers, PreferencePair
from smoldpo.utils.errors import DataError, SmoldpoError, UsageError

FIXTURES = Path(__file__).parent / "fixtures"
SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data folder is absent")


def read(path):
    reader, pairs = PairReader(), []
    for row in open_source(str(path)).train.rows():
        try:
            pairs += reader.read(row)
        except Unreadable:
            continue
    return reader.format, pairs + reader.finish()


def says(pair):
    return (pair.prompt, pair.chosen, pair.rejected, pair.id, pair.source, pair.category)


def pair(prompt="P", chosen="C", rejected="R", **more):
    return PreferencePair(prompt, chosen, rejected, file="in.jsonl", row=7, **more)


def talk(*contents, system=None):
    roles = ("user", "assistant")
    turns = [{"role": roles[at % 2], "content": said} for at, said in enumerate(contents)]
    return ((({"role": "system", "content": system},) if system else ()) + tuple(turns)) or ()


SHORT = [pair(talk("one"), "c 1", "r 1", id="a", source="s", category="k"), pair(talk("two"))]
LONG = [*SHORT, pair(talk("one", "two", "three"), "c 3", "r 3")]


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("to", LAYOUTS)
def test_every_form_in_every_kind_of_file_reads_back_the_same(tmp_path, to, suffix):
    pairs = SHORT if to in ("text", "orca") else LONG
    done = convert(iter(pairs), tmp_path / f"out{suffix}", to)
    assert (done.rows, done.escaped) == (len(pairs), 0)
    schema, again = read(tmp_path / f"out{suffix}")
    assert schema == LAYOUTS[to].format
    expected = [pair(p.prompt[0]["content"], p.chosen, p.rejected) for p in pairs]
    if to == "text":
        got = [(p.prompt, p.chosen, p.rejected) for p in again]
        assert got == [(p.prompt, p.chosen, p.rejected) for p in expected]
    else:
        assert [says(p) for p in again] == [says(p) for p in pairs]
    assert list(tmp_path.iterdir()) == [tmp_path / f"out{suffix}"]


def test_the_rows_look_as_trl_and_the_others_expect(tmp_path):
    rows = {}
    for to in LAYOUTS:
        prompt = talk("ask") if to in ("text", "transcripts") else talk("ask", system="be brief")
        convert([pair(prompt, id="i")], tmp_path / "x.jsonl", to)
        rows[to] = json.loads((tmp_path / "x.jsonl").read_text())
        assert rows[to].pop("id") == "i"
    dialogue = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "ask"}]
    chosen, rejected = ({"role": "assistant", "content": said} for said in "CR")
    sides = {"chosen": "C", "rejected": "R"}
    assert rows == {
        "conversational": {"prompt": dialogue, "chosen": [chosen], "rejected": [rejected]},
        "text": {"prompt": "ask", **sides},
        "implicit": {"chosen": [*dialogue, chosen], "rejected": [*dialogue, rejected]},
        "transcripts": {
            "chosen": "\n\nHuman: ask\n\nAssistant: C",
            "rejected": "\n\nHuman: ask\n\nAssistant: R",
        },
        "conversations": {
            "conversations": [{"from": "human", "value": "ask"}],
            "chosen": {"from": "gpt", "value": "C"},
            "rejected": {"from": "gpt", "value": "R"},
            "system": "be brief",
        },
        "orca": {"system": "be brief", "question": "ask", **sides},
    }


@needs_shared
@pytest.mark.parametrize("name", ["hh_raw_sample.jsonl.gz", "llamafactory_dpo_en_demo.json"])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
def test_real_files_round_trip(tmp_path, name, suffix):
    _, pairs = read(SHARED / name)
    convert(iter(pairs), tmp_path / f"x{suffix}")
    assert [says(p) for p in read(tmp_path / f"x{suffix}")[1]] == [says(p) for p in pairs]


def test_tool_messages_survive_in_jsonl_and_are_refused_where_they_would_not(tmp_path):
    _, pairs = read(FIXTURES / "explicit_tools.jsonl")
    for to in ("conversational", "implicit"):
        convert(pairs, tmp_path / "x.jsonl", to)
        assert [says(p) for p in read(tmp_path / "x.jsonl")[1]] == [says(p) for p in pairs]
    with pytest.raises(DataError, match=r"explicit_tools\.jsonl, row 1: .*tool_calls.*\.jsonl"):
        convert(pairs, tmp_path / "x.parquet")
    for to in ("text", "orca", "conversations", "transcripts"):
        with pytest.raises(DataError, match=r"row 1: .*--to conversational can"):
            convert(pairs, tmp_path / "y.jsonl", to)
    assert not (tmp_path / "y.jsonl").exists()


REFUSED = [
    ("text", pair(talk("a", "b", "c")), "room for one question"),
    ("text", pair(talk("a", system="s")), "room for one question"),
    ("orca", pair(talk("a", "b", "c")), "user, assistant, user"),
    ("orca", pair(({"role": "user", "content": "a", "name": "Ana"},)), "also holds name"),
    ("transcripts", pair(talk("a", system="s")), "no system turn"),
    ("transcripts", pair(talk("a\n\nAssistant: b")), "speaker's mark"),
    ("transcripts", pair(talk("a"), "c\n\nHuman: more", "r"), "would (read|not be)"),
    ("transcripts", pair(talk("a"), " c", "r"), "white space at an edge"),
    ("conversations", pair(({"role": "developer", "content": "d"},)), "no place for a developer"),
    ("conversations", pair(({"role": "system", "content": " "}, *talk("a"))), "differently"),
    ("implicit", pair(()), "would not be read again"),
]


@pytest.mark.parametrize(("to", "bad", "why"), REFUSED)
def test_a_form_that_cannot_hold_a_pair_names_its_row(tmp_path, to, bad, why):
    out = tmp_path / "x.jsonl"
    out.write_text("what was there before")
    with pytest.raises(DataError, match=rf"in\.jsonl, row 7: --to {to} cannot hold.*{why}"):
        convert([pair(talk("fine")), bad], out, to)
    assert out.read_text() == "what was there before"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize("first", "=+-@\t\r")
def test_formulas_in_csv_are_escaped_and_counted(tmp_path, suffix, first):
    out = tmp_path / f"x{suffix}"
    done = convert([pair("P", f"{first}1+1", "safe = 1")], out, "text")
    assert (done.rows, done.escaped) == (1, 1)
    assert read(out)[1][0].chosen == f"'{first}1+1"
    with out.open(newline="", encoding="utf-8") as file:
        cells = [
            cell
            for row in csv.reader(file, delimiter="\t" if "t" in suffix else ",")
            for cell in row
        ]
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_text_that_would_be_read_as_messages_is_refused(tmp_path, suffix):
    with pytest.raises(DataError, match="row 7: holds text that would be read as messages"):
        convert([pair("P", '[{"role": "user", "content": "x"}]')], tmp_path / f"x{suffix}", "text")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_half_a_surrogate_pair_is_refused_by_row_where_it_cannot_be_held(tmp_path, suffix):
    with pytest.raises(DataError, match=r"in\.jsonl, row 7: holds half a surrogate"):
        convert([pair(chosen="\ud83d")], tmp_path / f"x{suffix}")
    assert not list(tmp_path.iterdir())


def test_jsonl_keeps_text_as_it_is_in_utf8(tmp_path):
    text = "é 漢 👍 \u2028 \x00 \ufeff </s>"
    convert([pair(text), pair("\ud83d")], tmp_path / "x.jsonl")
    first, second = (tmp_path / "x.jsonl").read_bytes().splitlines()
    assert "é 漢 👍 \u2028".encode() in first
    assert b"\\ud83d" in second
    assert [p.prompt for p in read(tmp_path / "x.jsonl")[1]] == [text, "\ud83d"]


def test_requests_that_cannot_be(tmp_path):
    with pytest.raises(UsageError, match="did you mean conversations"):
        convert([pair()], tmp_path / "x.jsonl", "conversation")
    with pytest.raises(UsageError, match="must end with"):
        convert([pair()], tmp_path / "x.xlsx")
    with pytest.raises(DataError, match="no pair to write"):
        convert([], tmp_path / "x.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match="cannot be written"):
        convert([pair()], tmp_path / "folder.jsonl")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        convert([pair()], tmp_path / "file" / "x.jsonl")


def test_pairs_stream_through(tmp_path):
    """A thousand and more rows of Parquet come in groups; JSONL takes one pair at a time."""
    many = [pair(str(n)) for n in range(2500)]
    assert convert(iter(many), tmp_path / "x.parquet").rows == 2500
    assert pyarrow.parquet.ParquetFile(tmp_path / "x.parquet").num_row_groups == 3
    assert [p.prompt for p in read(tmp_path / "x.parquet")[1]] == [p.prompt for p in many]
    held = []

    def watched():
        for each in many:
            held.append((tmp_path / f".x.jsonl.{os.getpid()}").exists())
            yield each

    convert(watched(), tmp_path / "x.jsonl")
    assert all(held)


texts = st.text(st.characters(exclude_categories=()), max_size=20)
messages = st.builds(
    lambda role, content, extra: {"role": role, "content": content, **extra},
    st.sampled_from(["system", "user", "assistant", "tool", "developer"]),
    texts,
    st.one_of(
        st.just({}),
        st.just({}),
        st.fixed_dictionaries({"name": texts, "tool_call_id": texts}),
        st.fixed_dictionaries({"tool_calls": st.lists(st.dictionaries(texts, st.integers()))}),
    ),
)
prompts = st.one_of(texts, st.lists(messages, max_size=4).map(tuple))
pairs_of_any_kind = st.builds(pair, prompts, texts, texts, source=texts, category=texts)


@settings(max_examples=150, deadline=None)
@given(st.lists(pairs_of_any_kind, min_size=1, max_size=3))
def test_conversational_jsonl_loses_nothing(tmp_path_factory, pairs):
    out = tmp_path_factory.mktemp("any") / "x.jsonl"
    convert(pairs, out)
    assert [says(p) for p in read(out)[1]] == [says(p) for p in pairs]


@settings(max_examples=200, deadline=None)
@given(pairs_of_any_kind, st.sampled_from(sorted(LAYOUTS)), st.sampled_from(sorted(WRITERS)))
def test_any_pair_is_written_whole_or_refused(tmp_path_factory, one, to, suffix):
    out = tmp_path_factory.mktemp("any") / f"x{suffix}"
    try:
        done = convert([one], out, to)
    except SmoldpoError as error:
        assert "row 7" in str(error)
        assert not out.exists()
        return
    try:
        (again,) = read(out)[1]
    except ValueError:
        pytest.fail("what was written was not read again")
    if not done.escaped:
        assert (again.chosen, again.rejected) == (one.chosen, one.rejected)
        assert as_messages(again.prompt) == as_messages(one.prompt)
        assert isinstance(again.prompt, type(one.prompt)) or not LAYOUTS[to].marks_text


# A pair's own numbers

OWN = [
    pair("one", numbers=PairNumbers(2.0, 0.1, 0.3)),
    pair("two", numbers=PairNumbers(0.0, 1e-300, 1 / 3)),
]


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("names", [("weight",), ("margin", "beta"), ("weight", "margin", "beta")])
def test_numbers_that_are_asked_for_go_along(tmp_path, suffix, names):
    out = tmp_path / f"x{suffix}"
    done = convert(OWN, out, "text", names)
    assert (done.rows, done.escaped) == (2, 0)
    reader = PairReader(None, {name: name for name in names})
    again = [p for row in open_source(str(out)).train.rows() for p in reader.read(row)]
    for before, after in zip(OWN, again, strict=True):
        expected = {name: getattr(before.numbers, name) for name in names}
        assert after.numbers == PairNumbers(**expected), "to the last bit"
    plain = PairReader()
    (first, _) = open_source(str(out)).train.rows()
    plain.read(first)
    assert set(plain.unused) >= set(names) and not (
        set(PairNumbers.__dataclass_fields__) - set(names)
    ) & set(first.values)


def test_without_asking_no_number_is_written(tmp_path):
    convert(OWN, tmp_path / "x.jsonl")
    assert not {"weight", "margin", "beta"} & set(
        json.loads((tmp_path / "x.jsonl").read_text().splitlines()[0])
    )


def test_the_commands_carry_numbers_on(cli, tmp_path):
    rows = [
        {
            "prompt": f"Which is {n}?",
            "chosen": f"It is {n}, well said.",
            "rejected": f"Not {n} at all.",
        }
        | {"w": n / 4, "beta": 0.2, "margin": "not a number"}
        for n in range(1, 5)
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = ("--columns", "weight=w,beta=beta")
    result = cli("data", "convert", "in.jsonl", "out.jsonl", *columns)
    assert result.code == 0, result.err
    result = cli("data", "check", "in.jsonl", "--model", "none", "--write", "kept.jsonl", *columns)
    assert result.code == 0, result.err
    for name in ("out.jsonl", "kept.jsonl"):
        written = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        assert [row["weight"] for row in written] == [0.25, 0.5, 0.75, 1.0]
        assert all(row["beta"] == 0.2 and not {"w", "margin"} & set(row) for row in written)


@pytest.mark.parametrize("path", sorted(FIXTURES.iterdir()), ids=lambda path: path.name)
def test_whatever_is_read_is_written_back(tmp_path, path):
    pairs = list(SplitReader(open_source(str(path)).train))
    convert(pairs, tmp_path / "x.jsonl")
    again = list(SplitReader(open_source(str(tmp_path / "x.jsonl")).train))
    assert [replace(p, file="", row=0) for p in again] == [
        replace(p, file="", row=0) for p in pairs
    ]
