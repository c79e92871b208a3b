"""`smoldpo pairs merge`: every pair once, with its source."""

import json

from smoldpo.data.load import load_pairs


def vote(prompt, a, b, winner):
    return {"prompt": prompt, "a": a, "b": b, "winner": winner, "voter": "ana"}


def test_pairs_and_votes_become_one_file(cli, write_rows, tmp_path):
    made = {"made": {"seed": 42}}
    write_rows(
        [
            {"prompt": "P", "chosen": "yes", "rejected": "no", "provenance": made},
            {"prompt": "Q", "chosen": "left", "rejected": "right", "source": "people"},
        ],
        "mine.jsonl",
    )
    write_rows(
        [
            vote("P", "no", "yes", "b"),
            vote("Q", "left", "right", "b"),
            vote("R", "one", "two", "tie"),
            vote("S", "one", "two", "a"),
        ],
        "votes.jsonl",
    )
    result = cli("pairs", "merge", "mine.jsonl", "votes.jsonl", "--output", "all.jsonl", "--json")
    assert result.code == 0, result.err
    mine, votes = json.loads(result.out)["parts"]
    assert (mine["rows"], mine["pairs"], mine["source"]) == (2, 2, "mine")
    assert (votes["rows"], votes["pairs"], votes["repeated"], votes["opposite"]) == (4, 2, 1, 1)
    assert votes["left_out"] == {"tie": 1}
    pairs = load_pairs("all.jsonl").pairs
    assert [(p.prompt, p.chosen, p.source) for p in pairs] == [
        ("P", "yes", "mine"),
        ("Q", "left", "people"),
        ("Q", "right", "votes"),
        ("S", "one", "votes"),
    ]
    rows = [json.loads(line) for line in (tmp_path / "all.jsonl").open()]
    assert [row.get("provenance") for row in rows] == [made, None, None, None]


def test_what_cannot_be_merged(cli, write_rows, tmp_path):
    pairs = [{"prompt": "P", "chosen": "yes", "rejected": "no"}]
    write_rows(pairs, "a.jsonl")
    (tmp_path / "b").mkdir()
    write_rows(pairs, "b/a.jsonl")
    for words, message in (
        (["a.jsonl", "b/a.jsonl", "--output", "c.jsonl"], "two files would have the source a"),
        (["a.jsonl", "--output", "a.jsonl"], "is read as well"),
        (["a.jsonl", "--output", "b/a.jsonl"], "exists"),
        (["a.jsonl", "--output", "c.jsonl", "--source", "x,y"], "names 2 sources"),
    ):
        result = cli("pairs", "merge", *words)
        assert result.code == 2 and message in result.err, result.err
    assert not (tmp_path / "c.jsonl").exists()
