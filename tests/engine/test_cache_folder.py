"""What is kept between runs, through the command line: it saves work, and it never changes a
result.
"""

import json
import shutil

import pytest
import torch

from conftest import keep_entry
from smoldpo.engine.cache import folder as cache
from smoldpo.engine.logprobs import LogprobModel


@pytest.fixture
def trunk_calls(monkeypatch):
    """A list that grows by one with each stream that goes through the trunk."""
    calls, original = [], LogprobModel.trunk_states

    def counted(self, batch):
        calls.append(batch)
        return original(self, batch)

    monkeypatch.setattr(LogprobModel, "trunk_states", counted)
    return calls


@pytest.fixture
def train(cli, tiny_folder, pairs_file, tmp_path):
    """Train a short time into a folder of that name; returns what was said, and what came out."""

    def run(name, *more, model=tiny_folder, dtype="float32", frozen=2):
        result = cli(
            "train", "--model", model, "--data", pairs_file, "--output-dir", name,
            "--per-device-train-batch-size", 4, "--learning-rate", "1e-2", "--num-train-epochs", 2,
            "--max-train-samples", 20, "--dtype", dtype, "--freeze-layers", frozen,
            "--stream-tokens", 500, "--sample-prompt", "none", "--generate-prompts", 0, "--device",
            "cpu", "--compile", "off", *more,
        )  # fmt: skip
        assert result.code == 0, result.err
        return result.err, outcome(tmp_path / name)

    return run


def outcome(run):
    """The trained weights to the bit, every number of the metrics, and the held-out pairs'
    scores.
    """
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timeless = [
        {
            key: value
            for key, value in row.items()
            if "loss" in key or "reward" in key or "acc" in key
        }
        for row in rows
    ]
    assert sum("loss" in row for row in timeless) >= 6
    pairs = json.loads((run / "evaluation.json").read_text())["pairs"]
    return (run / "model" / "model.safetensors").read_bytes(), timeless, pairs


def kept(kind):
    return list((cache.cache_folder() / kind).glob("*"))


@pytest.mark.parametrize("frozen", [2, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_way_to_keep_changes_a_bit(train, trunk_calls, dtype, frozen):
    outcomes, calls = [], []
    for name, mode in [("off", "off"), ("memory", "memory"), ("cold", "disk"), ("warm", "disk")]:
        trunk_calls.clear()
        said, found = train(name, "--cache", mode, dtype=dtype, frozen=frozen)
        assert "computed anew" not in said
        assert bool(kept("trunk")) == bool(kept("reference")) == (mode == "disk")
        outcomes.append(found)
        calls.append(len(trunk_calls))
    off, memory, cold, warm = calls
    assert off > memory == cold > 1 and warm == 0
    assert outcomes[1:] == outcomes[:1] * 3


def test_the_second_run_scores_no_reference(train, monkeypatch):
    train("first", "--cache", "disk")
    calls, original = [], LogprobModel.logps
    monkeypatch.setattr(
        LogprobModel,
        "logps",
        lambda self, *args: calls.append(torch.is_grad_enabled()) or original(self, *args),
    )
    train("second", "--cache", "disk")
    without_gradient = calls.count(False)
    shutil.rmtree(cache.cache_folder() / "reference")
    calls.clear()
    train("third", "--cache", "disk")
    assert calls.count(False) > without_gradient


def test_another_beta_finds_everything(train, trunk_calls):
    train("first", "--cache", "disk")
    trunk_calls.clear()
    before = {
        path: path.read_bytes() for path in cache.cache_folder().rglob("*.*") if path.is_file()
    }
    _, found = train("second", "--cache", "disk", "--beta", 0.5)
    assert not trunk_calls
    assert all(path.read_bytes() == raw for path, raw in before.items())
    assert found == train("third", "--cache", "off", "--beta", 0.5)[1]


def test_another_depth_is_kept_apart_and_changes_no_bit(train):
    train("two", "--cache", "disk", frozen=2)
    for frozen in (1, 4, 0):
        _, found = train(f"kept-{frozen}", "--cache", "disk", frozen=frozen)
        assert found == train(f"off-{frozen}", "--cache", "off", frozen=frozen)[1]
    assert len(kept("trunk")) == 3 and len(kept("reference")) == 4


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory, tiny_folder, tiny_tokenizer, tiny_config):
    """The same model with other random weights."""
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("other-model")
    torch.manual_seed(1)
    LlamaForCausalLM(tiny_config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def test_other_weights_find_nothing(train, trunk_calls, other_folder):
    train("first", "--cache", "disk")
    cold = len(trunk_calls)
    trunk_calls.clear()
    _, found = train("second", "--cache", "disk", model=other_folder)
    assert len(trunk_calls) == cold
    assert len(kept("trunk")) == len(kept("reference")) == 2
    assert found == train("third", "--cache", "off", model=other_folder)[1]


def test_the_same_weights_elsewhere_find_everything(train, trunk_calls, tiny_folder, tmp_path):
    train("first", "--cache", "disk")
    trunk_calls.clear()
    train("second", "--cache", "disk", model=shutil.copytree(tiny_folder, tmp_path / "copy"))
    assert not trunk_calls


def damage_states():
    [path] = cache.cache_folder().rglob("*.states")
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def damage_index():
    [path] = (path for path in kept("trunk")[0].glob("*.json") if path.name != "about.json")
    path.write_text(path.read_text()[:-9])


def damage_reference():
    path = kept("reference")[0] / "logps.json"
    path.write_text(path.read_text().replace("-", "-1", 1))


@pytest.mark.parametrize(
    "damage, warning",
    [
        (damage_states, ".states is damaged"),
        (damage_index, "cannot be read"),
        (damage_reference, "is damaged"),
    ],
)
def test_a_damaged_file_gives_the_same_weights_and_a_warning(train, damage, warning):
    _, expected = train("first", "--cache", "disk")
    damage()
    said, found = train("second", "--cache", "disk")
    assert found == expected
    assert warning in said and "computed anew" in said


def test_the_cache_may_be_removed_between_runs(train, cli, trunk_calls):
    _, expected = train("first", "--cache", "disk")
    assert cli("cache", "clear").code == 0
    cold = len(trunk_calls)
    assert train("second", "--cache", "disk")[1] == expected
    assert len(trunk_calls) == 2 * cold


def test_a_cache_that_cannot_be_written_is_refused_or_done_without(
    train, cli, tiny_folder, pairs_file
):
    cache.cache_folder().write_text("a file where a folder should be")
    result = cli("train", "--model", tiny_folder, "--data", pairs_file, "--cache", "disk")
    assert result.code == 2 and str(cache.cache_folder()) in result.err
    found = train("auto", "--cache", "auto")[1]
    assert found == train("off", "--cache", "off")[1]


def test_list_and_clear_after_a_run(train, cli):
    result = cli("cache", "list")
    assert result.code == 0 and "nothing is kept in" in result.out
    train("first", "--cache", "disk")
    found = json.loads(cli("cache", "list", "--json").out)
    assert found["folder"] == str(cache.cache_folder())
    assert {entry["kind"] for entry in found["entries"]} == {"trunk", "reference"}
    table = cli("cache", "list").out
    for entry in found["entries"]:
        assert entry["key"][:8] in table
        assert entry["about"]["dtype"] == "float32" and "tiny-model" in entry["about"]["model"]
        folder = cache.entry_folder(entry["kind"], entry["key"])
        assert entry["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    assert "states behind layer 1" in table.replace("\n", " ")
    freed = sum(entry["bytes"] for entry in found["entries"])
    result = cli("cache", "clear")
    assert result.code == 0 and result.out == f"removed 2 of 2, {freed:,} bytes\n"
    assert json.loads(cli("cache", "list", "--json").out)["entries"] == []


@pytest.fixture
def four(cli):
    """Entries of 1000 bytes each, from the longest unused to the one used last."""
    kinds_and_keys = [
        ("trunk", "aa11"),
        ("reference", "bb22"),
        ("trunk", "aa33"),
        ("trunk", "cc44"),
    ]
    return [keep_entry(kind, key, 1000, 100 + i) for i, (kind, key) in enumerate(kinds_and_keys)]


def keys():
    return [entry.folder.name for entry in cache.entries()]


def test_entries_are_listed_from_the_one_used_last(four, cli):
    assert keys() == ["cc44", "aa33", "bb22", "aa11"]
    rows = json.loads(cli("cache", "list", "--json").out)["entries"]
    assert rows[0] == {
        "kind": "trunk", "key": "cc44", "bytes": 1000, "used": 103, "about": {"what": "a test"},
    }  # fmt: skip
    assert rows[2]["kind"] == "reference"
    assert "0.0 MB in all" in cli("cache", "list").out


@pytest.mark.parametrize("about", ["", "[]", "{", '{"what": "[red]no markup[/red]"}'])
def test_an_entry_is_listed_whatever_is_written_about_it(cli, about):
    keep_entry("trunk", "aa11", 1000, 100, about)
    (cache.cache_folder() / "trunk" / "stray").write_text("a file")
    result = cli("cache", "list")
    assert result.code == 0 and "aa11" in result.out and "stray" not in result.out
    assert ("[red]" if "red" in about else "trunk") in result.out


@pytest.mark.parametrize(
    "arguments, left",
    [
        ([], []),
        (["aa"], ["cc44", "bb22"]),
        (["aa33"], ["cc44", "bb22", "aa11"]),
        (["bb22", "c"], ["aa33", "aa11"]),
    ],
)
def test_clear_removes_by_the_keys_beginning(four, cli, arguments, left):
    model = cache.cache_folder() / "models" / "unpacked"
    model.mkdir(parents=True)
    result = cli("cache", "clear", *arguments)
    assert result.code == 0, result.err
    assert result.out == f"removed {4 - len(left)} of 4, {1000 * (4 - len(left)):,} bytes\n"
    assert keys() == left and model.exists()


def test_clear_refuses_a_key_that_is_not_there(four, cli):
    result = cli("cache", "clear", "aa", "zz99")
    assert result.code == 2 and "zz99" in result.err and "cache list" in result.err
    assert len(keys()) == 4


@pytest.mark.parametrize(
    "limit, used_now, left",
    [
        (4000, [], ["cc44", "aa33", "bb22", "aa11"]),
        (3999, [], ["cc44", "aa33", "bb22"]),
        (2000, [], ["cc44", "aa33"]),
        (2000, [0], ["cc44", "aa11"]),
        (0, [1, 2], ["aa33", "bb22"]),
        (0, [], []),
    ],
)
def test_what_was_used_longest_ago_goes_and_never_what_is_used_now(four, limit, used_now, left):
    removed = cache.trim(limit, {four[index] for index in used_now})
    assert keys() == left
    assert [entry.folder for entry in removed] == [f for f in four if f.name not in left]


def test_a_run_trims_to_the_limit_and_keeps_its_own(train, cli, trunk_calls):
    old, older = (
        keep_entry("trunk", "old", 50_000, 100),
        keep_entry("reference", "older", 900_000, 50),
    )
    said, _ = train("first", "--cache", "disk", "--cache-limit", 0.0009)
    assert not older.exists() and str(older) in said and "900,000 bytes" in said
    assert old.exists() and len(kept("trunk")) == 2 and len(kept("reference")) == 1
    trunk_calls.clear()
    # A limit below what the run itself has kept: everything else goes.
    said, _ = train("second", "--cache", "disk", "--cache-limit", 0.0001)
    assert not old.exists() and not trunk_calls
    assert len(kept("trunk")) == len(kept("reference")) == 1


def test_a_limit_too_small_for_all_pairs_changes_no_bit(train):
    limit = 100_000
    _, found = train("small", "--cache", "disk", "--cache-limit", limit / 1e9)
    [states] = cache.cache_folder().rglob("*.states")
    assert 0.5 * limit < states.stat().st_size <= limit
    assert found == train("off", "--cache", "off")[1]
    assert found == train("again", "--cache", "disk", "--cache-limit", limit / 1e9)[1]


def test_trimming_what_another_run_trims_at_the_same_time(train, monkeypatch):
    old = keep_entry("trunk", "old", 50_000_000, 100)
    remove = shutil.rmtree

    def too_late(path, *more, **options):
        if path == old:
            remove(path)
        remove(path, *more, **options)

    monkeypatch.setattr(cache.shutil, "rmtree", too_late)
    train("one", "--cache", "disk", "--cache-limit", 0.001)
    assert not old.exists()


def test_what_was_damaged_is_computed_anew_once(train):
    train("first", "--cache", "disk")
    [path] = cache.cache_folder().rglob("*.states")
    raw = bytearray(path.read_bytes())
    for offset, _, _ in json.loads(path.with_suffix(".json").read_text())["pairs"].values():
        raw[offset] ^= 1
    path.write_bytes(raw)
    assert ".states is damaged" in train("second", "--cache", "disk")[0]
    assert ".states is damaged" not in train("third", "--cache", "disk")[0]


def test_the_limit_holds_over_runs(train):
    for name in ("one", "two"):
        train(name, "--cache", "disk", "--cache-limit", 0.0001)
        files = [path for path in cache.cache_folder().rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in files) <= 120_000


def test_an_empty_key_clears_nothing(cli):
    keep_entry("trunk", "aa", 1000, 1)
    assert cli("cache", "clear", "").code == 2 and len(cache.entries()) == 1
