"""Sources: every kind of file, folders, the hub, mixing; and files that are broken or hostile."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import random
import socket
import time
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smoldpo.data import files, sources
from smoldpo.data.schemas import SplitReader
from smoldpo.data.sources import mix, open_source
from smoldpo.utils import hub
from smoldpo.utils.errors import DataError, UsageError

ROWS = [
    {"prompt": "One, two", "chosen": 'three "quoted"\nnext line', "rejected": "vier\r\nünf"},
    {"prompt": "\u2028\u0085 separators", "chosen": "\0", "rejected": "\t"},
    {"prompt": "last", "chosen": "x", "rejected": "y"},
]


def as_jsonl(rows=ROWS):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_csv(delimiter=","):
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(ROWS[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return out.getvalue().encode()


def as_parquet():
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), out, row_group_size=2)
    return out.getvalue()


def as_arrow(new):
    out = io.BytesIO()
    table = pyarrow.Table.from_pylist(ROWS)
    with new(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return out.getvalue()


KINDS = {
    "a.jsonl": as_jsonl(),
    "a.ndjson": as_jsonl(),
    "bom.jsonl": b"\xef\xbb\xbf" + as_jsonl(),
    "A.JSONL": as_jsonl(),
    "a.jsonl.gz": gzip.compress(as_jsonl()),
    "a.json": json.dumps(ROWS).encode(),
    "indented.json": json.dumps(ROWS, indent=1).encode(),
    "wrapped.json": json.dumps({"data": ROWS}).encode(),
    "lines.json": as_jsonl(),
    "a.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "a.csv": as_csv(),
    "bom.csv": b"\xef\xbb\xbf" + as_csv(),
    "a.csv.gz": gzip.compress(as_csv()),
    "a.tsv": as_csv("\t"),
    "a.tsv.gz": gzip.compress(as_csv("\t")),
    "a.parquet": as_parquet(),
    "stream.arrow": as_arrow(pyarrow.ipc.new_stream),
    "file.arrow": as_arrow(pyarrow.ipc.new_file),
}


def write(folder, name, data):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def rows_of(name, split=None):
    source = open_source(str(name))
    return list((source.split(split) if split else source.train).rows())


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    path = write(tmp_path, name, KINDS[name])
    rows = rows_of(path)
    assert [row.values for row in rows] == ROWS
    assert [(row.file, row.row) for row in rows] == [(str(path), n) for n in (1, 2, 3)]


def test_rows_of_jsonl_are_numbered_by_line(tmp_path):
    path = write(tmp_path, "a.jsonl", b'\n{"a": 1}\n  \n\n{"a": 2}')
    assert [row.row for row in rows_of(path)] == [2, 5]


def test_messages_in_csv_cells_are_read_and_other_json_stays_text(tmp_path):
    told = json.dumps([{"role": "user", "content": "hi"}])
    cells = [told, '{"from": "gpt", "value": "x"}', '[{"a": 1}]', '{"a": 1}', "[{ not JSON }]"]
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["a", "b", "c", "d", "e"], cells])
    (row,) = rows_of(path)
    expected = [json.loads(told), {"from": "gpt", "value": "x"}, *cells[2:]]
    assert list(row.values.values()) == expected


# --- folders --------------------------------------------------------------------------------------


def test_a_folder_of_split_files(tmp_path):
    write(tmp_path, "train-00001.jsonl.gz", gzip.compress(as_jsonl(ROWS[:1])))
    write(tmp_path, "train-00000.jsonl", as_jsonl(ROWS[1:]))
    write(tmp_path, "my_valid.csv", as_csv())
    write(tmp_path, "dataset_infos.json", b"{}")
    write(tmp_path, ".hidden.jsonl", b"not JSON")
    source = open_source(str(tmp_path))
    assert [split.name for split in source.splits] == ["valid", "train"]
    assert [row.values for row in source.train.rows()] == [*ROWS[1:], ROWS[0]]
    assert [row.row for row in source.train.rows()] == [1, 2, 1]
    assert source.test.name == "valid"
    with pytest.raises(UsageError, match=r"no split 'vaild' \(did you mean valid\?\)"):
        source.split("vaild")


@pytest.mark.parametrize(
    "names",
    [("data/train-0.parquet", "data/test-0.parquet"), ("train/0.parquet", "test/0.parquet")],
)
def test_folders_in_a_folder(tmp_path, names):
    for name in names:
        write(tmp_path, name, as_parquet())
    source = open_source(str(tmp_path))
    assert sorted(split.name for split in source.splits) == ["test", "train"]
    assert len(list(source.split("test").rows())) == 3


def test_files_without_split_names_are_one_training_set(tmp_path):
    for name in ("b.jsonl", "a.jsonl"):
        write(tmp_path, name, as_jsonl())
    assert [row.file[-7:] for row in rows_of(tmp_path)] == ["a.jsonl"] * 3 + ["b.jsonl"] * 3


def test_folders_saved_by_datasets(tmp_path):
    import datasets

    datasets.disable_progress_bars()
    train, test = datasets.Dataset.from_list(ROWS), datasets.Dataset.from_list(ROWS[:1])
    train.save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "two")
    assert [row.values for row in rows_of(tmp_path / "one")] == ROWS
    assert [row.values for row in rows_of(tmp_path / "two", "train")] == ROWS
    assert [row.values for row in rows_of(tmp_path / "two", "test")] == ROWS[:1]


def test_a_saved_folder_never_reads_outside_itself(tmp_path):
    outside = write(tmp_path, "outside.arrow", KINDS["stream.arrow"])
    inside = write(tmp_path, "in/data.arrow", KINDS["stream.arrow"])
    state = {"_data_files": [{"filename": "../outside.arrow"}]}
    write(tmp_path, "in/state.json", json.dumps(state).encode())
    assert inside.exists() and outside.exists()
    with pytest.raises(DataError, match=r"in/outside\.arrow: (cannot be read|is not)"):
        rows_of(tmp_path / "in")


@pytest.mark.parametrize(
    ("name", "subset", "says"),
    [
        ("nothing.jsonl", None, "no such file or folder"),
        ("~nobody-at-all/x", None, "no such file or folder"),
        ("x" * 5000, None, "no such file or folder"),
        ("a\0b", None, "no such file or folder"),
        ("builtin", "en", "a subset .* belongs to a hub id"),
    ],
)
def test_names_of_nothing(name, subset, says):
    with pytest.raises(UsageError, match=says):
        open_source(name, subset)


def test_kinds_that_are_not_read(tmp_path):
    path = write(tmp_path, "a.xlsx", b"")
    with pytest.raises(UsageError, match=r"\.jsonl.*\.parquet"):
        open_source(str(path))
    with pytest.raises(UsageError, match="the folder holds no"):
        open_source(str(tmp_path))


# --- broken and hostile files ---------------------------------------------------------------------

BROKEN = {
    "a.jsonl": [
        (b'{"a": 1}\n{"a": \n', "a.jsonl, row 2: broken JSON"),
        (b'{"a": 1}\n[1]\n', "row 2: holds a list, not an object"),
        (b'{"a": 1}\n{"a": "\xff"}\n', "row 2: is not UTF-8 text"),
        (b'{"a":' * 101 + b"1" + b"}" * 101, "row 1: broken JSON: nested more than 100 deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "row 1: broken JSON"),
        (b"", "the file holds no rows"),
        (b"\n \n", "the file holds no rows"),
        ('{"a": 1}'.encode("utf-16"), "row 1: is not UTF-8"),
    ],
    "a.json": [
        (b'[{"a": 1},', "broken JSON: .* at line 1"),
        (b'[{"a": 1}, 2]', "row 2: holds a int"),
        (b"3", "must be a list of rows"),
        (b"", "holds no rows"),
        (b"[" * 101 + b"]" * 101, "broken JSON: nested more than 100 deep"),
    ],
    "a.csv": [
        (b"a,b\n1,2\n1,2,3\n", "row 2: has 3 cells, the header 2"),
        (b"a,b\n1\n", "row 1: has 1 cells, the header 2"),
        (b"a,a\n1,2\n", "the column 'a' twice"),
        (b'a,b\n"1,2\n', "broken CSV near line"),
        (b"a,b\n", "holds no rows"),
        (b"a,b\n\xff,1\n", "is not UTF-8"),
    ],
    "a.jsonl.gz": [
        (b"plain text", "damaged or cut-off gzip"),
        (gzip.compress(as_jsonl() * 5000)[:-200], "damaged or cut-off gzip file .* after row"),
    ],
    "a.parquet": [
        (b"", "not a readable Parquet"),
        (b"PAR1", "not a readable Parquet"),
        (KINDS["a.parquet"][:4] + KINDS["a.parquet"][-8:], "not a readable Parquet"),
        (as_jsonl(), "not a readable Parquet"),
        (gzip.compress(as_jsonl()), "not a readable Parquet"),
        (KINDS["file.arrow"], "not a readable Parquet"),
    ],
    "a.arrow": [
        (b"", "not a readable Arrow|no rows"),
        (b"ARROW1", "not a readable Arrow"),
        (as_jsonl(), "not a readable Arrow"),
        (gzip.compress(as_jsonl()), "not a readable Arrow"),
        (KINDS["a.parquet"], "not a readable Arrow"),
    ],
}


@pytest.mark.parametrize(
    ("name", "data", "says"), [(name, *case) for name, cases in BROKEN.items() for case in cases]
)
def test_broken_files_name_the_place(tmp_path, name, data, says):
    path = write(tmp_path, name, data)
    with pytest.raises(DataError, match=says):
        rows_of(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.jsonl.gz", "a.csv.gz"])
def test_a_line_without_end_is_refused_in_bounded_memory(tmp_path, name, monkeypatch):
    import tracemalloc

    assert files.MAX_LINE == 64 << 20
    monkeypatch.setattr(files, "MAX_LINE", 1 << 20)
    body = (b'"prompt"\n"' if ".csv" in name else b'{"prompt": "x"}\n') + b" " * (30 << 20)
    path = write(tmp_path, name, gzip.compress(body, 1) if name.endswith("gz") else body)
    del body
    tracemalloc.start()
    with pytest.raises(DataError, match="line 2 is longer than 1 MiB"):
        rows_of(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * files.MAX_LINE


def test_a_line_of_just_the_limit_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_LINE", 20)
    line = b'{"a": "0123456789"}\n'
    assert len(line) == 20
    assert len(rows_of(write(tmp_path, "a.jsonl", line * 3))) == 3
    with pytest.raises(DataError, match="row 1"):
        rows_of(write(tmp_path, "b.jsonl", b" " + line))


def test_json_that_is_too_large_to_hold_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_JSON", 1000)
    with pytest.raises(DataError, match="convert it to JSONL"):
        rows_of(write(tmp_path, "a.json", json.dumps(ROWS * 20, indent=1).encode()))


def test_a_parquet_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BOMB_SIZE", 1 << 20)
    table = pyarrow.table({"prompt": ["a" * (1 << 16) + str(n) for n in range(100)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", compression="zstd")
    with pytest.raises(DataError, match="'prompt' unpacks from"):
        rows_of(tmp_path / "a.parquet")


def test_rows_come_before_the_file_is_read_to_its_end(tmp_path):
    """Streaming: the first row is there although the end of the file is broken."""
    for name, data in (("a.jsonl", as_jsonl() + b"{"), ("a.csv", as_csv() + b'"')):
        rows = open_source(str(write(tmp_path, name, data))).train.rows()
        assert next(rows).values == ROWS[0]
        with pytest.raises(DataError):
            list(rows)


def test_rows_of_just_the_depth_are_read(tmp_path):
    data = b'{"b":[],"a":' + b'{"a":' * 99 + b"1" + b"}" * 100
    assert len(rows_of(write(tmp_path, "a.jsonl", data))) == 1


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "lines.json"])
def test_json_deeper_than_python_reads_it(tmp_path, name, monkeypatch):
    """Where that is depends on Python and its version; the error is the same for far less."""

    def refuse(text):
        raise RecursionError("maximum recursion depth exceeded")

    monkeypatch.setattr(files.json, "loads", refuse)
    with pytest.raises(DataError, match="broken JSON: nested more than 100 deep"):
        rows_of(write(tmp_path, name, KINDS[name]))


COLUMNAR = sorted(name for name in KINDS if name.endswith((".parquet", ".arrow")))
TEXTUAL = sorted(set(KINDS) - set(COLUMNAR))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(TEXTUAL), st.binary(max_size=200))
def test_random_bytes_as_files(tmp_path, name, data):
    path = write(tmp_path, name, data)
    try:
        rows_of(path)
    except DataError as error:
        assert name in str(error)


@pytest.mark.parametrize("name", COLUMNAR)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_columnar_files_cut_short(tmp_path, name, share):
    """Random bytes are left to textual kinds: in columns they may reach code that does not
    raise.
    """
    whole = KINDS[name]
    path = write(tmp_path, name, whole[: int(share * len(whole))])
    with pytest.raises(DataError, match=name):
        rows_of(path)


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(TEXTUAL), st.data())
def test_damaged_files(tmp_path, name, data):
    damaged = bytearray(KINDS[name])
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path = write(tmp_path, name, bytes(damaged))
    try:
        rows_of(path)
    except DataError as error:
        assert name in str(error)


# --- the hub --------------------------------------------------------------------------------------


def test_hub_rows_splits_and_subset(monkeypatch):
    import datasets

    asked = []

    def load(name, subset):
        asked.append((name, subset))
        data = datasets.Dataset.from_list(ROWS)
        return datasets.DatasetDict({"train_prefs": data, "test_prefs": data, "train_sft": data})

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(sources, "hub_is_unreachable", lambda kind, name: False)
    source = open_source("owner/name", "en")
    assert asked == [("owner/name", "en")]
    assert [split.name for split in source.splits] == ["train", "test", "train_sft"]
    rows = list(source.train.rows())
    assert [row.values for row in rows] == ROWS
    assert (rows[2].file, rows[2].row) == ("owner/name:train_prefs", 3)
    assert source.split("train_prefs") is source.train, "a split has its published name too"
    with pytest.raises(UsageError, match="no split 'test_sft'"):
        source.split("test_sft")


def test_a_hub_that_does_not_answer_fails_within_seconds(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(hub, "TIMEOUT", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        start = time.monotonic()
        with pytest.raises(DataError, match=r"no-such-owner/none.*does not answer.*local file"):
            open_source("no-such-owner/none")
        assert time.monotonic() - start < 60, "its clients would ask for longer"


def test_hub_errors_hold_their_cause_and_no_tokens(monkeypatch):
    import datasets

    def load(name, subset):
        cause = ValueError("row 7: hf_zyxwvutsrq")
        raise RuntimeError("at https://me:secret@host/x\nwith hf_abcdefghijk, s3cr3t") from cause

    monkeypatch.setenv("HF_TOKEN", "s3cr3t")
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(sources, "hub_is_unreachable", lambda kind, name: False)
    with pytest.raises(DataError) as caught:
        open_source("owner/name")
    text = str(caught.value)
    assert "at https://***@host/x with ***, ***; row 7: ***. Check" in text


def test_all_that_arrow_says_of_a_damaged_file_is_told():
    def batches(path):
        raise pyarrow.ArrowInvalid("Could not read column 3:\n  offsets out of order")
        yield

    read = files._columns_reader("Arrow", batches)
    with pytest.raises(DataError, match=r"Could not read column 3: offsets out of order$"):
        next(read(Path("d.arrow")))


# --- mixing ---------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=5), st.integers(0, 10**6))
def test_every_beginning_of_a_mix_keeps_the_weights(weights, seed):
    sources = [[(s, k) for k in range(400)] for s in range(len(weights))]
    mixed = list(mix(sources, weights, seed))
    assert len(set(mixed)) == len(mixed)
    share = [weight / sum(weights) for weight in weights]
    taken = [0] * len(weights)
    for count, (source, item) in enumerate(mixed, 1):
        assert item == taken[source]
        taken[source] += 1
        assert all(abs(t - count * s) <= len(weights) for t, s in zip(taken, share, strict=True)), (
            "more than an item a source away from its share"
        )
    assert max(taken) == 400


def test_a_mix_is_the_same_for_a_seed_and_ends_with_the_first_source_used_up():
    sources = [range(0, 100), range(100, 110), range(200, 300)]
    mixed = list(mix(sources, [2, 1, 1], seed=7))
    assert mixed == list(mix(sources, [2, 1, 1], seed=7))
    assert mixed != list(mix(sources, [2, 1, 1], seed=8))
    counts = [sum(item // 100 == kind for item in mixed) for kind in range(3)]
    assert counts[1] == 10
    assert abs(counts[0] - 20) <= 2 and abs(counts[2] - 10) <= 1


def test_a_mix_reads_no_further_than_it_gives():
    read = []

    def source(name):
        for item in range(1000):
            read.append((name, item))
            yield name, item

    mixed = mix([source("a"), source("b")], [1, 1], seed=0)
    for _ in range(10):
        next(mixed)
    assert len(read) == 10


@pytest.mark.parametrize(
    "weights", [[1], [1, 0], [1, -1], [1, float("nan")], [1, float("inf")], [1, 1, 1]]
)
def test_weights_that_are_none(weights):
    with pytest.raises(UsageError, match="weight"):
        mix([[1], [2]], weights, seed=0)


def test_random_seeds_are_the_only_chance():
    state = random.getstate()
    list(mix([range(5), range(5)], [1, 2], seed=3))
    assert random.getstate() == state


# --- folders, names and headers as people have them -----------------------------------------------

TALK = {
    key: [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": key}]
    for key in ("chosen", "rejected")
}
SCHEMAS_OF = {
    "a.jsonl": ("explicit", {"prompt": "Q?", "chosen": "chosen", "rejected": "rejected"}),
    "b.jsonl": ("orca", {"question": "Q?", "chosen": "chosen", "rejected": "rejected"}),
    "c.jsonl": ("implicit", TALK),
    "d.jsonl": ("transcripts", {k: f"\n\nHuman: Q?\n\nAssistant: {k}" for k in TALK}),
}


def pairs_of(path, **how):
    reader = SplitReader(open_source(str(path)).train, **how)
    return reader, list(reader)


@pytest.mark.parametrize("names", ["abc", "cba", "dcab", "cd", "dc"])
def test_each_file_of_a_folder_has_its_own_schema(tmp_path, names):
    order = [f"{name}.jsonl" for name in names]
    for number, name in enumerate(order):
        write(tmp_path, f"{number}{name}", as_jsonl([SCHEMAS_OF[name][1]] * 2))
    reader, pairs = pairs_of(tmp_path)
    assert reader.formats == [SCHEMAS_OF[name][0] for name in order]
    assert reader.findings == [] and len(pairs) == 2 * len(order)
    assert {(pair.chosen, pair.rejected) for pair in pairs} == {("chosen", "rejected")}


def test_a_group_of_answers_may_go_on_in_the_next_file(tmp_path):
    row = {"prompt": "Q?", "response": "good", "helpfulness": 4}
    write(tmp_path, "1.jsonl", as_jsonl([row]))
    write(tmp_path, "2.jsonl", as_jsonl([row | {"response": "bad", "helpfulness": 1}]))
    write(tmp_path, "3.jsonl", as_jsonl([SCHEMAS_OF["b.jsonl"][1]]))
    reader, pairs = pairs_of(tmp_path)
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [
        ("good", "bad"),
        ("chosen", "rejected"),
    ]
    assert reader.formats == ["helpsteer", "orca"] and reader.findings == []


CARD = b'{\n "name": "swifts",\n "tags": ["birds"]\n}'


@pytest.mark.parametrize("inner", ["data/train-00000.jsonl", "data/0.parquet", "train/0.csv"])
def test_a_card_beside_the_rows_folder_is_left_out_by_name(tmp_path, inner):
    write(tmp_path, inner, KINDS[f"a.{inner.split('.')[1]}"])
    write(tmp_path, "card.json", CARD)
    split = open_source(str(tmp_path)).train
    assert [row.values["prompt"] for row in split.rows()] == [row["prompt"] for row in ROWS]
    assert split.left_out == (str(tmp_path / "card.json"),)


@pytest.mark.parametrize("name", ["pairs.json", "pairs.jsonl"])
def test_rows_beside_folders_are_read_as_before(tmp_path, name):
    write(tmp_path, name, json.dumps(ROWS).encode() if name == "pairs.json" else as_jsonl())
    write(tmp_path, "old/train.jsonl", as_jsonl(ROWS[:1]))
    split = open_source(str(tmp_path)).train
    assert len(list(split.rows())) == 3 and split.left_out == ()


def test_a_stray_file_among_the_rows_is_named(tmp_path):
    write(tmp_path, "a.jsonl", as_jsonl([SCHEMAS_OF["a.jsonl"][1]]))
    write(tmp_path, "card.json", CARD)
    with pytest.raises(DataError, match=r"card\.json, row 1: .*beside 1 others.*move it out"):
        pairs_of(tmp_path)


@pytest.mark.parametrize("kind", ["file", "in a folder", "folder"])
def test_names_that_no_utf8_holds_are_refused_at_once(tmp_path, kind):
    odd = os.fsdecode(b"sw\xe4lbe")
    if kind == "folder":
        path = write(tmp_path / odd, "a.jsonl", as_jsonl()).parent
    else:
        path = write(tmp_path, f"{odd}.jsonl", as_jsonl())
    with pytest.raises(UsageError, match=r"sw\\xe4lbe.*not UTF-8; rename it"):
        open_source(str(tmp_path if kind == "in a folder" else path))


@pytest.mark.parametrize("quote", ['"', ""])
@pytest.mark.parametrize("gap", [" ", "  "])
def test_csv_with_spaces_behind_its_commas(tmp_path, quote, gap):
    lines = [["prompt", "chosen", "rejected"], ["Well; is it?", "Yes - it is.", "No."]]
    if quote:
        lines[1][0] = 'Well, is ""it""?'
    text = "\n".join(f",{gap}".join(f"{quote}{cell}{quote}" for cell in line) for line in lines)
    _, (pair,) = pairs_of(write(tmp_path, "a.csv", text.encode()))
    assert pair.prompt == lines[1][0].replace('""', '"')
    assert (pair.chosen, pair.rejected) == ("Yes - it is.", "No.")


def test_csv_without_spaces_in_its_header_keeps_those_of_its_cells(tmp_path):
    _, (pair,) = pairs_of(write(tmp_path, "a.csv", b"prompt,chosen,rejected\nQ?, yes,no\n"))
    assert pair.chosen == " yes"
