"""Reference log-probabilities on disk: the same numbers again, or a warning; never another
number.
"""

import hashlib
import json
import math
import os
import time

import pytest
import torch

from smoldpo.engine.cache.reference_logps import ReferenceStore, damage

KEPT = {
    "one": (-1.5, -math.pi, -0.25, 0.0),
    "two": (-0.1, -1e-300, 0.0, -1e-301),
    "three": (-math.inf, -123456.7890123, 0.0, -math.e),
}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "reference" / "key"


@pytest.fixture
def said():
    return []


@pytest.fixture
def opened(folder, said):
    return lambda: ReferenceStore(folder, {"what": "a test"}, said.append)


@pytest.fixture
def written(opened, folder):
    """The file with all of KEPT in it."""
    store = opened()
    for key, sides in KEPT.items():
        store.put(key, *sides)
    store.commit()
    return folder / "logps.json"


def read(store):
    return {key: store[key] for key in KEPT if key in store}


def test_what_was_committed_is_found_again(opened, written, folder, said):
    assert read(opened()) == KEPT and said == []
    assert "unknown" not in opened()
    assert json.loads((folder / "about.json").read_text()) == {"what": "a test"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_number_comes_back_exactly(opened, dtype):
    generator = torch.Generator().manual_seed(0)
    numbers = -torch.randn(4, 500, generator=generator, dtype=torch.float64).exp().to(dtype)
    numbers *= 10.0 ** torch.arange(-30, 20, 0.1, dtype=torch.float64).to(dtype)
    store = opened()
    for index, sides in enumerate(numbers.T.tolist()):
        store.put(str(index), *sides)
    store.commit()
    again = opened()
    found = torch.tensor([again[str(index)] for index in range(500)], dtype=torch.float64)
    assert torch.equal(found.T.to(dtype), numbers) and torch.equal(found.T, numbers.double())


def test_without_a_commit_another_store_finds_nothing(opened, folder):
    store = opened()
    store.put("one", *KEPT["one"])
    assert store["one"] == KEPT["one"]
    assert "one" not in opened() and not folder.exists()


def test_a_commit_without_news_writes_nothing(opened, written):
    os.utime(written, (1, 1))
    store = opened()
    store.commit()
    assert written.stat().st_mtime == 1


def test_opening_counts_as_use(opened, written, folder):
    os.utime(folder, (1, 1))
    before = time.time()
    opened()
    assert folder.stat().st_mtime > before - 5  # clocks of files are coarse


def test_looking_is_not_using(written, folder, said):
    os.utime(folder, (1, 1))
    assert "one" in ReferenceStore(folder, {}, said.append, read_only=True)
    assert damage(folder) == []
    assert folder.stat().st_mtime == 1
    written.write_text("no")
    os.utime(folder, (1, 1))
    assert len(damage(folder)) == 1 and folder.stat().st_mtime == 1


def test_no_changed_bit_gives_another_number(opened, written, said):
    raw = written.read_bytes()
    for place in range(8 * len(raw)):
        changed = bytearray(raw)
        changed[place // 8] ^= 1 << place % 8
        written.write_bytes(changed)
        said.clear()
        if read(opened()) == KEPT:  # 1E-300 is 1e-300
            assert bytes(changed).lower() == raw.lower() and said == []
            continue
        assert read(opened()) == {}, place
        assert str(written) in said[0] and "is damaged" in said[0]


def signed(logps):
    digest = hashlib.sha256(json.dumps(logps).encode()).hexdigest()
    return json.dumps({"format": 2, "logps": logps, "sha256": digest})


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", '{"logps": {}}', '{"sha256": ""}', signed({"one": [-1]}), signed([]),
     signed({"one": -1}), signed({"one": ["x", -1, 0, 0]}), signed({"one": [-1, -2]}),
     signed({"one": [-1, -2, -1, 0]}).replace("-2", "-3"),
     signed({"one": [-1, -2, -1, 0]}).replace('"format": 2', '"format": 1'),
     json.dumps({"format": 2, "logps": {"one": [-1, -2, -1, 0]}, "sha256": "0" * 64})],
)  # fmt: skip
def test_what_is_damaged_is_left_aside_and_written_anew(opened, written, said, text):
    written.write_text(text)
    store = opened()
    assert read(store) == {} and len(said) == 1 and "computed anew" in said[0]
    store.put("one", *KEPT["one"])
    store.commit()
    said.clear()
    assert read(opened()) == {"one": KEPT["one"]} and said == []


def test_the_checksum_alone_does_not_refuse(opened, written, said):
    """What the tests above sign is read where its shape is right."""
    written.write_text(signed({"one": [-1, -2, -1, 0]}))
    assert read(opened()) == {"one": (-1, -2, -1, 0)} and said == []


def test_a_file_of_the_first_form_is_not_misread(opened, written, said):
    """It had no tails; its folder has another name too, for the form is part of the key."""
    digest = hashlib.sha256(json.dumps({"one": [-1, -2]}).encode()).hexdigest()
    written.write_text(json.dumps({"logps": {"one": [-1, -2]}, "sha256": digest}))
    assert read(opened()) == {} and "computed anew" in said[0]


def test_two_writers_merge(opened, said):
    one, other = opened(), opened()
    one.put("one", *KEPT["one"])
    other.put("two", *KEPT["two"])
    one.commit()
    other.commit()
    assert read(opened()) == {key: KEPT[key] for key in ("one", "two")}
    one.put("three", *KEPT["three"])
    one.commit()
    assert read(opened()) == KEPT and read(one) == KEPT and said == []


def test_a_writer_stays_with_its_own_numbers(opened):
    """The first loss is ln 2 only against the numbers that this very process has computed."""
    one, other = opened(), opened()
    one.put("one", -1.0, -2.0, 0.0, -0.5)
    other.put("one", *KEPT["one"])
    one.commit()
    other.commit()
    assert other["one"] == KEPT["one"] and read(opened()) == {"one": KEPT["one"]}


def test_no_folder_means_memory_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = ReferenceStore()
    store.put("one", *KEPT["one"])
    store.commit()
    assert store["one"] == KEPT["one"] and "one" not in ReferenceStore()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_no_error(opened, folder, said):
    folder.parent.write_text("a file where a folder should be")
    store = opened()
    store.put("one", *KEPT["one"])
    store.commit()
    assert len(said) == 1 and "nothing is kept there" in said[0]
    assert store["one"] == KEPT["one"]


def test_a_cache_that_may_only_be_read_is_read(opened, written, said, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(1, os.strerror(1))

    monkeypatch.setattr(os, "utime", refuse)
    assert "one" in opened() and not said
