"""votes.jsonl and the booth: nothing lost, nothing counted twice, everything blind."""

import errno
import json
import os

import pytest

from conftest import jsonl, rows
from smoldpo.data.load import load_pairs
from smoldpo.utils.errors import DataError, UsageError
from smoldpo.web.booth import Booth
from smoldpo.web.votes import VoteFile

ANSWERS = [
    {
        "prompt": f"Question {n}?",
        "a": f"good {n}",
        "b": f"bad {n}",
        "model_a": "mine",
        "model_b": "base",
    }
    for n in range(8)
]


@pytest.fixture
def booth(tmp_path):
    (tmp_path / "answers.jsonl").write_text(jsonl(ANSWERS))
    return lambda: Booth("file", tmp_path / "answers.jsonl", tmp_path / "votes.jsonl")


def vote(booth, voter, wanted="good"):
    shown = booth.next(voter)
    booth.choose(voter, shown.ballot.id, "left" if shown.left.startswith(wanted) else "right")
    return shown


def test_votes_are_pairs(booth, tmp_path):
    place = booth()
    for _ in range(6):
        vote(place, "ann")
    place.choose("ann", place.next("ann").ballot.id, "tie")
    loaded = load_pairs(str(tmp_path / "votes.jsonl"))
    assert len(loaded.pairs) == 6 and loaded.account.dropped == {"tie": 1}
    assert all(pair.chosen.startswith("good") for pair in loaded.pairs)
    assert not loaded.account.columns_not_read
    standing = place.votes.standing()
    assert standing.votes == 7 and standing.share == pytest.approx(6.5 / 7)
    assert standing.low < 0.5 < standing.high and standing.preferred is None
    for _ in range(8):
        vote(place, "bob")
    standing = place.votes.standing()
    assert standing.votes == 15 and standing.low > 0.5 and standing.preferred == "a"


def test_sides_and_order_are_mixed_and_stay(booth):
    place = booth()
    assert place.next("ann") == place.next("ann") == booth().next("ann")
    seen, *fresh = ([vote(place, voter) for _ in range(8)] for voter in ("ann", "bob", "cy"))
    assert {shown.swapped for shown in seen} == {False, True}
    orders = {tuple(s.ballot.id for s in shown) for shown in (seen, *fresh)}
    assert len(orders) == 3, "each voter's own"
    assert place.next("ann") is None


def test_a_server_that_is_killed_loses_no_vote(booth, tmp_path):
    place = booth()
    voted = [vote(place, "ann").ballot.id for _ in range(3)]
    with (tmp_path / "votes.jsonl").open("a") as file:
        file.write('{"id": "half a li')
    again = booth()
    assert list(again.votes.by_voter["ann"]) == voted
    vote(again, "ann")
    assert len((tmp_path / "votes.jsonl").read_text().splitlines()) == 4
    assert len(booth().votes.by_voter["ann"]) == 4


def test_two_tabs_count_once(booth, tmp_path):
    place = booth()
    shown = place.next("ann")
    for _ in range(2):
        place.choose("ann", shown.ballot.id, "left")
    place.choose("ann", "no such ballot", "left")
    assert place.votes.standing().votes == 1 and place.next("ann").ballot.id != shown.ballot.id
    assert len((tmp_path / "votes.jsonl").read_text().splitlines()) == 1


def test_undo_and_skip(booth, tmp_path):
    place = booth()
    first = vote(place, "ann")
    vote(place, "bob")
    place.choose("ann", "", "undo")
    assert place.votes.by_voter["ann"] == {} and len(place.votes.by_voter["bob"]) == 1
    assert len((tmp_path / "votes.jsonl").read_text().splitlines()) == 1
    assert place.next("ann").ballot.id == first.ballot.id
    place.choose("ann", first.ballot.id, "skip")
    others = [vote(place, "ann").ballot.id for _ in range(7)]
    assert first.ballot.id not in others and place.next("ann").ballot.id == first.ballot.id
    place.choose("ann", "", "undo")
    place.choose("zoe", "", "undo")


def test_a_full_disk_leaves_the_file_as_it_was(booth, tmp_path, monkeypatch):
    place = booth()
    vote(place, "ann")
    before = (tmp_path / "votes.jsonl").read_bytes()
    write = os.write

    def short(file, data):
        if len(data) < 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data[:10])

    monkeypatch.setattr(os, "write", short)
    shown = place.next("ann")
    with pytest.raises(OSError):
        place.choose("ann", shown.ballot.id, "left")
    assert (tmp_path / "votes.jsonl").read_bytes() == before
    monkeypatch.undo()
    assert place.next("ann").ballot.id == shown.ballot.id and place.votes.standing().votes == 1


def test_whoever_has_seen_the_names_votes_no_more(booth):
    place = booth()
    shown = vote(place, "ann")
    place.end("ann")
    other = next(ballot for ballot in place.ballots if ballot.id != shown.ballot.id)
    place.choose("ann", other.id, "left")
    assert place.votes.standing().votes == 1 and place.next("ann") is None
    assert place.models == ("mine", "base")


def test_agreement_of_two_voters(booth):
    place = booth()
    for _ in range(8):
        vote(place, "ann")
    for number in range(8):
        vote(place, "bob", "good" if number % 2 else "bad")
    ((one, other, found),) = place.votes.agreements()
    assert (one, other, found.items) == ("ann", "bob", 8) and found.kappa == pytest.approx(0)


def test_pairs_can_be_voted_on_and_equal_answers_cannot(tmp_path):
    (tmp_path / "pairs.jsonl").write_text(jsonl(rows(4)))
    place = Booth("file", tmp_path / "pairs.jsonl", tmp_path / "votes.jsonl")
    assert place.models == ("chosen", "rejected") and len(place.ballots) == 4
    same = [{"prompt": "Q?", "a": "x", "b": "x "}]
    (tmp_path / "same.jsonl").write_text(jsonl(same))
    with pytest.raises(UsageError, match="no two different answers"):
        Booth("file", tmp_path / "same.jsonl", tmp_path / "votes.jsonl")
    (tmp_path / "same.jsonl").write_text(jsonl([{"prompt": "Q?", "a": "x", "b": 3}]))
    with pytest.raises(UsageError, match=r"same\.jsonl, row 1: needs 'prompt'"):
        Booth("file", tmp_path / "same.jsonl", tmp_path / "votes.jsonl")


def test_another_file_is_not_taken_for_votes(tmp_path):
    (tmp_path / "votes.jsonl").write_text(json.dumps({"prompt": "x"}) + "\n")
    with pytest.raises(DataError, match=r"votes\.jsonl, line 1: is no vote"):
        VoteFile(tmp_path / "votes.jsonl", [])
