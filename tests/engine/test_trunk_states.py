"""Trunk states on disk: found again to the last bit, or noticed as damaged; never wrong, never an
error.
"""

import errno
import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch

from smoldpo.engine.cache import trunk_states
from smoldpo.engine.cache.trunk_states import DiskStore, MemoryStore, TrunkStore

WIDTH = 8
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
PAIRS = {"first": 3, "second": 1, "third": 5}
DAY = 24 * 3600


def states_of(key, dtype=torch.float32):
    """A pair's states, with what only a comparison of bits tells apart."""
    tokens = PAIRS[key]
    generator = torch.Generator().manual_seed(tokens)
    states = torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64)
    states[0, :3] = torch.tensor([float("nan"), -0.0, float("inf")])
    return states.to(dtype)


def same_bits(one, other):
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(one.view(torch.uint8), other.view(torch.uint8))
    )


SIZE = {key: states_of(key).numel() * 4 for key in PAIRS}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "trunk" / "key"


@pytest.fixture
def said():
    return []


@pytest.fixture
def opened(folder, said):
    def open_store(dtype=torch.float32, room=1e9):
        return DiskStore(folder, WIDTH, dtype, room, {"what": "a test"}, said.append)

    return open_store


@pytest.fixture
def shard(opened, folder):
    """One committed shard with all pairs: its .states and its .json."""
    store = opened()
    for key in PAIRS:
        store.put(key, states_of(key))
    store.commit()
    [states] = folder.glob("*.states")
    return states, states.with_suffix(".json")


def flip(path, byte, bit=0):
    raw = bytearray(path.read_bytes())
    raw[byte] ^= 1 << bit
    path.write_bytes(raw)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_was_committed_is_found_again_to_the_bit(opened, said, dtype):
    store = opened(dtype)
    for key in PAIRS:
        assert key not in store and store.get(key) is None
        store.put(key, states_of(key, dtype))
        assert key in store and same_bits(store.get(key), states_of(key, dtype))
    store.commit()
    again = opened(dtype)
    for key in PAIRS:
        assert key in again and same_bits(again.get(key), states_of(key, dtype))
    assert "unknown" not in again and again.get("unknown") is None
    assert said == []


def test_a_part_of_a_larger_tensor_is_kept_as_it_is_read(opened):
    store, whole = opened(), torch.arange(4.0 * WIDTH).view(WIDTH, 4)
    store.put("first", whole.T.requires_grad_())
    assert torch.equal(store.get("first"), whole.T)


def test_without_a_commit_another_store_finds_nothing(opened, said):
    store = opened()
    store.put("first", states_of("first"))
    assert "first" not in opened() and said == []
    store.commit()
    assert "first" in opened()


def test_what_is_put_after_a_commit_waits_for_the_next(opened):
    store = opened()
    store.put("first", states_of("first"))
    store.commit()
    store.put("second", states_of("second"))
    assert "second" not in opened()
    store.commit()
    store.commit()
    again = opened()
    assert all(same_bits(again.get(key), states_of(key)) for key in ("first", "second"))


def test_a_full_shard_is_safe_without_a_commit(opened, folder, monkeypatch):
    monkeypatch.setattr(trunk_states, "SHARD_BYTES", SIZE["first"] + SIZE["third"])
    store = opened()
    for key in ("first", "third", "second"):
        store.put(key, states_of(key))
    again = opened()
    assert [key in again for key in PAIRS] == [True, False, True]
    assert len(list(folder.glob("*.states"))) == 2


def test_opening_writes_nothing(opened, folder):
    store = opened()
    store.commit()
    assert not folder.exists()


def test_opening_counts_as_use(opened, folder, shard):
    os.utime(folder, (1, 1))
    before = time.time()
    opened()
    assert folder.stat().st_mtime > before - 5  # clocks of files are coarse


def test_about_says_what_it_is(folder, shard):
    assert json.loads((folder / "about.json").read_text()) == {"what": "a test"}


@pytest.mark.parametrize("age, left", [(DAY - 3600, True), (DAY + 3600, False)])
def test_what_a_crash_left_is_swept_after_a_day(opened, folder, said, age, left):
    crashed = opened()
    crashed.put("first", states_of("first"))
    [states] = folder.glob("*.states")
    os.utime(states, (time.time() - age,) * 2)
    opened()
    assert states.exists() == left and said == []


def test_a_committed_shard_is_never_swept(opened, shard):
    for path in shard:
        os.utime(path, (1, 1))
    assert same_bits(opened().get("first"), states_of("first"))


def cut(path):
    path.write_bytes(path.read_bytes()[: -SIZE["third"] // 2])


def wrong_checksum(index):
    content = json.loads(index.read_text())
    content["pairs"]["second"][2] = "0" * 16
    index.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "damage, lost",
    [
        (lambda states, _: flip(states, 0), "first"),
        (lambda states, _: flip(states, SIZE["first"], bit=7), "second"),
        (lambda states, _: flip(states, -1, bit=3), "third"),
        (lambda states, _: cut(states), "third"),
        (lambda _, index: wrong_checksum(index), "second"),
    ],
    ids=["first bit", "a sign", "last byte", "cut short", "wrong checksum"],
)
def test_a_damaged_pair_is_noticed_and_the_others_stay(opened, shard, said, damage, lost):
    damage(*shard)
    store = opened()
    assert lost in store and store.get(lost) is None and lost not in store
    assert len(said) == 1 and "damaged" in said[0] and "computed anew" in said[0]
    for key in PAIRS.keys() - {lost}:
        assert same_bits(store.get(key), states_of(key))
    assert len(said) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda states, _: states.unlink(),
        lambda _, index: index.write_bytes(index.read_bytes()[:-9]),
        lambda _, index: index.write_bytes(b""),
        lambda _, index: index.write_bytes(b"\xff\xfe" + index.read_bytes()),
        lambda _, index: index.write_text("[]"),
        lambda _, index: index.write_text("7"),
        lambda _, index: index.write_text("{}"),
        lambda _, index: index.write_text('{"pairs": ["first"]}'),
        lambda _, index: index.write_text('{"pairs": {"first": [0, 3]}}'),
        lambda _, index: index.write_text('{"pairs": {"first": null}}'),
        lambda _, index: index.write_text('{"pairs": {"first": ["x", 3, "y"]}}'),
    ],
    ids=["no states", "cut", "empty", "no text", "list", "number", "no pairs", "pairs in a list",
         "no checksum", "null", "no offset"],
)  # fmt: skip
def test_a_damaged_shard_is_left_aside_with_a_warning(opened, shard, said, damage):
    other = opened()
    other.put("first", states_of("first"))
    damage(*shard)
    store = opened()
    assert not any(key in store for key in PAIRS)
    assert len(said) == 1 and shard[1].name in said[0] and "computed anew" in said[0]
    # What is computed anew is kept again, and the damaged shard does not hide it.
    store.put("first", states_of("first"))
    store.commit()
    assert same_bits(opened().get("first"), states_of("first"))


def test_no_flipped_bit_of_the_index_gives_a_wrong_state(opened, shard):
    _, index = shard
    raw = index.read_bytes()
    lost = 0
    for place in range(8 * len(raw)):
        flip(index, place // 8, place % 8)
        store = opened()
        for key in PAIRS:
            found = store.get(key)
            lost += found is None
            assert found is None or same_bits(found, states_of(key)), place
        index.write_bytes(raw)
    assert lost > len(raw)


def test_damage_while_a_store_is_open_is_noticed(opened, folder, said):
    store = opened()
    store.put("first", states_of("first"))
    [states] = folder.glob("*.states")
    with states.open("r+b") as file:
        file.write(b"\x01\x02")
    assert store.get("first") is None and len(said) == 1
    store.put("first", states_of("first"))
    store.commit()
    assert same_bits(opened().get("first"), states_of("first"))


def test_a_later_shard_wins_over_a_damaged_earlier_one(opened, folder, shard, said):
    states, index = shard
    flip(states, 0)
    # Last by name, so that the time alone says which came first.
    earlier = folder / "zzz.json"
    states.rename(folder / "zzz.states")
    index.rename(earlier)
    os.utime(earlier, (1, 1))
    store = opened()
    assert store.get("first") is None
    store.put("first", states_of("first"))
    store.commit()
    said.clear()
    assert same_bits(opened().get("first"), states_of("first")) and said == []


def test_two_stores_write_into_one_folder(opened, said):
    one, other = opened(), opened()
    one.put("first", states_of("first"))
    other.put("second", states_of("second"))
    one.put("third", states_of("third"))
    other.put("first", states_of("first"))
    other.commit()
    one.commit()
    again = opened()
    assert all(same_bits(again.get(key), states_of(key)) for key in PAIRS) and said == []


@pytest.mark.parametrize("kind", [DiskStore, MemoryStore])
def test_what_does_not_fit_is_not_kept(opened, folder, said, kind):
    room = SIZE["second"] + SIZE["third"]  # and more than "first" and "second"
    store = opened(room=room) if kind is DiskStore else MemoryStore(room)
    for key in ("first", "third", "second"):
        store.put(key, states_of(key))
        store.put(key, states_of(key))  # takes no room twice
    store.commit()
    for one in [store] + [opened()] * (kind is DiskStore):
        assert same_bits(one.get("first"), states_of("first"))
        assert same_bits(one.get("second"), states_of("second"))
        assert "third" not in one and one.get("third") is None
    assert sum(path.stat().st_size for path in folder.glob("*.states")) <= room
    assert said == []


def test_memory_keeps_a_copy():
    store, whole = MemoryStore(1e9), torch.zeros(9, WIDTH)
    store.put("first", whole[:3])
    whole.fill_(1)
    assert store.get("first").eq(0).all()
    assert store.get("first").untyped_storage().nbytes() == 3 * WIDTH * 4


def test_no_store_keeps_nothing():
    store = TrunkStore()
    store.put("first", states_of("first"))
    store.commit()
    assert "first" not in store and store.get("first") is None


def test_a_full_disk_ends_the_keeping_and_not_the_run(opened, said, monkeypatch):
    store, write = opened(), os.pwrite
    store.put("first", states_of("first"))

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    store.put("second", states_of("second"))
    monkeypatch.setattr(os, "pwrite", write)
    store.put("third", states_of("third"))
    store.commit()
    assert len(said) == 1 and "No space left" in said[0]
    for one in (store, opened()):
        assert same_bits(one.get("first"), states_of("first"))
        assert "second" not in one and "third" not in one


def open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files as Linux does")
def test_no_file_stays_open(opened, shard):
    before = open_files()
    store = opened()
    store.put("another", states_of("first"))
    store.get("first")
    assert open_files() == before + 1
    del store
    assert open_files() == before


def test_a_folder_that_is_cleared_before_the_commit_loses_nothing_else(opened, folder, said):
    store = opened()
    store.put("first", states_of("first"))
    shutil.rmtree(folder)
    store.commit()
    assert said and store.get("first") is None


def test_a_disk_that_is_full_only_at_the_commit(opened, said, monkeypatch):
    store = opened()
    store.put("first", states_of("first"))

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    store.commit()
    assert said and "first" not in opened()


def test_a_write_that_falls_short_is_not_kept(opened, said, monkeypatch):
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, raw, at: write(file, raw[:8], at))
    store = opened()
    store.put("first", states_of("first"))
    assert "first" not in store and said


@pytest.mark.parametrize("entry", ["0, -1", "-8, 3", "0, 1e15", "1e999, 3"])
def test_an_index_with_impossible_numbers_is_left_aside(opened, shard, said, entry):
    shard[1].write_text('{"pairs": {"first": [' + entry + ', "x"]}}')
    assert opened().get("first") is None and said


def test_a_disk_that_cannot_be_read_is_as_a_damaged_one(opened, shard, said, monkeypatch):
    store = opened()

    def broken(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", broken)
    assert store.get("first") is None and said


def test_a_cache_that_may_only_be_read_is_read(opened, shard, said, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "utime", refuse)
    assert same_bits(opened().get("first"), states_of("first")) and not said


def test_a_half_written_index_is_swept_after_a_day(opened, shard, folder):
    young, old = folder / ".a.json.123", folder / ".b.json.123"
    for path in (young, old):
        path.write_text("{")
    os.utime(old, (0, 0))
    opened()
    assert young.exists() and not old.exists()
